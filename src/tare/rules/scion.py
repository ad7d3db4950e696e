"""Scion's rule (Pethick et al. 2025, arXiv 2502.07529): an averaged gradient through the oracle of a norm ball. And its noise-adaptive
relative LANTON (Hao et al. 2025, arXiv 2510.14009): layers of a group with more gradient noise step less.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tare.core.checks import check_betas, check_number
from tare.core.clipping import numbers_of
from tare.core.delta import Delta, Dense
from tare.core.lazy import Mapped
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.tensors import is_fake
from tare.core.transform import Sharding, StateSpec, Step, Transform, Work
from tare.core.write import update_leaf
from tare.rules.lmo import Norm
from tare.rules.matrices import as_matrix


@dataclass(frozen=True)
class Scion(Transform):
    """B = (1-a) B + a G; U = scale * lmo(B). With decay 1 W stays in the ball of radius `scale` (a Frank-Wolfe step).

    averaging: a, one minus the usual momentum factor; 1 keeps no state.
    """

    norm: Norm
    averaging: float = 0.1
    scale: float = 1.0
    sharding: ClassVar[Sharding] = "matrix"

    def __post_init__(self) -> None:
        check_number("averaging", self.averaging)
        check_number("averaging", 1.0 - self.averaging, 0.0, inclusive=True)
        check_number("scale", self.scale, 0.0, inclusive=True)

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.norm.workspace

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(leaf.shape)} if self.averaging < 1.0 else {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        return self.step_by(grad, state, step, self.averaging, self.scale)

    def step_by(self, grad: Tensor, state: State, step: Step, a: float, scale: float) -> Dense | Mapped:
        """The update with another averaging and scale."""
        leaf, scale = step.leaf, scale * self.norm.radius(step.leaf)
        source = grad
        if "momentum_buffer" in state:
            source = state["momentum_buffer"]
            source.mul_(1.0 - a).add_(grad, alpha=a)
        if (
            self.norm.elementwise and grad.ndim and grad.device.type == "cpu"
        ):  # mapped as it is written, by blocks of rows
            x = as_matrix(source, leaf)
            return Mapped(Dense(x), lambda part: self.norm.map_of(part, leaf), tuple(x.shape), scale, by_rows=True)
        x = source.to(self.norm.working_dtype(leaf.compute_dtype), copy=True)
        return Dense(self.norm.map_of(x.contiguous(), leaf).view(grad.shape), scale=scale)

    def describe(self) -> str:
        return f"scion, {self.norm.describe()}"


@dataclass(frozen=True)
class Lanton(Transform):
    """Scion at lr sqrt(a_l / a_max), a_l = alpha / sqrt(alpha^2 + H_l), H_l = b2 H_l + (1-b2) |G - G_previous|_dual^2.

    a_max is over the leaves that are stepped together by this transform, so that all of a group must come in one call; a leaf
    alone has a_l = a_max and is Scion. At the first step there is no previous gradient, and H = 0.

    betas: (of the average: 1 - Scion's a, of the noise). alpha: the noise below which layers count as alike.
    """

    norm: Norm
    betas: tuple[float, float] = (0.95, 0.9)
    alpha: float = 1e-3
    scale: float = 1.0
    sharding: ClassVar[Sharding] = "matrix"
    together: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_number("alpha", self.alpha)
        check_number("scale", self.scale, 0.0, inclusive=True)

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.norm.workspace

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {
            "momentum_buffer": StateSpec(leaf.shape),
            "previous": StateSpec(leaf.shape),
            "noise": StateSpec((), "exact"),
        }

    def listen(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Take in one gradient; the leaf's noise H_l, 0-d."""
        previous = state["previous"]
        if step.count > 1:
            b2 = step.betas(self.betas)[1]
            difference = previous.neg_().add_(grad)  # what is forgotten below may be used up
            noise = self.norm.dual(difference, step.leaf).square()
            state["noise"] = state["noise"] * b2 + noise * (1.0 - b2)
        previous.copy_(grad)
        found: Tensor = state["noise"]
        return found

    def rates(self, own: list[float], everyone: list[float]) -> list[float]:
        """sqrt(a_l / a_max) of one's own leaves, a_max over everyone's; a NaN is its own affair."""
        most = max((a for a in map(self._quiet, everyone) if not math.isnan(a)), default=1.0)
        return [math.sqrt(self._quiet(h) / most) for h in own]

    def _quiet(self, noise: float) -> float:
        return self.alpha / math.sqrt(self.alpha**2 + noise)

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        """One leaf by itself: its noise is noted, and changes nothing."""
        self.listen(grad, state, step)
        return self._inner(1.0, step).update(grad, state, step)

    def listen_many(self, batch: list[Work]) -> list[float]:
        noise = [self.listen(w.grad.neg() if w.maximize else w.grad, w.state, w.step) for w in batch]
        if any(is_fake(h) for h in noise):
            return [0.0] * len(noise)
        return numbers_of(noise)

    def update_told(self, batch: list[Work], own: list[float], everyone: list[float]) -> None:
        for work, rate in zip(batch, self.rates(own, everyone), strict=True):
            update_leaf(self._inner(rate, work.step), work)

    def update_many(self, batch: list[Work]) -> list[Work]:
        own = self.listen_many(batch)
        self.update_told(batch, own, own)
        return []

    def _inner(self, ratio: float, step: Step) -> "Scion":
        return _Rated(self.norm, 1.0 - step.betas(self.betas)[0], self.scale, ratio)

    def describe(self) -> str:
        return f"lanton, {self.norm.describe()}"


@dataclass(frozen=True)
class _Rated(Scion):
    """Scion with the ratio that its noise leaves of its rate; a NaN ratio shows in the weight."""

    ratio: float = 1.0

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        delta = self.step_by(grad, state, step, self.averaging, self.scale)
        return replace(delta, scale=delta.scale * self.ratio)
