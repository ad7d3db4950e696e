"""Affine group codec in plain torch operations: (code - zero) * scale, one scale and zero for each group of consecutive elements.

Keeps projection bases in 8 or 4 bits, and weights in 8 bits with stochastic rounding. Zhang et al. (2024), "Q-GaLore: Quantized GaLore
with INT4 Projection and Layer-Adaptive Low-Rank Gradients", arXiv:2407.08296.
"""

import torch
from torch import Tensor

from tare.kernels import rounding
from tare.kernels.blockwise import absmax_numel, pieces

GROUP = 256
"""Elements that share a scale and a zero; the paper's value for weights and bases alike."""

SMALLEST_RANGE = 1e-5
"""The range of a group counts as at least this, so that a constant group has a scale; from the published code."""


def _check(bits: int, group: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
    if group < 1:
        raise ValueError(f"group must be positive, got {group}")


def _uniform(key: int, start: int, n: int, device: torch.device) -> Tensor:
    """[n] fp32 in [0, 1), 24 random bits each; a pure function of key and element number."""
    return rounding.hash32(key, start, n, device).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


@torch.no_grad()
def encode_affine(
    x: Tensor,
    bits: int = 8,
    group: int = GROUP,
    *,
    symmetric: bool = False,
    clamp_zero: bool = False,
    span_zero: bool = False,
    key: int | None = None,
    start: int = 0,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups of consecutive elements to whole steps between their least and greatest.

    scale = max(high - low, 1e-5) / (2^bits - 1); zero = -round(low / scale); code = round(x / scale) + zero, cut to 0 .. 2^bits - 1.
    Stochastic: floor(x / scale) plus 1 with the probability of the fraction, so that the mean is x (with a zero that is neither clamped
    nor spanned, scale = range / (2^bits - 2) and zero = -floor(low / scale), so that the ends' mean is exact too). All
    arithmetic in fp32. The rounded
    zero shifts the range by up to half a step, and by so much one end of a group may be cut, in the mean too; the symmetric code has no
    such end. A group that holds a NaN or an infinity gets NaN as its scale and so decodes to NaN.

    Args:
        x: any shape, any floating dtype; taken row-major.
        bits: 2 to 8.
        group: elements to a group, default 256 (the paper); the last group may be partial.
        symmetric: scale = max |x| / (2^(bits-1) - 1) around the fixed zero 2^(bits-1) instead.
        clamp_zero: cut `zero` to 0 .. 2^bits - 1, as the published code does. A group of one sign is destroyed by it (weights
            around 0.5 come back as 0.01); only to reproduce.
        span_zero: widen the range to hold 0, so that `zero` lies in 0 .. 2^bits - 1 (a byte) and 0.0 is kept exactly. The same
            codes as otherwise for a group of both signs; for one of one sign the step is coarser.
        key: stochastic rounding with this key of the counter-based generator (see `rounding`); None rounds to nearest.
        start: number of the first element for `key`.
        uniform: as many numbers in [0, 1) as `x` has elements: stochastic rounding with these instead (recorded traces).

    Returns:
        codes: uint8 in the shape of `x`, not packed (see `nibbles`); scale, zero: [ceil(numel / group)] fp32. `zero` is a whole number.

    Raises:
        ValueError: bits or group out of range, both `symmetric` and a choice of zero, both `key` and `uniform`.

    >>> codes, scale, zero = encode_affine(torch.tensor([-1.0, 0.0, 0.5, 2.0]), bits=4)
    >>> codes.tolist(), zero.tolist()
    ([0, 5, 7, 15], [5.0])
    >>> decode_affine(codes, scale, zero)
    tensor([-1.0000,  0.0000,  0.4000,  2.0000])
    """
    _check(bits, group)
    if symmetric and (clamp_zero or span_zero):
        raise ValueError("a symmetric code has its zero in the middle: clamp_zero and span_zero do not apply")
    if key is not None and uniform is not None:
        raise ValueError("give key or uniform, not both")
    if uniform is not None and uniform.numel() != x.numel():
        raise ValueError(f"uniform has {uniform.numel()} numbers for {x.numel()} elements")
    source, top, nearest = x.reshape(-1), 2**bits - 1, key is None and uniform is None
    groups = absmax_numel(x.numel(), group)
    codes = x.new_empty(x.numel(), dtype=torch.uint8)
    scales, zeros = (x.new_empty(groups, dtype=torch.float32) for _ in range(2))
    for first, last, width in pieces(x.numel(), group, x.device):
        part = source[first:last].to(torch.float32).view(-1, width)
        if symmetric:
            # amax hands NaN on
            scale = part.abs().amax(1).clamp_(min=SMALLEST_RANGE).div_(2 ** (bits - 1) - 1)
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = part.amin(1), part.amax(1)
            if span_zero:
                low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
            # a free zero leaves one step of room, so that no end of a group is cut when it is rounded away: its mean stays exact
            free = not (nearest or clamp_zero or span_zero)
            scale = (high - low).clamp_(min=SMALLEST_RANGE).div_(top - 1 if free else top)
            zero = low / scale
            zero = (zero.floor_() if free else zero.round_()).neg_()
            if clamp_zero or span_zero:
                zero.clamp_(0.0, top)
        bad = scale.isfinite().logical_not_()
        scale.masked_fill_(bad, torch.nan)
        zero.masked_fill_(bad, 0.0)
        steps = part / scale.unsqueeze(1)
        if nearest:
            steps.round_()
        else:
            if uniform is not None:
                u = uniform.reshape(-1)[first:last].to(torch.float32)
            else:
                assert key is not None
                u = _uniform(key, start + first, last - first, x.device)
            whole = steps.floor()
            steps.sub_(whole)
            steps = whole.add_(u.view(-1, width) < steps)
        steps.add_(zero.unsqueeze(1)).clamp_(0.0, top).nan_to_num_(0.0)
        codes[first:last].copy_(steps.view(-1))
        at = slice(first // group, absmax_numel(last, group))
        scales[at].copy_(scale)
        zeros[at].copy_(zero)
    return codes.view(x.shape), scales, zeros


@torch.no_grad()
def decode_affine(codes: Tensor, scale: Tensor, zero: Tensor, group: int = GROUP, out: Tensor | None = None) -> Tensor:
    """(code - zero) * scale.

    Args:
        codes: uint8, any shape, not packed.
        scale, zero: [ceil(numel / group)], any number type; taken as fp32.
        group: elements to a group; the one used to encode.
        out: floating, as many elements as `codes`, contiguous; written (rounded to its dtype) instead of a new fp32 tensor.

    Returns:
        fp32 in the shape of `codes`, or `out`.

    Raises:
        ValueError: sizes or dtypes do not fit.
    """
    _check(8, group)
    n, groups = codes.numel(), absmax_numel(codes.numel(), group)
    if codes.dtype != torch.uint8 or scale.numel() != groups or zero.numel() != groups:
        raise ValueError(
            f"{n} uint8 codes in groups of {group} need {groups} scales and zeros, "
            f"got {codes.dtype}, {scale.numel()} and {zero.numel()}"
        )
    if out is None:
        out = codes.new_empty(codes.shape, dtype=torch.float32)
    elif out.numel() != n or not out.is_contiguous():
        raise ValueError(f"out must be contiguous with {n} elements, got {out.numel()} with strides {out.stride()}")
    source, target, scale, zero = codes.reshape(-1), out.view(-1), scale.reshape(-1), zero.reshape(-1)
    for first, last, width in pieces(n, group, codes.device):
        at = slice(first // group, absmax_numel(last, group))
        part = source[first:last].to(torch.float32).view(-1, width)
        part.sub_(zero[at].to(torch.float32).unsqueeze(1)).mul_(scale[at].to(torch.float32).unsqueeze(1))
        target[first:last].copy_(part.view(-1))
    return out
