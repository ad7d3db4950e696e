"""Side: what an optimizer does for leaves that ranks share, as `core.shard.owned.Engine` asks it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from tare.core.shard import sharding
from tare.core.shard.owned import Owned
from tare.core.state import State
from tare.core.transform import Step, Transform, Work

if TYPE_CHECKING:
    from tare.core.optimizer import Optimizer


class Side:
    """One optimizer, seen by its rounds."""

    def __init__(self, optimizer: "Optimizer"):
        self._optimizer = optimizer

    def whole_work(self, owned: Owned, weight: Tensor, grad: Tensor) -> Work:
        self._moved()
        return self._optimizer._work(owned.p, owned.entry, owned.group, whole=(weight, grad))

    def rows_work(self, owned: Owned) -> Work:
        """Its state stays with the owner: only how the weight is written is of use here."""
        place = owned.place
        raw = {"step": self._optimizer._raw(owned.p, owned.entry)["step"]}
        work = self._optimizer._work(
            owned.p, replace(owned.entry, place=replace(place, owner=None)), owned.group, raw=raw
        )
        work.state = State({}, owned.entry.slots)
        return work

    def coming(self, owned: Owned) -> tuple[State, Step]:
        raw = self._optimizer._raw(owned.p, owned.entry)
        step = self._optimizer._step_of(owned.p, owned.entry, owned.group, raw["step"] + 1)
        return sharding.view(owned.entry, raw, step.random_key(step.count, "state")), step

    def apply(self, transform: Transform, batch: list[Work]) -> None:
        self._optimizer._step_batch(transform, batch)

    def gradient(self, p: Tensor) -> Tensor:
        return self._optimizer._gradient(p)

    def counted(self, p: Tensor) -> None:
        self._moved()
        self._optimizer._raw(p, self._optimizer._entries[p])["step"] += 1

    def _moved(self) -> None:
        if self._optimizer._turns:
            self._optimizer._turns.moved()
