"""Two 4-bit codes a byte: how they lie. Shared by the 4-bit moments (`fourbit`) and the 4-bit bases (`groupwise`).

Within a block of `width` elements, byte i holds element i in its low half and element i + width / 2 in its high half: a vector of bytes
becomes two vectors of consecutive elements by one mask and one shift, with no shuffle. A partial last block of w elements is halved at
ceil(w / 2); the high half of an odd block's last byte is 0. So n elements take ceil(n / 2) bytes, whatever the width.
"""

import torch
from torch import Tensor


def packed_numel(numel: int) -> int:
    """Bytes that `numel` 4-bit codes take."""
    return -(-numel // 2)


def _check(numel: int, packed: Tensor, width: int) -> None:
    if width < 2 or width % 2:
        raise ValueError(f"blocks of 4-bit codes need an even, positive width, got {width}")
    if packed.dtype != torch.uint8 or packed.numel() != packed_numel(numel):
        raise ValueError(
            f"{numel} 4-bit codes need {packed_numel(numel)} uint8 bytes, got {packed.numel()} of {packed.dtype}"
        )


def pack(codes: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """Pack codes two a byte.

    Args:
        codes: [n] uint8, each from 0 to 15.
        width: elements to a block, even.
        out: [ceil(n / 2)] uint8, contiguous; written instead of a new tensor.

    Returns:
        [ceil(n / 2)] uint8.

    Raises:
        ValueError: odd width, wrong sizes or dtypes.

    >>> pack(torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8), 4).tolist()
    [49, 66, 5]
    """
    n = codes.numel()
    if out is None:
        out = codes.new_empty(packed_numel(n))
    _check(n, out, width)
    full, half = n // width * width, width // 2
    pairs = codes[:full].view(-1, 2, half)
    torch.bitwise_or(pairs[:, 0], pairs[:, 1] << 4, out=out[: full // 2].view(-1, half))
    if full < n:
        middle = full + packed_numel(n - full)
        tail = out[full // 2 :]
        tail.copy_(codes[full:middle])
        tail[: n - middle].bitwise_or_(codes[middle:] << 4)
    return out


def unpack(packed: Tensor, numel: int, width: int) -> Tensor:
    """The codes again.

    Args:
        packed: [ceil(numel / 2)] uint8.
        numel: how many codes.
        width: elements to a block; the one used to pack.

    Returns:
        [numel] uint8, each from 0 to 15.

    Raises:
        ValueError: odd width, wrong sizes or dtypes.

    >>> unpack(torch.tensor([49, 66, 5], dtype=torch.uint8), 5, 4).tolist()
    [1, 2, 3, 4, 5]
    """
    _check(numel, packed, width)
    out = packed.new_empty(numel)
    full, half = numel // width * width, width // 2
    pairs, bytes_ = out[:full].view(-1, 2, half), packed[: full // 2].view(-1, half)
    torch.bitwise_and(bytes_, 15, out=pairs[:, 0])
    torch.bitwise_right_shift(bytes_, 4, out=pairs[:, 1])
    if full < numel:
        middle = full + packed_numel(numel - full)
        tail = packed[full // 2 :]
        torch.bitwise_and(tail, 15, out=out[full:middle])
        torch.bitwise_right_shift(tail[: numel - middle], 4, out=out[middle:])
    return out
