"""Rotating: a leaf that holds state only at its turns. One rule acts on it while its block is on, another, without state, while not.

The block mode of FRUGAL (Zmushko et al. 2025, arXiv 2411.07837) and BAdam (Luo et al. 2024, arXiv 2404.02827) are such pairs; who is
on when is a `Rotation` (`core.blocks`), and the engine carries it out (`core.turns`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from tare.core.blocks import EachLeaf, Rotation
from tare.core.delta import Delta, Dense
from tare.core.errors import InputError, nearest
from tare.core.leaf import Leaf
from tare.core.orders import Ascending, Descending, Fixed, Mirror, Order, Random
from tare.core.southwell import Greedy
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.rules.times import times

ORDERS: dict[str, Callable[[], Order]] = {
    "random": Random, "ascending": Ascending, "descending": Descending, "mirror": Mirror, "fixed": Fixed, "greedy": Greedy,
}  # fmt: skip


def make_order(order: str | Order, **instead: Callable[[], Order]) -> Order:
    """An order from itself or its name. instead: what a name means to this method.

    >>> make_order("greedy", greedy=lambda: Greedy(rule="gs")).rule
    'gs'

    Raises:
        InputError: for an unknown name, with the nearest one.
    """
    if isinstance(order, Order):
        return order
    known = {**ORDERS, **instead}
    if not isinstance(order, str) or order not in known:
        raise InputError(
            f"order: {order!r} is not one of {', '.join(known)}{nearest(str(order), list(known))}; or an Order"
        )
    return known[order]()


@dataclass(frozen=True)
class Still(Transform):
    """Leaves a leaf alone."""

    rests: ClassVar[bool] = True

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        return Dense(grad, 0.0)

    def describe(self) -> str:
        return "-"


@dataclass(frozen=True)
class Rotating(Transform):
    """`active` while the leaf's block is on, else `idle`. At every turn its state is dropped, and starts from nothing with a count of
    0, also where the block stays on.

    Args:
        active: the rule with state.
        idle: a rule without, such as a sign; None leaves the leaf where it is.
        rotation: which leaves are on when.
    """

    active: Transform
    idle: Transform | None
    rotation: Rotation

    @property
    def sharding(self) -> Sharding:  # type: ignore[override]
        return "matrix" if "matrix" in (self.active.sharding, self._rest.sharding) else self.active.sharding

    @property
    def _rest(self) -> Transform:
        return self.idle or Still()

    def turn(self, active: bool) -> Transform:
        return self.active if active else self._rest

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return self.active.spec(leaf)

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        raise NotImplementedError("the engine steps with one of the two")

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        active, why = self.active.resolve(leaf)
        idle, other = self._rest.resolve(leaf)
        if active is self.active and (self.idle is None or idle is self.idle):
            return self, why or other
        return replace(self, active=active, idle=None if self.idle is None else idle), why or other

    def check(self, leaf: Leaf, storage: Any) -> None:
        self.active.check(leaf, storage)
        self._rest.check(leaf, storage)

    def describe(self) -> str:
        return f"{self.active.describe()} | {self._rest.describe()}"

    def rank_for(self, leaf: Leaf) -> int | None:
        return self.active.rank_for(leaf)


def rotating_tensors(
    active: Transform, idle: Transform | None, density: float, period: int = 200, order: str | Order = "descending",
    scale: float = 1.0,
) -> Rotating:  # fmt: skip
    """FRUGAL's blocks: round(density * N) of the N tensors under this transform hold state, the others are stepped by `idle`.

    Args:
        active: the rule with state: Adam, Lion, momentum. Counts from the start of each turn.
        idle: `Stateless(Sign())`, `Stateless()` (SGD), or None.
        density: rho.
        period: updates of a turn, 200 in the paper.
        order: `random` (drawn anew at each turn, as in the code), `ascending`, `descending` (the paper's main runs), `mirror`
            (pairs from both ends), `fixed`, `greedy`, or an `Order` (`Recorded`, `Greedy(...)`).
        scale: multiplies the learning rate of all of them, active and idle, but not the decay.

    >>> from tare.rules.adam import Adam
    >>> rotating_tensors(Adam(), None, 0.5).rotation.on(5)
    2
    """
    rest = None if idle is None else times(idle, scale)
    return Rotating(times(active, scale), rest, Rotation(EachLeaf(), make_order(order), period, share=density))
