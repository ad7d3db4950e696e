"""Times: a rule whose direction is multiplied by a constant, while decoupled decay keeps the learning rate as it is."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta, Dense
from tare.core.lazy import Mapped
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform, Work


@dataclass(frozen=True)
class Times(Transform):
    """U = factor * U of `rule`: FRUGAL's scale of what it projects (arXiv 2411.07837). `OwnRate` multiplies the decay too.

    >>> from tare.rules.adam import Adam
    >>> times(Adam(), 1.0)
    Adam(betas=(0.9, 0.999), eps=1e-08, eps_placement='after')
    """

    rule: Transform
    factor: float

    def __post_init__(self) -> None:
        check_number("scale", self.factor)

    @property
    def sharding(self) -> Sharding:  # type: ignore[override]
        return self.rule.sharding

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.rule.reads_weight

    @property
    def fuses(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.rule.fuses

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return self.rule.spec(leaf)

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        delta = self.rule.update(grad, state, step, compressed)
        if isinstance(delta, Dense):
            return replace(delta, scale=delta.scale * self.factor)
        return Mapped(delta, lambda u: u, tuple(grad.shape), self.factor, by_rows=True, lr_inside=delta.scaled)

    def update_many(self, batch: list[Work]) -> list[Work]:
        """The fused paths know one rate: lr * factor, with the decay divided by it again."""
        rated = [self._rated(work) for work in batch]
        left = {id(work) for work in self.rule.update_many(rated)}
        return [work for work, new in zip(batch, rated, strict=True) if id(new) in left]

    def _rated(self, work: Work) -> Work:
        step = replace(work.step, lr=work.step.lr * self.factor)
        return replace(work, step=step, weight_decay=work.weight_decay / self.factor)

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        rule, why = self.rule.resolve(leaf)
        return (self if rule is self.rule else replace(self, rule=rule)), why

    def check(self, leaf: Leaf, storage: Any) -> None:
        self.rule.check(leaf, storage)

    def describe(self) -> str:
        return f"{self.factor:g} {self.rule.describe()}"

    def rank_for(self, leaf: Leaf) -> int | None:
        return self.rule.rank_for(leaf)


def times(rule: Transform, factor: float) -> Transform:
    """`rule`, or `Times` of it where the factor is not 1."""
    return rule if factor == 1.0 else Times(rule, factor)
