"""Counter-based randomness: every number is a pure function of (key, element index).

Integers are mixed with 32-bit arithmetic that every device does alike; normals are two table look-ups added, so there is nothing whose
rounding could differ. No global generator is read or moved.
"""

import functools
import hashlib
import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tare.core.tensors import is_fake
from tare.kernels.paper import few
from tare.kernels.rounding import hash32, mix32, offset_of, shifted

__all__ = ["bits", "make_key", "normal", "shifted"]

_CHUNK = 1 << 18  # elements mixed at once: keeps the int64 temporaries at 2 MiB
_MASK = 0xFFFFFFFF


def make_key(seed: int, name: str, number: int = 0) -> int:
    """A 64-bit key from (seed, name, number).

    >>> make_key(0, "w", 1) != make_key(0, "w", 2)
    True
    """
    text = f"{int(seed)}\x00{name}\x00{number}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return shifted(key, offset_of(seed))  # what is drawn from a piece's key belongs to the same piece


def _mix(x: Tensor) -> Tensor:
    """`mix32` of every element, in int64 lanes."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def bits(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for the elements start .. start + count - 1, as int64 in [0, 2^32).

    Two rounds with two key words: streams of different keys are no shifted copies of one another.
    """
    first = hash32(key, start, count, device).to(torch.int64) & _MASK
    return _mix((first + mix32(key >> 32)) & _MASK)


def _table(like: Tensor) -> Tensor:
    """The table beside `like`; a real one under fake tensors too, since it is kept and they would outlive their mode."""
    with unset_fake_temporarily() if is_fake(like) else nullcontext():
        return _quantiles(str(like.device))


@functools.lru_cache(maxsize=8)
def _quantiles(device: str) -> Tensor:
    """Standard normal quantiles at (i + 1/2) / 65536, scaled so that the sum of two has unit variance."""
    p = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    z = torch.special.ndtri(p)
    z = z / (z.square().mean().sqrt() * math.sqrt(2.0))
    return z.to(torch.float32).to(device)


def normal(
    key: int, shape: tuple[int, ...], device: torch.device | str = "cpu", scale: float = 1.0, start: int = 0
) -> Tensor:
    """Standard normals times `scale`, float32, the same on every device: elements from `start` on. Support ends near +-6.

    >>> normal(7, (2, 3)).equal(normal(7, (2, 3)))
    True
    """
    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    table = _table(out)
    for first in few(range(0, out.numel(), _CHUNK)):
        count = min(_CHUNK, out.numel() - first)
        word = bits(key, start + first, count, out.device)
        part = table.index_select(0, word & 0xFFFF).add_(table.index_select(0, word >> 16))
        out[first : first + count] = part.mul_(scale) if scale != 1.0 else part
    return out.view(shape)
