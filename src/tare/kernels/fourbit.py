"""Block-wise 4-bit codec of moments in plain torch operations; exact on every device, and the twin of the native one.

Two codes a byte (see `nibbles`), one scale for a block of 128. The signed map is the dynamic map of 8-bit states with three decades; the
unsigned one is linear and has no zero. Li, Chen & Zhu (2023), "Memory Efficient Optimizers with 4-bit States", arXiv:2309.01507.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tare.kernels.blockwise import (
    SMALLEST_NORMAL,
    absmax_numel,
    chunk_elements,
    fp32,
    fp32_below,
    keyed_candidates,
)
from tare.kernels.nibbles import pack, packed_numel, unpack
from tare.kernels.paper import few

BLOCK = 128
"""Elements that share one scale; the paper's: outliers of moments lie in whole rows or columns, and 2048 is too coarse for 4 bits."""


@lru_cache(maxsize=2)
def map_values(signed: bool) -> tuple[float, ...]:
    """The 16 values as Python floats, each exactly an fp32 number, ascending.

    Signed (first moments): decade i = 0, 1, 2 is [0.1, 1] * 10^(i-2) cut into 2^i equal cells, whose midpoints are taken with both
    signs; 0 and 1 are added: small moments keep their order of magnitude. Unsigned (second moments): (k + 1) / 16. A zero would be the
    nearest value of everything below a thirty-second of its block's largest, and m / (sqrt(0) + eps) is a step of millions (the paper's
    "zero-point problem"); without one, such an entry is taken for a sixteenth and moves too little rather than too much.

    >>> [round(x, 4) for x in map_values(True)[7:]]
    [0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    """
    if not signed:
        return tuple((k + 1) / 16 for k in range(16))
    middles = []
    for i in range(3):
        edges = [0.1 + 0.9 * j / 2**i for j in range(2**i + 1)]
        middles += [fp32((a + b) / 2 * 10.0 ** (i - 2)) for a, b in pairwise(edges)]
    return tuple(sorted([-x for x in middles] + middles + [0.0, 1.0]))


@lru_cache(maxsize=2)
def map_thresholds(signed: bool) -> tuple[float, ...]:
    """Where each of the codes 0..14 ends: the midpoint to the next value, rounded down to fp32; a tie goes to the lower code."""
    return tuple(fp32_below((a + b) / 2) for a, b in pairwise(map_values(signed)))


def zero_code(signed: bool) -> int:
    """The code of a block without a usable scale, and of new states: 0.0, or the least second moment (times a scale of 0).

    >>> zero_code(True), zero_code(False)
    (7, 0)
    """
    return 7 if signed else 0


def zero_byte(signed: bool) -> int:
    """Two codes of zero in one byte: fill new states with it."""
    return zero_code(signed) * 17


class Tables(NamedTuple):
    """Constants of one map on one device."""

    values: Tensor  # [16] fp32, ascending
    thresholds: Tensor  # [16] fp32; the last one is +inf
    candidates: Tensor  # [65536] int32; see `blockwise.keyed_candidates`


_cache: dict[tuple[bool, torch.device], Tables] = {}


