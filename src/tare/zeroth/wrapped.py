"""Laws around laws: what a wrapper does not change is the inner law's, in one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec
from tare.zeroth.directions import Draw, Law


@dataclass(frozen=True)
class Wrapped(Law):
    """The directions of `law`, with its state, factors and demands. Subclasses override what they change: mostly `draw`, from which all
    else follows. `fuses` is not passed on: one pass over what the inner law draws would miss the change."""

    law: Law

    @property
    def partial(self) -> bool:  # type: ignore[override]
        return self.law.partial

    @property
    def cuts(self) -> bool:  # type: ignore[override]
        return self.law.cuts and not self.reads_weight

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.law.reads_weight

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return self.law.spec(leaf)

    def prepare(self, draw: Draw, state: State, weight: Tensor) -> None:
        self.law.prepare(draw, state, weight)

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.law.draw(draw, state, weight, start, stop)

    def learn(self, leaf: Leaf, state: State, kept: Mapping[str, float]) -> None:
        self.law.learn(leaf, state, kept)

    def perturbation(self, leaf: Leaf, state: State) -> float:
        return self.law.perturbation(leaf, state)

    def update(self, leaf: Leaf, state: State) -> float:
        return self.law.update(leaf, state)

    def factor(self, leaf: Leaf) -> float:
        return self.law.factor(leaf)

    def describe(self) -> str:
        return self.law.describe()


@dataclass(frozen=True)
class Redrawn(Wrapped):
    """The directions of `law` under other numbers: `meant` says which one stands for which."""

    def meant(self, draw: Draw) -> Draw:
        """The inner law's direction that is this one."""
        raise NotImplementedError

    def prepare(self, draw: Draw, state: State, weight: Tensor) -> None:
        self.law.prepare(self.meant(draw), state, weight)

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.law.draw(self.meant(draw), state, weight, start, stop)

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        self.law.add_(target, self.meant(draw), state, weight, scale, start)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        by_step: dict[int, list[tuple[Draw, float]]] = {}  # a law may gather those of one step together
        for draw, scale in terms:
            meant = self.meant(draw)
            by_step.setdefault(meant.step, []).append((meant, scale))
        for own in by_step.values():
            self.law.gather_(target, own, state, weight, start)
