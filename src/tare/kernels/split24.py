"""Weights in 24 bits: a bf16 parameter and a signed 8-bit correction, in plain torch operations; the twin of the native kernels.

Of an fp32 pattern the upper 24 bits are kept (sign, exponent, 15 bits of the significand): `high` is the nearest bf16, which the model
computes with, and `low` the difference of the patterns, in units of 256. Joining is one integer addition.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tare.kernels.blockwise import chunk_elements
from tare.kernels.paper import few
from tare.kernels.rounding import hash32

_EXPONENT = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


def _halves(pattern: Tensor) -> Tensor:
    """The bf16 whose bits are the upper half of int32 patterns."""
    return (pattern >> 16).to(torch.int16).view(torch.bfloat16)


@torch.no_grad()
def split(x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp32 numbers as `high` (bf16) and `low` (int8), rounded at the 24th bit: to nearest (ties to even), or by `noise`.

    noise: int32 from 0 to 255, one each, added to the byte that is cut; uniform ones make the mean exact.
    The kept number is within 2^-16 of x, relative; `high` is the bf16 nearest to it. NaN and infinities are kept by `high` alone, and so
    is whatever bf16 rounds to infinity (above 3.39e38).

    >>> high, low = split(torch.tensor([1.001, -0.0, float("inf")]))
    >>> high.tolist(), low.tolist()
    ([1.0, -0.0, inf], [33, 0, 0])
    >>> join(high, low).tolist()
    [1.001007080078125, -0.0, inf]
    """
    bits = x.contiguous().view(torch.int32)
    special = (bits & _EXPONENT) == _EXPONENT
    kept = (
        bits + (((bits >> 8) & 1) + 0x7F if noise is None else noise)
    ) & -256  # 24 bits of pattern, the last byte empty
    pattern = (kept + 0x8000) & -65536  # a tie away from zero: low reaches -128, but not +128
    low = (kept - pattern) >> 8
    overflow = special | ((pattern & _EXPONENT) == _EXPONENT)
    # a NaN whose payload sits in the low half alone would become an infinity: set its quiet bit
    nan = special & ((bits & 0x7FFFFF) != 0)
    pattern = torch.where(special, torch.where(nan, bits | 0x400000, bits), pattern)
    return _halves(pattern), torch.where(overflow, 0, low).to(torch.int8)


@torch.no_grad()
def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers of which `high` and `low` are the parts.

    Any pair is a number near `high`, also one whose `high` was changed from outside (pruned, clipped, loaded): a correction that belonged
    to another number moves the new one by at most half a bf16 step, and never makes it NaN, infinite or of the other sign.
    """
    pattern = high.contiguous().view(torch.int16).to(torch.int32) << 16
    magnitude = pattern & _MAGNITUDE
    correction = low.to(torch.int32) << 8
    # zero less something, and NaN or infinity with a correction, never come from `split`
    foreign = ((magnitude == 0) & (correction < 0)) | (magnitude >= _EXPONENT)
    return (pattern + torch.where(foreign, 0, correction)).view(torch.float32)


def _chunks(numel: int, device: torch.device) -> Iterator[slice]:
    size = chunk_elements(device)
    for start in few(range(0, numel, size)):
        yield slice(start, min(start + size, numel))


@torch.no_grad()
def write_split_(
    weight: Tensor, low: Tensor, update: Tensor, *, decay: float, alpha: float, key: int | None = None, start: int = 0
) -> None:
    """W <- decay * W - alpha * U, W being `weight` joined with `low`; the twin of `native16.write_split_`.

    Rounded to nearest, a steady small step is lost or lengthened in the same way each time (steps of 6.5 units become 7), because
    every step starts from a kept number. Rounded stochastically it arrives on average, however small it is.

    Args:
        weight: bf16, any shape and strides. Overwritten.
        low: int8, of the same shape; contiguous. Overwritten.
        update: fp32, as many elements: U.
        decay: factor of the old weight, 1 - lr * weight_decay.
        alpha: step size, everything included.
        key: stochastic rounding at the 24th bit (see `rounding`); None rounds to nearest.
        start: index of the first element for `key`.

    Raises:
        ValueError: wrong dtype or size.
    """
    if weight.dtype != torch.bfloat16 or low.dtype != torch.int8 or update.dtype != torch.float32:
        raise ValueError(f"need bfloat16, int8 and float32, got {weight.dtype}, {low.dtype} and {update.dtype}")
    if not weight.numel() == low.numel() == update.numel():
        raise ValueError(f"sizes differ: {weight.numel()}, {low.numel()}, {update.numel()}")
    if not weight.is_contiguous():
        copy = weight.contiguous()
        write_split_(copy, low, update, decay=decay, alpha=alpha, key=key, start=start)
        weight.copy_(copy)
        return
    w, c, u = weight.view(-1), low.view(-1), update.reshape(-1)
    for at in _chunks(w.numel(), w.device):
        exact = join(w[at], c[at]).mul_(decay).sub_(u[at].mul(alpha))
        noise = None if key is None else hash32(key, start + at.start, exact.numel(), w.device).bitwise_right_shift_(24)
        high, rest = split(exact, None if noise is None else noise.bitwise_and_(0xFF))
        w[at].copy_(high)
        c[at].copy_(rest)
