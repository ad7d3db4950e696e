"""Digests of weights: whether a model is, bit for bit, the one that a log speaks of."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tare.core.shard.layout import is_sharded

if TYPE_CHECKING:
    from tare.zeroth.optimizer import ForwardOptimizer


def digests(optimizer: "ForwardOptimizer", *, shared: bool = True) -> dict[str, bytes]:
    """blake2b of the bytes of every leaf, by name.

    shared: also of leaves that `fully_shard` has cut, whose rows all ranks gather for it at the same time.
    """
    optimizer.flush()
    found = [(entry.leaf.name, p.detach()) for p, entry in optimizer._entries.items()]
    return {name: digest_of(p) for name, p in found if shared or not is_sharded(p)}


def digest_of(tensor: Tensor) -> bytes:
    """16 bytes of blake2b over a tensor's own bytes, row-major; of one made of others, over theirs.

    >>> digest_of(torch.zeros(3)) == digest_of(torch.zeros(3)), digest_of(torch.zeros(3)) == digest_of(-torch.zeros(3))
    (True, False)
    """
    found = hashlib.blake2b(digest_size=16)
    tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    for part in parts(tensor):
        flat = part.contiguous().view(-1)
        for piece in flat.split(1 << 24):
            found.update(piece.cpu().view(torch.uint8).numpy().data)
    return found.digest()


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that one is made of: itself, or those inside."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    else:
        yield tensor.detach()


def combined(found: dict[str, bytes]) -> bytes:
    """One digest of all leaves."""
    return hashlib.blake2b(b"".join(found.values()), digest_size=16).digest()
