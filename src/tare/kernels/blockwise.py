"""Block-wise 8-bit dynamic codec in plain torch operations; exact on every device, and the twin of the native one.

A block of consecutive elements shares one scale, its largest magnitude; an element is stored as the nearest of 256 fixed values.
Dettmers et al. (2022), "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
"""

import bisect
import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tare.kernels.paper import few

BLOCK = 256
"""Elements that share one scale; the default of bitsandbytes since 0.44."""

SMALLEST_NORMAL = 2.0**-126
"""A block whose largest magnitude is below this (fp32 subnormal) is stored as zeros: its reciprocal would overflow."""


class Tables(NamedTuple):
    """Constants of one map on one device."""

    values: Tensor  # [256] fp32, ascending
    thresholds: Tensor  # [256] fp32; code c is left for c + 1 above thresholds[c]; the last one is +inf
    candidates: Tensor  # [65536] int32; smallest code that occurs among the fp32 numbers with these top 16 bits


def fp32(x: float) -> float:
    """`x` rounded to fp32, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def fp32_below(x: float) -> float:
    """Largest fp32 number that is not above `x`."""
    rounded = fp32(x)
    if rounded <= x:
        return rounded
    (bits,) = struct.unpack("<i", struct.pack("<f", rounded))
    return float(struct.unpack("<f", struct.pack("<i", bits - 1 if rounded > 0 else bits + 1))[0])


@lru_cache(maxsize=2)
def map_values(signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic map as Python floats, each exactly an fp32 number, ascending.

    Decade i = 0..6 is [0.1, 1] * 10^(i-6) cut into 2^i (signed) or 2^(i+1) (unsigned) equal cells, whose midpoints are taken; the
    signed map also takes their negatives; 0 and 1 are added. The roundings are those of the reference implementation (fp32 cell
    edges counted from the nearer end), so the values are equal to its values bit for bit.
    """
    values = [0.0, 1.0]
    low, high = fp32(0.1), 1.0
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        step = fp32((high - low) / cells)
        half = (cells + 1) // 2
        edges = [fp32(low + step * j if j < half else high - step * (cells - j)) for j in range(cells + 1)]
        power = fp32(10.0 ** (i - 6))
        middles = [fp32(power * fp32((a + b) / 2)) for a, b in pairwise(edges)]
        values += middles
        if signed:
            values += [-x for x in middles]
    return tuple(sorted(values))


@lru_cache(maxsize=2)
def map_thresholds(signed: bool) -> tuple[float, ...]:
    """Where each code ends: the midpoint to the next value, rounded down to fp32, so that a tie goes to the lower code. The last is inf.

    The sum of two fp32 numbers is exact in fp64 here, hence `x > threshold` decides the exact nearest value for every fp32 `x`.
    """
    values = map_values(signed)
    return (*(fp32_below((a + b) / 2) for a, b in pairwise(values)), float("inf"))


def zero_code(signed: bool) -> int:
    """The code that stands for 0.0: fill new states with it.

    >>> zero_code(True), zero_code(False)
    (127, 0)
    """
    return 127 if signed else 0


def keyed_candidates(thresholds: tuple[float, ...], special: int) -> tuple[int, ...]:
    """For each upper half of an fp32 pattern, the smallest code among the numbers that share it; `special` for NaN and infinities.

    Exact look-up of the nearest of some values: at most one threshold may fall among the numbers of one key, so that one comparison
    with the candidate's own threshold finishes.

    Args:
        thresholds: ascending fp32 numbers; code c ends at thresholds[c].
        special: the code of what is not finite.

    Returns:
        65,536 codes.
    """
    table = []
    for key in range(65536):
        if key & 0x7F80 == 0x7F80:  # infinities and NaN
            table.append(special)
            continue
        bits = key << 16 | (0xFFFF if key & 0x8000 else 0)  # the smallest number of the bin
        (smallest,) = struct.unpack("<f", struct.pack("<I", bits))
        table.append(bisect.bisect_left(thresholds, smallest))
    return tuple(table)


@lru_cache(maxsize=2)
def _candidates(signed: bool) -> tuple[int, ...]:
    return keyed_candidates(map_thresholds(signed)[:-1], zero_code(signed))


_cache: dict[tuple[bool, torch.device], Tables] = {}


