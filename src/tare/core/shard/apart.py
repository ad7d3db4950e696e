"""Apart: steps of a leaf that are made of what ranks say of their own rows, so that neither its gradient nor its weight travels.

Each rank tells of its rows (a projection, norms of channels), the owner decides (the rule, on sums that are small), and each rank forms
and writes its rows of the update. A transform that can be taken apart says so by `Transform.apart`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from tare.core.delta import Delta
from tare.core.leaf import Leaf
from tare.core.shard.exchange import all_to_all, as_bytes
from tare.core.shard.layout import Layout
from tare.core.state import State
from tare.core.storage import LOW, MASTER, Slot
from tare.core.transform import Step, Transform

_ALIGN = 16  # bytes: whatever begins there may be seen in any dtype


@dataclass(frozen=True)
class Piece:
    """A tensor between owner and ranks.

    shape: of the whole. how: `rows`: each rank has to do with its rows of it, cut like the leaf; `same`: with all of it, and what
    ranks tell of it is summed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    how: Literal["rows", "same"]

    def of(self, layout: Layout, rank: int) -> tuple[int, ...]:
        """The shape that a rank has to do with."""
        if self.how == "same":
            return self.shape
        start, stop = layout.cut(rank)
        return (stop - start, *self.shape[1:])

    def nbytes(self, layout: Layout, rank: int) -> int:
        """Of that, padded."""
        return -(-math.prod(self.of(layout, rank)) * self.dtype.itemsize // _ALIGN) * _ALIGN


class Apart(Protocol):
    """How one leaf is stepped apart. `rows` below are a rank's rows of the gradient, [m_i, n]."""

    @property
    def basis(self) -> Piece:
        """What ranks must hold before they can tell; the owner sends it when it changes."""
        ...

    @property
    def up(self) -> tuple[Piece, ...]: ...

    @property
    def down(self) -> tuple[Piece, ...]: ...

    def hold(self, state: State, step: Step) -> Tensor:
        """The basis, whole."""
        ...

    def tell(self, rows: Tensor, basis: Tensor) -> Sequence[Tensor]:
        """What the owner needs to know of these rows: as `up` says."""
        ...

    def decide(self, told: Sequence[Tensor], state: State, step: Step) -> Sequence[Tensor]:
        """The owner's part: state is stepped. As `down` says."""
        ...

    def form(self, rows: Tensor, basis: Tensor, decided: Sequence[Tensor]) -> Delta:
        """These rows of the update."""
        ...


def apart_for(transform: Transform, leaf: Leaf, slots: dict[str, Slot], size: int) -> Apart | None:
    """How a leaf with an owner is stepped apart among `size` ranks; None where it comes together.

    It does where that sends less: `same` pieces go to every rank, so that a sum over rows [r, n] costs size r n, beside 3 m n for gradient
    and weight there and weight back. It also does where the weight's form keeps a part of it with the owner.
    """
    if transform.together or LOW in slots or MASTER in slots:
        return None
    found = transform.apart(leaf, slots)
    if found is None:
        return None
    pieces = (*found.up, *found.down)
    sent = sum(
        math.prod(each.shape) * each.dtype.itemsize * (size if each.how == "same" else 1) for each in pieces
    )  # fmt: skip
    return found if sent < 3 * leaf.numel * leaf.dtype.itemsize else None


@dataclass(frozen=True)
class Message:
    """One leaf's part of an exchange: what is sent, how the leaf lies, who owns it."""

    pieces: tuple[Piece, ...]
    layout: Layout
    owner: int

    def nbytes(self, rank: int) -> int:
        """What a rank has to do with."""
        return sum(piece.nbytes(self.layout, rank) for piece in self.pieces)


def ask(
    messages: Sequence[Message], told: Sequence[Sequence[Tensor]], group: Any, device: torch.device
) -> list[Tensor] | None:
    """Send what this rank tells of its rows to the owners. Returns what all have told of the leaf that this rank owns: summed, or
    row by row; None where it owns none. At most one message for each owner."""
    layout = messages[0].layout
    packed = {
        each.owner: _pack(_checked(each, tensors, layout.rank)) for each, tensors in zip(messages, told, strict=True)
    }
    mine = next((each for each in messages if each.owner == layout.rank), None)
    sizes = [0 if mine is None else mine.nbytes(rank) for rank in range(layout.size)]
    got = all_to_all([packed.get(rank) for rank in range(layout.size)], sizes, group, device)
    if mine is None:
        return None
    parts = [_unpack(each, mine, rank) for rank, each in enumerate(got.split(sizes))]
    found = []
    for number, piece in enumerate(mine.pieces):
        every = [part[number] for part in parts]
        if piece.how == "rows":
            found.append(torch.cat(every))
        else:
            total = every[0].clone()
            for other in every[1:]:
                total += other
            found.append(total)
    return found


def answer(
    messages: Sequence[Message], decided: Sequence[Tensor] | None, group: Any, device: torch.device
) -> list[list[Tensor]]:
    """Send what this rank has decided for the leaf that it owns, None where it owns none. Returns this rank's part of every message."""
    layout = messages[0].layout
    out: list[Tensor | None] = [None] * layout.size
    mine = next((each for each in messages if each.owner == layout.rank), None)
    if mine is not None:
        assert decided is not None
        for rank in range(layout.size):
            rows = slice(*mine.layout.cut(rank))
            parts = [t[rows] if piece.how == "rows" else t for piece, t in zip(mine.pieces, decided, strict=True)]
            out[rank] = _pack(_checked(mine, parts, rank))
    by_owner = {each.owner: each for each in messages}
    sizes = [by_owner[rank].nbytes(layout.rank) if rank in by_owner else 0 for rank in range(layout.size)]
    got = all_to_all(out, sizes, group, device).split(sizes)
    return [_unpack(got[each.owner], each, layout.rank) for each in messages]


def _checked(message: Message, tensors: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
    """The tensors, if they are what the pieces say: ranks reckon with it."""
    for piece, tensor in zip(message.pieces, tensors, strict=True):
        if (tuple(tensor.shape), tensor.dtype) != (piece.of(message.layout, rank), piece.dtype):
            raise TypeError(f"a piece of {piece} for rank {rank} is {tuple(tensor.shape)} {tensor.dtype}")
    return tensors


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """As bytes, each at a multiple of 16."""
    flat = []
    for tensor in tensors:
        data = as_bytes(tensor)
        flat += [data, data.new_zeros(-data.numel() % _ALIGN)]
    return torch.cat(flat)


def _unpack(data: Tensor, message: Message, rank: int) -> list[Tensor]:
    found, start = [], 0
    for piece in message.pieces:
        shape = piece.of(message.layout, rank)
        size = math.prod(shape) * piece.dtype.itemsize
        found.append(data[start : start + size].view(piece.dtype).view(shape))
        start += piece.nbytes(message.layout, rank)
    return found


def flags_of_all(own: Sequence[int], counts: Sequence[int], group: Any, device: torch.device) -> list[list[int]]:
    """Small whole numbers of every rank. counts: how many each has, which all know."""
    most = max(counts, default=0)
    if most == 0:
        return [[] for _ in counts]
    mine = torch.zeros(most, dtype=torch.uint8, device=device)
    mine[: len(own)] = torch.tensor(own, dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(rows, mine, group=group)
    return [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]