def _tables(signed: bool, like: Tensor) -> Tables:
    """The tables on the device of `like`; placeholders of the right shape when `like` is a fake or meta tensor."""
    probe = like.new_empty(0)  # fake when a fake mode is active, even if `like` is not
    if isinstance(probe, FakeTensor) or probe.is_meta:
        return Tables(
            like.new_empty(16, dtype=torch.float32),
            like.new_empty(16, dtype=torch.float32),
            like.new_empty(65536, dtype=torch.int32),
        )
    found = _cache.get((signed, probe.device))
    if found is None:
        thresholds = map_thresholds(signed)
        with torch.inference_mode(False):
            found = Tables(
                torch.tensor(map_values(signed), dtype=torch.float32, device=probe.device),
                torch.tensor((*thresholds, float("inf")), dtype=torch.float32, device=probe.device),
                torch.tensor(keyed_candidates(thresholds, zero_code(signed)), dtype=torch.int32, device=probe.device),
            )
        _cache[signed, probe.device] = found
    return found


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The map as a tensor.

    Args:
        signed: values in (-1, 1] for first moments, or in (0, 1] for second moments.
        device: where the tensor lives.

    Returns:
        [16] fp32, ascending; a copy that the caller may change.
    """
    return torch.tensor(map_values(signed), dtype=torch.float32, device=device)


def _check(numel: int, codes: Tensor, absmax: Tensor, block: int) -> None:
    if block < 2 or block % 2:
        raise ValueError(f"a block of 4-bit codes must be even and positive, got {block}")
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise ValueError(f"codes must be uint8 and absmax float32, got {codes.dtype} and {absmax.dtype}")
    if codes.numel() != packed_numel(numel) or absmax.numel() != absmax_numel(numel, block):
        raise ValueError(
            f"{numel} elements in blocks of {block} need {packed_numel(numel)} bytes of codes and "
            f"{absmax_numel(numel, block)} scales, got {codes.numel()} and {absmax.numel()}"
        )


@torch.no_grad()
def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = BLOCK) -> None:
    """Quantise `x` into preallocated packed codes and scales.

    Each block (consecutive elements, row-major) is divided by its largest magnitude, and every element becomes the index of the nearest
    map value, the lower one on a tie. A block that holds a NaN or an infinity gets that as its scale, so that `decode` returns NaN or an
    infinity there: never a finite number.

    Args:
        x: any shape, any floating dtype; converted to fp32.
        codes: [ceil(numel / 2)] uint8, contiguous. Overwritten.
        absmax: [ceil(numel / block)] fp32, contiguous. Overwritten.
        signed: which map. The unsigned one is for numbers >= 0.
        block: elements to a block, even; default 128 (the paper).

    Raises:
        ValueError: dtypes or sizes do not fit.

    Source: Li, Chen & Zhu (2023), arXiv:2309.01507.
    """
    n = x.numel()
    _check(n, codes, absmax, block)
    source, target, scales = x.reshape(-1), codes.view(-1), absmax.view(-1)
    tables = _tables(signed, x)
    for start, stop in _chunks(n, block, x.device):
        full = start + (stop - start) // block * block
        part = source[start:stop].to(torch.float32)
        found = part.new_empty(stop - start, dtype=torch.uint8)
        for first, last in ((start, full), (full, stop)):  # whole blocks, then the partial one
            if first == last:
                continue
            piece = part[first - start : last - start].view(-1, min(block, last - first))
            # amax lets NaN through, which a comparison would not
            peak = piece.abs().amax(1)
            peak.masked_fill_(peak < SMALLEST_NORMAL, 0.0)
            # 0 for zero, infinite and NaN peaks: all elements of such a block get the code of zero
            factor = peak.reciprocal().masked_fill_((peak > 0).logical_not_(), 0.0)
            scaled = piece.mul(factor.unsqueeze(1)).view(-1)
            key = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
            code = torch.index_select(tables.candidates, 0, key)
            code.add_(scaled > torch.index_select(tables.thresholds, 0, code))
            found[first - start : last - start].copy_(code)
            scales[first // block : absmax_numel(last, block)].copy_(peak)
        pack(found, block, out=target[start // 2 : packed_numel(stop)])


def _chunks(numel: int, block: int, device: torch.device) -> list[tuple[int, int]]:
    """(start, stop) of runs of whole blocks; the last one may end with a partial block."""
    chunk = max(1, chunk_elements(device) // block) * block
    return [(start, min(start + chunk, numel)) for start in few(range(0, numel, chunk))]


def encode(x: Tensor, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise `x`; see `encode_into`.

    Args:
        x: any shape, any floating dtype.
        signed: which map.
        block: elements to a block, even.

    Returns:
        codes, [ceil(numel / 2)] uint8; absmax, [ceil(numel / block)] fp32.

    >>> codes, absmax = encode(torch.tensor([0.0, -1.0, 2.0]), signed=True)
    >>> [f"{x:02x}" for x in codes.tolist()], absmax.tolist()
    (['f7', '02'], [2.0])
    >>> decode(codes, absmax, 3, signed=True)
    tensor([ 0.0000, -0.8750,  2.0000])
    """
    codes = x.new_empty(packed_numel(x.numel()), dtype=torch.uint8)
    absmax = x.new_empty(absmax_numel(x.numel(), block), dtype=torch.float32)
    encode_into(x, codes, absmax, signed, block)
    return codes, absmax


@torch.no_grad()
def decode(
    codes: Tensor, absmax: Tensor, numel: int, signed: bool, block: int = BLOCK, out: Tensor | None = None
) -> Tensor:
    """Restore fp32 numbers: map[code] * absmax of the block.

    Args:
        codes: [ceil(numel / 2)] uint8.
        absmax: [ceil(numel / block)] fp32.
        numel: how many elements; the bytes alone do not say whether the last one holds two.
        signed: which map; the one used to encode.
        block: elements to a block; the one used to encode.
        out: fp32, `numel` elements, contiguous; written instead of a new tensor.

    Returns:
        [numel] fp32, or `out`.

    Raises:
        ValueError: dtypes or sizes do not fit.
    """
    _check(numel, codes, absmax, block)
    if out is None:
        out = codes.new_empty(numel, dtype=torch.float32)
    elif out.dtype != torch.float32 or out.numel() != numel:
        raise ValueError(f"out must be float32 with {numel} elements, got {out.dtype} with {out.numel()}")
    source, target, scales = codes.reshape(-1), out.view(-1), absmax.reshape(-1)
    values = _tables(signed, codes).values
    for start, stop in _chunks(numel, block, codes.device):
        index = unpack(source[start // 2 : packed_numel(stop)], stop - start, block).to(torch.int32)
        torch.index_select(values, 0, index, out=target[start:stop])
        full = start + (stop - start) // block * block
        target[start:full].view(-1, block).mul_(scales[start // block : full // block].unsqueeze(1))
        if full < stop:
            target[full:stop].mul_(scales[full // block])
    return out
