"""Shares: what one rank keeps and needs of an optimizer whose leaves are cut among several (FSDP2), and what they send for it.

A leaf stepped where it lies has its rows of state on every rank, one with an owner all of it on one rank: `core.shard.places` decides,
here as in a run. How a leaf with an owner is stepped, together or apart, its transform says, here as in a run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tare.core.leaf import Leaf
from tare.core.optimizer import Optimizer
from tare.core.shard.apart import Apart, Piece, apart_for
from tare.core.shard.layout import Layout, Mesh
from tare.core.shard.places import Place, owned_by, rounds, steps_where_it_lies
from tare.core.storage import Slot
from tare.core.write import CHUNK
from tare.plan.profile import Moment
from tare.plan.steps import StepCost


@dataclass(frozen=True)
class Share:
    """What one rank of a group keeps and needs of an optimizer.

    held: bytes of bases that ranks hold beside the state, to tell owners of their rows. ordinary, refresh: what a step needs beyond
    weights, gradients, state and these.
    """

    rank: int
    state: int
    held: int = 0
    ordinary: Moment = field(default_factory=Moment)
    refresh: Moment = field(default_factory=Moment)


@dataclass(frozen=True)
class Trip:
    """What is sent in a step for leaves with owners. bytes: in all; busiest: by the rank with most to send; count: of all-to-alls."""

    count: int = 0
    bytes: int = 0
    busiest: int = 0


@dataclass(frozen=True)
class Shares:
    """Of all ranks: the first, and the one that needs most; and what leaves with owners cost in communication.

    states: bytes of every rank. whole: gradients and weights that travel in an ordinary step, and told: sums and decisions of leaves
    that are stepped apart; anew: gradients and weights that travel when all bases are computed.
    """

    first: Share
    worst: Share
    states: tuple[int, ...]
    whole: Trip
    told: Trip
    anew: Trip


@dataclass
class _Kind:
    """Leaves that are alike, all stepped where they lie."""

    leaf: Leaf
    slots: Mapping[str, Slot]
    names: list[str]


@dataclass(frozen=True)
class _Owned:
    """A leaf with an owner. state: its bytes. apart: how it is stepped apart in an ordinary step; drawn: also when its basis is new."""

    leaf: Leaf
    state: int
    together: bool
    apart: Apart | None
    drawn: bool
    owner: int = 0

    @property
    def bytes(self) -> int:
        return self.leaf.numel * self.leaf.dtype.itemsize

    def rows(self, size: int, rank: int) -> int:
        """Bytes of a rank's rows."""
        start, stop = Layout(self.leaf.shape[0], size, rank).own
        return (stop - start) * (self.leaf.numel // max(self.leaf.shape[0], 1)) * self.leaf.dtype.itemsize


class _Book:
    """The places of an optimizer's leaves among `size` ranks."""

    def __init__(self, optimizer: Optimizer, size: int) -> None:
        self.size = size
        self.kinds: dict[Any, _Kind] = {}
        self.whole = 0  # bytes of state of leaves without rows, which every rank has
        owned: list[_Owned] = []
        known: dict[Any, bool] = {}
        kept = {row.leaf.name: row.slots for row in optimizer._rows()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                entry = optimizer._entries[p]
                leaf, slots = entry.leaf, kept.get(entry.leaf.name, {})
                if not leaf.shape:
                    self.whole += sum(slot.bytes for slot in slots.values())
                    continue
                phases = [optimizer.storage.slots(leaf, transform.spec(leaf)) for transform in entry.phases]
                laws = tuple(transform.sharding for transform in entry.phases)
                key = leaf.shape, leaf.dtype, laws, tuple(tuple(x.items()) for x in (*phases, slots))
                if key not in known:
                    known[key] = all(steps_where_it_lies(entry.phases, x, leaf, size) for x in phases)
                if known[key]:
                    self.kinds.setdefault(key, _Kind(leaf, slots, [])).names.append(leaf.name)
                    continue
                transform = entry.transform
                apart = apart_for(transform, leaf, entry.slots, size)
                state = sum(slot.bytes for slot in slots.values())
                owned.append(_Owned(leaf, state, transform.together, apart, transform.drawn))
        owners = owned_by([each.leaf for each in owned], size)
        self.owned = [replace(each, owner=owner) for each, owner in zip(owned, owners, strict=True)]
        self._rows: dict[Any, int] = {}

    def states(self) -> list[int]:
        """Bytes of every rank."""
        found = [self.whole] * self.size
        for key, kind in self.kinds.items():
            for rank in range(self.size):
                found[rank] += len(kind.names) * self._piece(key, kind, rank)
        for each in self.owned:
            found[each.owner] += each.state
        return found

    def _piece(self, key: Any, kind: _Kind, rank: int) -> int:
        layout = Layout(kind.leaf.shape[0], self.size, rank)
        start, stop = layout.own
        if (key, stop - start) not in self._rows:
            place = Place(Mesh(layout, kind.leaf.shape, None, None, ()))
            self._rows[key, stop - start] = sum(slot.bytes for slot in place.slots(kind.slots).values())
        return self._rows[key, stop - start]

    def held(self, rank: int) -> int:
        """Bytes of bases."""
        return sum(self._of((each.apart.basis,), each.leaf, rank) for each in self.owned if each.apart is not None)

    def sorts(self, anew: bool) -> tuple[list[list[_Owned]], list[list[_Owned]], list[list[_Owned]]]:
        """Rounds of leaves that come together alone, of those that do so together, of those stepped apart. anew: bases are computed."""
        apart = [each for each in self.owned if each.apart is not None and (each.drawn or not anew)]
        rest = [each for each in self.owned if each not in apart]
        return (
            rounds([each for each in rest if not each.together]), rounds([each for each in rest if each.together]), rounds(apart)
        )  # fmt: skip

    def step(self, rank: int, temporaries: Mapping[str, int], anew: bool) -> Moment:
        """The highest moment of a step on one rank, beyond weights, gradients, state and the bases that it holds."""
        alone, together, apart = self.sorts(anew)
        moments = [
            Moment(temporaries=self._lying(rank, temporaries)),
            *self._coming(rank, alone, temporaries, False), *self._coming(rank, together, temporaries, True),
            *self._telling(rank, apart, temporaries),
        ]  # fmt: skip
        return max(moments, key=lambda moment: moment.total)

    def _lying(self, rank: int, temporaries: Mapping[str, int]) -> int:
        """Of leaves stepped where they lie: chunks, of what this rank has."""
        most = 0
        for kind in self.kinds.values():
            start, stop = Layout(kind.leaf.shape[0], self.size, rank).own
            width = kind.leaf.numel // max(kind.leaf.shape[0], 1)
            share = min((stop - start) * width, CHUNK) / max(min(kind.leaf.numel, CHUNK), 1)
            most = max(most, *(int(temporaries.get(name, 0) * share) for name in kind.names))
        return most

    def _coming(
        self, rank: int, planned: list[list[_Owned]], temporaries: Mapping[str, int], together: bool
    ) -> list[Moment]:
        """Rows on their way, beside what the round before has left; the step on whole weight and gradient; the rows on their way back."""
        held = 0  # weights and gradients of earlier rounds
        moments: list[Moment] = []
        for some in planned:
            mine = next((each for each in some if each.owner == rank), None)
            sent = sum(each.rows(self.size, rank) for each in some)
            own = 0 if mine is None else mine.bytes
            extra = 0 if mine is None else temporaries.get(mine.leaf.name, 0)
            before = held if together else 0
            moments.append(Moment(gathered=held + 2 * own + sent))
            moments.append(Moment(temporaries=extra, gathered=before + 2 * own))
            moments.append(Moment(gathered=before + 3 * own + sent))
            held = held + 2 * own if together else 0
        return moments

    def _telling(self, rank: int, planned: list[list[_Owned]], temporaries: Mapping[str, int]) -> list[Moment]:
        """What this rank tells of its rows, packed and on its way; what it decides as owner, a copy for each rank."""
        moments: list[Moment] = []
        for some in planned:
            mine = next((each for each in some if each.owner == rank), None)
            told, back = (sum(self._of(self._messages(each)[at], each.leaf, rank) for each in some) for at in (0, 1))
            got, sent = (0, 0) if mine is None else (self._sum(m, mine.leaf) for m in self._messages(mine))
            extra = 0 if mine is None else temporaries.get(mine.leaf.name, 0)
            moments.append(Moment(gathered=3 * told + got))
            moments.append(Moment(temporaries=extra, gathered=told + got))
            moments.append(Moment(gathered=2 * told + got + 2 * sent + back))
        return moments

    @staticmethod
    def _messages(each: _Owned) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        assert each.apart is not None
        return each.apart.up, each.apart.down

    def _of(self, pieces: Sequence[Piece], leaf: Leaf, rank: int) -> int:
        """Bytes that a rank has to do with."""
        layout = Layout(leaf.shape[0], self.size, rank)
        return sum(piece.nbytes(layout, rank) for piece in pieces)

    def _sum(self, pieces: Sequence[Piece], leaf: Leaf) -> int:
        """Bytes that all ranks have to do with."""
        del leaf
        return sum(
            math.prod(piece.shape) * piece.dtype.itemsize * (self.size if piece.how == "same" else 1)
            for piece in pieces
        )

    def trips(self) -> tuple[Trip, Trip, Trip]:
        """Gradients and weights in an ordinary step; sums and decisions; gradients and weights where bases are computed."""
        found = []
        for anew in (False, True):
            alone, together, _ = self.sorts(anew)
            planned = [*alone, *together]
            total = 3 * sum(each.bytes for some in planned for each in some)
            found.append(Trip(3 * len(planned), total, 3 * sum(max(each.bytes for each in some) for some in planned)))
        _, _, apart = self.sorts(False)
        sums = [[sum(self._sum(m, each.leaf) for m in self._messages(each)) for each in some] for some in apart]
        told = Trip(2 * len(apart), sum(map(sum, sums)), sum(map(max, sums)))
        return found[0], told, found[1]


def shares(optimizer: Optimizer, cost: StepCost, size: int) -> Shares:
    """What ranks keep and need of an optimizer whose leaves are cut among `size` of them.

    Args:
        optimizer: of the whole model, on paper. cost: of its steps on one rank.
    """
    book = _Book(optimizer, size)
    states = book.states()
    shared = optimizer.state_bytes().shared

    def share(rank: int) -> Share:
        steps = book.step(rank, cost.ordinary, False), book.step(rank, cost.refresh, True)
        return Share(rank, states[rank] + shared, book.held(rank), *steps)

    candidates = range(size) if size <= 16 else sorted({0, size - 1, max(range(size), key=lambda r: states[r])})
    found = [share(rank) for rank in candidates]
    worst = max(found, key=lambda s: s.state + s.held + max(s.ordinary.total, s.refresh.total))
    return Shares(found[0], worst, tuple(states), *book.trips())


def refused(optimizer: Optimizer, release: bool, size: int) -> str:
    """Why the leaves of a method cannot be cut among ranks, or nothing."""
    for entry in optimizer._entries.values():
        rotation = entry.rotating.rotation if entry.rotating is not None else None
        if rotation is not None and rotation.order.scored:
            return f"the order {rotation.order.describe()} compares whole gradients: no --parallel fsdp"
    if release and _Book(optimizer, size).owned:
        return "steps whole matrices, which are never whole in backward: no --release with --parallel fsdp"
    return "int8 weights cannot be cut: no --parallel fsdp" if optimizer.storage.weight == "int8" else ""
