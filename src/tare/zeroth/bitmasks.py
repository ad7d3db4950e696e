"""Bit masks: which elements of a flat leaf, one bit each. Bit i of byte b is element 8 b + i."""

import torch
from torch import Tensor


def packed_numel(numel: int) -> int:
    """Bytes for as many bits."""
    return -(-numel // 8)


def pack_bits(mask: Tensor) -> Tensor:
    """[n] bool -> [ceil(n / 8)] uint8.

    >>> pack_bits(torch.tensor([True, False, True])).tolist()
    [5]
    """
    n = mask.numel()
    bits = mask.view(torch.uint8)
    if n % 8:
        bits = torch.cat([bits, bits.new_zeros(8 - n % 8)])
    out = bits.new_zeros(packed_numel(n))
    for place, column in enumerate(bits.view(-1, 8).unbind(1)):
        out.bitwise_or_(column << place)
    return out


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The mask again: [numel] bool.

    >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
    [True, False, True]
    """
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> places) & 1
    return bits.view(-1)[:numel].view(torch.bool)
