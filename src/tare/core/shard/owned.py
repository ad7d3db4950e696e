"""Owned: leaves that come together on one rank for the length of their step: what the rounds are, and what they ask of the optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tare.core.shard.apart import Apart, apart_for
from tare.core.shard.exchange import Part, gather, numbers_of_all, scatter
from tare.core.shard.layout import local
from tare.core.shard.places import Place, rounds
from tare.core.state import State
from tare.core.transform import Step, Transform, Work

if TYPE_CHECKING:
    from tare.core.entry import Entry


class Engine(Protocol):
    """What the optimizer does for leaves that ranks share."""

    def whole_work(self, owned: "Owned", weight: Tensor, grad: Tensor) -> Work:
        """The step of a leaf from all its rows; it is counted."""
        ...

    def rows_work(self, owned: "Owned") -> Work:
        """The coming step of this rank's rows, without state; it is not counted."""
        ...

    def coming(self, owned: "Owned") -> tuple[State, Step]:
        """State and coming step of a leaf that this rank owns."""
        ...

    def apply(self, transform: Transform, batch: list[Work]) -> None:
        """Step whole leaves."""
        ...

    def gradient(self, p: Tensor) -> Tensor: ...

    def counted(self, p: Tensor) -> None:
        """A step of this leaf is over that `whole_work` has not counted."""
        ...


@dataclass
class Owned:
    """A leaf with an owner, in one step. rows: this rank's of the weight. apart: how it is stepped apart, where it can be."""

    p: Tensor
    group: dict[str, Any]
    entry: "Entry"
    place: Place
    owner: int
    rows: Tensor
    apart: Apart | None = None
    done: bool = False

    @classmethod
    def of(cls, p: Tensor, group: dict[str, Any], entry: "Entry") -> "Owned":
        place = entry.place
        assert place is not None
        assert place.owner is not None
        apart = apart_for(entry.transform, entry.leaf, entry.slots, place.mesh.layout.size)
        return cls(p, group, entry, place, place.owner, local(p.detach()), apart)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def part(self, rows: Tensor) -> Part:
        return Part(rows, self.place.mesh.shape, self.place.mesh.layout, self.owner)


def step_whole(listed: Sequence[Owned], group: Any, engine: Engine) -> None:
    """Gradient and weight to the owner, the step there, the weight back."""
    for some in rounds(listed):
        weight, grad = _collect(some, group, engine)
        mine = mine_of(some)
        if mine is not None:
            assert weight is not None
            assert grad is not None
            engine.apply(mine.entry.transform, [engine.whole_work(mine, weight, grad)])
        _give_back(some, weight, group, engine)
        del weight, grad  # before the next ones come


def mine_of(some: Sequence[Owned]) -> Owned | None:
    return next((each for each in some if each.place.mine), None)


def _collect(some: Sequence[Owned], group: Any, engine: Engine) -> tuple[Tensor | None, Tensor | None]:
    """Weight and gradient of the leaf that this rank owns."""
    device = some[0].device
    weight = gather([each.part(each.rows) for each in some], group, device)
    grad = gather([each.part(local(engine.gradient(each.p))) for each in some], group, device)
    return weight, grad


def _give_back(some: Sequence[Owned], weight: Tensor | None, group: Any, engine: Engine) -> None:
    scatter([each.part(each.rows) for each in some], weight, group, some[0].device)
    for each in some:
        if not each.place.mine:
            engine.counted(each.p)


def step_together(listed: Sequence[Owned], company: list[Work], group: Any, engine: Engine) -> None:
    """Leaves that share numbers: each owner holds its own ones until everybody's numbers are known."""
    transform: Transform = listed[0].entry.transform
    planned = rounds(listed)
    weights, works = [], []
    for some in planned:
        weight, grad = _collect(some, group, engine)
        weights.append(weight)
        if (mine := mine_of(some)) is not None:
            assert weight is not None
            assert grad is not None
            works.append(engine.whole_work(mine, weight, grad))
    own, beside = transform.listen_many(works), transform.listen_many(company)
    everyone = [*numbers_of_all(own, group, listed[0].device), *beside]
    transform.update_told(works, own, everyone)
    transform.update_told(company, beside, everyone)
    for some, weight in zip(planned, weights, strict=True):
        _give_back(some, weight, group, engine)
