"""Stochastic rounding to 16 bits from a counter hash, in plain torch operations; to bf16 it is the twin of the native write.

Each element's noise is a pure function of a key and of the element's index, so it is the same on every device, for every thread count
and for every way of cutting the work.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tare.kernels.paper import few

MASK = 0xFFFFFFFF
_CHUNK_CPU, _CHUNK = 1 << 18, 1 << 22  # elements; as in `blockwise`

# "lowbias32": two multiplications and three shifts, found by search for the least bias (Chris Wellons, 2018).
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def mix32(x: int) -> int:
    """The 32-bit integer hash, on one Python integer.

    >>> mix32(0), mix32(1)
    (0, 1753845952)
    """
    x &= MASK
    x = (x ^ (x >> 16)) * _MULTIPLIERS[0] & MASK
    x = (x ^ (x >> 15)) * _MULTIPLIERS[1] & MASK
    return x ^ (x >> 16)


class ShiftedKey(int):
    """A key for a piece of a tensor: what it gives for element i is what the plain key gives for element `offset` + i."""

    offset: int = 0


def shifted(key: int, offset: int) -> int:
    """The key as a piece of a tensor uses it that begins at element `offset`.

    >>> bool((hash32(shifted(7, 5), 0, 3) == hash32(7, 5, 3)).all())
    True
    """
    if offset == 0:
        return key
    found = ShiftedKey(key)
    found.offset = offset_of(key) + offset
    return found


def offset_of(key: int | None) -> int:
    """Elements before the piece that a key belongs to."""
    return key.offset if isinstance(key, ShiftedKey) else 0


def base(key: int, high: int = 0) -> int:
    """The number that element indices are added to: the key hashed first, then the index's bits above 32.

    Hashing `key xor index` instead would give two small keys the same set of numbers in another order.

    Args:
        key: any integer from 0 below 2^64.
        high: element index divided by 2^32.

    Returns:
        32-bit number.

    Raises:
        ValueError: the key is out of range.
    """
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key must be from 0 below 2**64, got {key}")
    return mix32(mix32(mix32((key & MASK) + 0x9E3779B9) + (key >> 32)) + high)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _segments(start: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """(high word, low word of the first index, count) of runs of indices that share their high word."""
    stop = start + numel
    while start < stop:
        end = min(stop, ((start >> 32) + 1) << 32)
        yield start >> 32, start & MASK, end - start
        start = end


def hash32(key: int, start: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """The hashes of elements `start` .. `start + n - 1`: h = mix(base(key) + index).

    Args:
        key: from 0 below 2^64; one for each leaf and step.
        start: index of the first element, not negative.
        n: how many.
        device: where to compute.

    Returns:
        [n] int32 tensor of 32-bit patterns (read as unsigned).

    >>> bool((hash32(7, 5, 3) == hash32(7, 0, 8)[5:]).all())
    True
    """
    if start < 0 or n < 0:
        raise ValueError(f"start and n must not be negative, got {start} and {n}")
    start += offset_of(key)
    out = torch.empty(n, dtype=torch.int32, device=device)
    done = 0
    for high, low, count in _segments(start, n):
        x = out[done : done + count]
        # int64 counts, then a cut to 32 bits: arange in int32 could not pass 2^31
        offset = low + base(key, high)
        torch.arange(offset, offset + count, dtype=torch.int64, device=device, out=(wide := x.to(torch.int64)))
        x.copy_(wide.bitwise_and_(MASK).sub_((wide > 0x7FFFFFFF).to(torch.int64) << 32))
        # int32 multiplication wraps on every device; >> copies the sign, hence the masks
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(_MULTIPLIERS[0]))
        x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(_MULTIPLIERS[1]))
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
        done += count
    return out


def _round(exact: Tensor, noise: Tensor) -> Tensor:
    """fp32 [n] and 16-bit noise int32 [n] to bf16 [n]; integer operations only, so the same everywhere."""
    bits = exact.view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    # A NaN whose payload sits in the low half alone would become an infinity: set its quiet bit.
    special = torch.where((bits & 0x7FFFFF) != 0, bits | 0x400000, bits)
    return torch.where(finite, bits + noise, special).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _round_half(exact: Tensor, noise: Tensor) -> Tensor:
    """The same to fp16 [n], whose numbers lie 2^13 fp32 patterns apart, and 2^-24 below 2^-14. What passes the greatest is infinite."""
    bits = exact.view(torch.int32)
    small = exact.abs() < 2.0**-14
    steps = exact.abs().mul(2.0**24)  # of the subnormal grid
    below = steps.floor()
    up = steps.sub_(below).add_(noise.to(torch.float32).mul_(2.0**-16)) >= 1.0
    fixed = below.add_(up).mul_(2.0**-24).copysign_(exact)
    coarse = (bits + (noise >> 3)).bitwise_and_(~0x1FFF).view(torch.float32)
    return torch.where(exact.isfinite(), torch.where(small, fixed, coarse), exact).to(torch.float16)


_ROUNDS = {torch.bfloat16: _round, torch.float16: _round_half}


@torch.no_grad()
def round_stochastic_(weight: Tensor, exact: Tensor, key: int, start: int = 0) -> None:
    """Write fp32 numbers into a bf16 or fp16 tensor, each rounded up or down at random so that its mean is exact.

    A number at fraction p of the way between two 16-bit neighbours (towards the one of greater magnitude) goes there with probability p:
    for bf16, 16 random bits are added to the fp32 pattern and the low half is cut. NaN and infinities pass unchanged.

    Args:
        weight: bf16 or fp16, any shape. Overwritten.
        exact: fp32, as many elements.
        key: from 0 below 2^64; one for each leaf and step.
        start: index of the first element, when `weight` is a piece of a larger tensor.

    Raises:
        ValueError: wrong dtype or size.
    """
    if weight.dtype not in _ROUNDS or exact.dtype != torch.float32 or weight.numel() != exact.numel():
        raise ValueError(
            f"need a bfloat16 or float16 weight and as many float32 numbers, got {weight.dtype} [{weight.numel()}] "
            f"and {exact.dtype} [{exact.numel()}]"
        )
    target = (
        weight.view(-1)
        if weight.is_contiguous()
        else torch.empty_like(weight, memory_format=torch.contiguous_format).view(-1)
    )
    source = exact.reshape(-1)
    chunk = _CHUNK_CPU if weight.device.type == "cpu" else _CHUNK
    for at in few(range(0, source.numel(), chunk)):
        part = source[at : at + chunk]
        noise = hash32(key, start + at, part.numel(), weight.device).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        target[at : at + chunk].copy_(_ROUNDS[weight.dtype](part, noise))
    if not weight.is_contiguous():
        weight.copy_(target.view(weight.shape))


@torch.no_grad()
def write_stochastic_(weight: Tensor, update: Tensor, *, decay: float, alpha: float, key: int, start: int = 0) -> None:
    """W <- SR(decay * W - alpha * U), the twin of `native.write_stochastic_`.

    Args:
        weight: bf16 or fp16, any shape. Overwritten.
        update: fp32, as many elements: U.
        decay: factor of the old weight, 1 - lr * weight_decay.
        alpha: step size, everything included.
        key: from 0 below 2^64; one for each leaf and step.
        start: index of the first element.
    """
    # Two products and one difference, each rounded: `sub(alpha=)` would fuse a multiplication on some devices only.
    exact = weight.to(torch.float32).mul_(decay).sub_(update.mul(alpha).view(weight.shape))
    round_stochastic_(weight, exact, key, start)