def _tables(signed: bool, like: Tensor) -> Tables:
    """The tables on the device of `like`; placeholders of the right shape when `like` is a fake or meta tensor."""
    probe = like.new_empty(0)  # fake when a fake mode is active, even if `like` is not
    if isinstance(probe, FakeTensor) or probe.is_meta:
        return Tables(
            like.new_empty(256, dtype=torch.float32),
            like.new_empty(256, dtype=torch.float32),
            like.new_empty(65536, dtype=torch.int32),
        )
    found = _cache.get((signed, probe.device))
    if found is None:
        with torch.inference_mode(False):
            found = Tables(
                torch.tensor(map_values(signed), dtype=torch.float32, device=probe.device),
                torch.tensor(map_thresholds(signed), dtype=torch.float32, device=probe.device),
                torch.tensor(_candidates(signed), dtype=torch.int32, device=probe.device),
            )
        _cache[signed, probe.device] = found
    return found


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The dynamic map as a tensor.

    Args:
        signed: values in (-1, 1] for first moments, or in [0, 1] for second moments.
        device: where the tensor lives.

    Returns:
        [256] fp32, ascending; a copy that the caller may change.

    >>> dynamic_map(signed=True)[[0, 127, 255]]
    tensor([-0.9930,  0.0000,  1.0000])
    """
    return torch.tensor(map_values(signed), dtype=torch.float32, device=device)


def absmax_numel(numel: int, block: int = BLOCK) -> int:
    """How many scales `numel` elements have: the last block may be partial."""
    return -(-numel // block)


def chunk_elements(device: torch.device) -> int:
    """Elements handled at a time. On the CPU temporaries stay inside the cache; elsewhere kernel launches cost more than memory."""
    return 1 << 18 if device.type == "cpu" else 1 << 22


def pieces(numel: int, block: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """(start, stop, width) of pieces that are whole rows of `width`: chunks of full blocks, then the partial block by itself."""
    full = numel // block * block
    chunk = max(1, chunk_elements(device) // block) * block
    for start in few(range(0, full, chunk)):
        yield start, min(start + chunk, full), block
    if full < numel:
        yield full, numel, numel - full


def _check(numel: int, codes: Tensor, absmax: Tensor, block: int) -> None:
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise ValueError(f"codes must be uint8 and absmax float32, got {codes.dtype} and {absmax.dtype}")
    if codes.numel() != numel or absmax.numel() != absmax_numel(numel, block):
        raise ValueError(
            f"{numel} elements in blocks of {block} need {numel} codes and {absmax_numel(numel, block)} scales, "
            f"got {codes.numel()} and {absmax.numel()}"
        )


def _view(x: Tensor, name: str) -> Tensor:
    if not x.is_contiguous():
        raise ValueError(
            f"{name} is written in place and must be contiguous, got strides {x.stride()} for {tuple(x.shape)}"
        )
    return x.view(-1)


@torch.no_grad()
def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = BLOCK) -> None:
    """Quantise `x` into preallocated codes and scales.

    Each block (consecutive elements, row-major) is divided by its largest magnitude, and every element becomes the index of the nearest
    map value, the lower one on a tie. A block that holds a NaN or an infinity gets that as its scale, so that `decode` returns NaN there.

    Args:
        x: any shape, any floating dtype; converted to fp32.
        codes: uint8, as many elements as `x`, contiguous. Overwritten.
        absmax: fp32, one element for each block, contiguous. Overwritten.
        signed: which map. With the unsigned one, negative numbers become 0.
        block: elements to a block, default 256 (bitsandbytes since 0.44).

    Raises:
        ValueError: dtypes, sizes or strides do not fit.

    Source: Dettmers et al. (2022), arXiv:2110.02861.
    """
    _check(x.numel(), codes, absmax, block)
    source, target, scales = x.reshape(-1), _view(codes, "codes"), _view(absmax, "absmax")
    tables = _tables(signed, x)
    for start, stop, width in pieces(x.numel(), block, x.device):
        part = source[start:stop].to(torch.float32)
        # amax lets NaN through, which a comparison would not
        peak = part.abs().view(-1, width).amax(1)
        peak.masked_fill_(peak < SMALLEST_NORMAL, 0.0)
        # 0 for zero, infinite and NaN peaks; every element of such a block then becomes 0 or NaN, and both have the code of zero
        factor = peak.reciprocal().masked_fill_((peak > 0).logical_not_(), 0.0)
        scaled = part.view(-1, width).mul(factor.unsqueeze(1)).view(-1)
        # Keyed look-up: numbers that share their top 16 bits have at most two codes, and one comparison chooses.
        key = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
        code = torch.index_select(tables.candidates, 0, key)
        code.add_(scaled > torch.index_select(tables.thresholds, 0, code))
        target[start:stop].copy_(code)
        scales[start // block : absmax_numel(stop, block)].copy_(peak)


def encode(x: Tensor, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise `x`; see `encode_into`.

    Args:
        x: any shape, any floating dtype.
        signed: which map.
        block: elements to a block.

    Returns:
        codes, uint8 in the shape of `x`; absmax, [ceil(numel / block)] fp32.

    >>> codes, absmax = encode(torch.tensor([0.0, -1.0, 2.0]), signed=True)
    >>> codes.tolist(), absmax.tolist()
    ([127, 35, 255], [2.0])
    >>> decode(codes, absmax, signed=True)
    tensor([ 0.0000, -1.0016,  2.0000])
    """
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    absmax = x.new_empty(absmax_numel(x.numel(), block), dtype=torch.float32)
    encode_into(x, codes, absmax, signed, block)
    return codes, absmax


@torch.no_grad()
def decode(codes: Tensor, absmax: Tensor, signed: bool, block: int = BLOCK, out: Tensor | None = None) -> Tensor:
    """Restore fp32 numbers: map[code] * absmax of the block.

    Args:
        codes: uint8, any shape.
        absmax: [ceil(numel / block)] fp32.
        signed: which map; the one used to encode.
        block: elements to a block; the one used to encode.
        out: fp32, as many elements as `codes`, contiguous; written instead of a new tensor.

    Returns:
        fp32 in the shape of `codes`, or `out`.

    Raises:
        ValueError: dtypes, sizes or strides do not fit.
    """
    _check(codes.numel(), codes, absmax, block)
    if out is None:
        out = codes.new_empty(codes.shape, dtype=torch.float32)
    elif out.dtype != torch.float32 or out.numel() != codes.numel():
        raise ValueError(f"out must be float32 with {codes.numel()} elements, got {out.dtype} with {out.numel()}")
    source, target, scales = codes.reshape(-1), _view(out, "out"), absmax.reshape(-1)
    values = _tables(signed, codes).values
    for start, stop, width in pieces(codes.numel(), block, codes.device):
        part = target[start:stop]
        # index_select by int32 is about half the time of indexing on the CPU
        torch.index_select(values, 0, source[start:stop].to(torch.int32), out=part)
        part.view(-1, width).mul_(scales[start // block : absmax_numel(stop, block)].unsqueeze(1))
    return out
