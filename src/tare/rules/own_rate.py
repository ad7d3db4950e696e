"""OwnRate: a rule that steps at its own multiple of the learning rate, so that one schedule drives rules of different scales."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform, Work


@dataclass(frozen=True)
class OwnRate(Transform):
    """`rule` at lr * ratio, decoupled decay included, through whatever fused path the rule has.

    ratio: e.g. 0.015 for Adam at 3e-4 beside Muon at 0.02.
    """

    rule: Transform
    ratio: float
    sharding: Sharding = "elementwise"  # type: ignore[misc]  # the rule's, see below

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0.0, inclusive=True)
        object.__setattr__(self, "sharding", self.rule.sharding)

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.rule.workspace

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return self.rule.spec(leaf)

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        return self.rule.update(grad, state, step, compressed)

    @property
    def rate(self) -> float:  # type: ignore[override]
        """The engine multiplies the group's learning rate by it, for whatever path the rule takes."""
        return self.ratio

    @property
    def fuses(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.rule.fuses

    def update_many(self, batch: list[Work]) -> list[Work]:
        return self.rule.update_many(batch)

    def check(self, leaf: Leaf, storage: Any) -> None:
        self.rule.check(leaf, storage)

    def describe(self) -> str:
        return f"{self.rule.describe()} at {self.ratio:g} lr"
