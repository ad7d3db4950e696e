"""Layout: which rows of a leaf each rank has, and what of a DTensor the engine may touch.

`fully_shard` cuts dimension 0 as `torch.chunk` does: equal pieces from the front, the last one shorter, and empty ones after it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tare.core.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Rows cut among `size` ranks, seen from one of them.

    >>> [Layout(21, 4, rank).own for rank in range(4)]
    [(0, 6), (6, 12), (12, 18), (18, 21)]
    >>> Layout(1, 2, 1).own
    (1, 1)
    """

    rows: int
    size: int
    rank: int

    def cut(self, rank: int) -> tuple[int, int]:
        """First row of a rank, and the one after its last."""
        each = -(-self.rows // self.size)
        return min(rank * each, self.rows), min((rank + 1) * each, self.rows)

    @property
    def own(self) -> tuple[int, int]:
        return self.cut(self.rank)

    @property
    def counts(self) -> list[int]:
        """Rows of every rank."""
        return [stop - start for start, stop in map(self.cut, range(self.size))]


def is_sharded(p: object) -> bool:
    """Whether a tensor is a DTensor, as parameters are after `fully_shard`. By its name: who uses none need not import it."""
    return type(p).__name__ == "DTensor"


def local(tensor: Any) -> Any:
    """This rank's piece of a DTensor, sharing its memory; anything else as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def distributed(piece: Tensor, shape: tuple[int, ...], device_mesh: Any, placements: Any) -> Tensor:
    """A DTensor from this rank's piece of it, of a shape that is stated and not asked of the other ranks."""
    from torch.distributed.tensor import DTensor

    whole = torch.empty(shape, device="meta")
    found: Tensor = DTensor.from_local(
        piece, device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return found


def summed(number: Tensor, cut: Any) -> Tensor:
    """The sum, over the ranks among which a DTensor is cut, of what each has found of its own piece."""
    for at, place in enumerate(cut.placements):
        if place.is_shard():
            dist.all_reduce(number, group=cut.device_mesh.get_group(at))
    return number


@dataclass(frozen=True)
class Mesh:
    """The ranks among which one leaf is cut, and all that is needed to make DTensors that lie like it."""

    layout: Layout
    shape: tuple[int, ...]
    group: Any  # ProcessGroup
    device_mesh: Any
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, p: Any) -> "Mesh":
        """Of a parameter. Raises InputError unless exactly its dimension 0 is cut, and along one dimension of the mesh."""
        from torch.distributed.tensor import Replicate, Shard

        cut = [at for at, place in enumerate(p.placements) if not isinstance(place, Replicate)]
        if len(cut) != 1 or type(p.placements[cut[0]]) is not Shard or p.placements[cut[0]].dim != 0:
            raise InputError(
                f"{name}: lies across ranks as {p.placements}; supported is what fully_shard makes by default: cut along dimension 0 "
                "(Shard(0)), replicated along the mesh's other dimensions (HSDP)"
            )
        group = p.device_mesh.get_group(cut[0])
        layout = Layout(p.shape[0], dist.get_world_size(group), dist.get_rank(group))
        return cls(layout, tuple(p.shape), group, p.device_mesh, tuple(p.placements))

    @property
    def own_shape(self) -> tuple[int, ...]:
        start, stop = self.layout.own
        return (stop - start, *self.shape[1:])

    @property
    def offset(self) -> int:
        """Elements of the leaf before this rank's first."""
        return self.layout.own[0] * math.prod(self.shape[1:])

    def wrap(self, piece: Tensor, shape: tuple[int, ...]) -> Tensor:
        """This rank's piece of a tensor of that shape, as a DTensor that lies like the leaf."""
        return distributed(piece, shape, self.device_mesh, self.placements)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor whose dimension 0 lies like the leaf's."""
        start, stop = Layout(whole.shape[0], self.layout.size, self.layout.rank).own
        return whole[start:stop]
