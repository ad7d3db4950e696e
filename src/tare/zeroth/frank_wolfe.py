"""Frank-Wolfe on estimated gradients: constrained training without projections (Sahu, Zaheer, Kar 2019, arXiv 1810.03233).

d_t = (1 - rho_t) d_(t-1) + rho_t g_t, v = the point of a convex set where <v, d_t> is least, W <- W + gamma_t (v - W).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.delta import Delta, Dense
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.zeroth.coordinates import CoordinateWise
from tare.zeroth.probes import THETA, Asking, Estimate, away, mean_of

SETS = ("l1", "l2", "linf", "nuclear", "simplex")
AVERAGE, CENTER, PLACED = "average", "center", "placed"
DIMENSION = "dimension"  # in every parameter group: trained scalars


# -- sets --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ball:
    """A convex set: of every leaf on its own, so that the whole is their product.

    Args:
        kind: `l1`, `l2`, `linf`, `nuclear` (of the leaf as a matrix; vectors: l2; experts: each), or `simplex`: w >= 0, sum w = radius.
        radius: of the norm.
    """

    kind: Literal["l1", "l2", "linf", "nuclear", "simplex"] = "linf"
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_choice("ball", self.kind, SETS)
        check_number("radius", self.radius, 0.0)

    def least(self, d: Tensor, leaf: Leaf) -> Tensor:
        """argmin of <v, d> over the set around 0, in the shape of d; 0 where d is 0, but on the simplex."""
        if self.kind == "linf":
            return d.sign() * -self.radius
        if self.kind == "l2" or (self.kind == "nuclear" and leaf.matrix is None):
            norm = torch.linalg.vector_norm(d)
            return torch.where(norm > 0, d * (-self.radius / norm), torch.zeros_like(d))
        if self.kind == "nuclear":
            return self._corner(d.reshape(leaf.view)).reshape(d.shape)
        v, flat = torch.zeros_like(d, memory_format=torch.contiguous_format), d.reshape(-1)
        if self.kind == "l1":
            at = flat.abs().argmax()
            v.view(-1)[at] = flat[at].sign() * -self.radius
        else:
            v.view(-1)[flat.argmin()] = self.radius
        return v

    def _corner(self, d: Tensor) -> Tensor:
        """-radius u v^T of the largest singular value, of each matrix."""
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        corner = u[..., :, :1] * vh[..., :1, :] * -self.radius
        return torch.where(s[..., :1, None] > 0, corner, torch.zeros_like(corner))

    def norm(self, w: Tensor, leaf: Leaf) -> float:
        """The radius of the smallest such set around 0 that w lies in; inf where none is."""
        w = w.double()
        if self.kind == "simplex":
            total = float(w.sum())
            return total if bool((w >= 0).all()) and math.isclose(total, self.radius, rel_tol=1e-6) else math.inf
        if self.kind == "nuclear" and leaf.matrix is not None:
            return float(torch.linalg.matrix_norm(w.reshape(leaf.view), "nuc").max())
        order = {"l1": 1.0, "linf": math.inf}.get(self.kind, 2.0)
        return float(torch.linalg.vector_norm(w, order))

    def describe(self) -> str:
        return f"{self.kind} {'ball' if self.kind != 'simplex' else 'set'} of radius {self.radius:g}"


# -- schedules ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """gamma_t, c_t and rho_t of the paper, t from 0, d trained scalars, m directions.

    | | c | rho |
    |---|---|---|
    | `kwsa` | 2 d^(-1/2) (t + 8)^(-1/3) | 4 (t + 8)^(-2/3) |
    | `rdsa` | 2 d^(-3/2) (t + 8)^(-1/3) | 4 d^(-1/3) (t + 8)^(-2/3) |
    | `i-rdsa` | 2 m^(1/2) d^(-3/2) (t + 8)^(-1/3) | 4 (1 + d / m)^(-1/3) (t + 8)^(-2/3) |

    gamma = 2 / (t + 8).

    Args:
        gamma, rho: constants in their place. least: c is never below.

    >>> Schedule("rdsa").rho(0, 1) == Schedule("kwsa").rho(0, 99) == 1.0
    True
    """

    estimator: Literal["kwsa", "rdsa", "i-rdsa"] = "i-rdsa"
    m: int = 6
    gamma: float | None = None
    fixed_rho: float | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, ("kwsa", "rdsa", "i-rdsa"))
        check_whole("m", self.m, 1)
        check_number("least_c", self.least, 0.0, inclusive=True)
        for name, value in (("gamma", self.gamma), ("rho", self.fixed_rho)):
            if value is not None and check_number(name, value, 0.0) > 1.0:
                raise InputError(f"Invalid {name}: {value!r}; expected a share, at most 1")

    def step(self, t: int) -> float:
        """gamma."""
        return 2.0 / (t + 8.0) if self.gamma is None else self.gamma

    def c(self, t: int, d: int) -> float:
        power = 0.5 if self.estimator == "kwsa" else 1.5
        root = math.sqrt(self.m) if self.estimator == "i-rdsa" else 1.0
        return max(2.0 * root / (d**power * (t + 8.0) ** (1.0 / 3.0)), self.least)

    def rho(self, t: int, d: int) -> float:
        if self.fixed_rho is not None:
            return self.fixed_rho
        noise = {"kwsa": 1.0, "rdsa": float(d), "i-rdsa": 1.0 + d / self.m}[self.estimator]
        return min(1.0, 4.0 / (noise ** (1.0 / 3.0) * (t + 8.0) ** (2.0 / 3.0)))


@dataclass(frozen=True)
class Kiefer(CoordinateWise):
    """`CoordinateWise` with the c of a schedule (KWSA). dimension: told by the optimizer."""

    schedule: Schedule = Schedule("kwsa")  # frozen
    dimension: int = 1

    def width(self, step: int, kept: Mapping[str, float]) -> float:
        return self.schedule.c(step, self.dimension)

    def describe(self) -> str:
        return f"KWSA: one-sided along {len(self.active)} coordinates, decaying c"


@dataclass(frozen=True)
class RandomDirections:
    """The mean over m directions of (f(theta + c z) - f(theta)) / c z, c of a schedule (RDSA, I-RDSA)."""

    schedule: Schedule = Schedule()  # frozen
    dimension: int = 1

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        c, m = self.schedule.c(step, self.dimension), self._directions
        here, *values = yield [THETA, *(away(j, c) for j in range(m))]
        deltas = [(value - here) / c for value in values]
        return Estimate(mean_of(deltas, m), deltas)

    @property
    def _directions(self) -> int:
        return self.schedule.m if self.schedule.estimator == "i-rdsa" else 1

    @property
    def evaluations(self) -> float:
        return self._directions + 1.0

    def describe(self) -> str:
        return f"{self.schedule.estimator.upper()}: one-sided along {self._directions} random directions, decaying c"


# -- the rule ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrankWolfe(Transform):
    """W <- W + lr gamma (v - W), v the point of `ball` around a center with the least <v, d>; lr 1 is the paper's.

    Args:
        center: `zero` (the set itself), `start` (around the first weights, which are kept), `here` (around the weights of each step:
            W <- W + lr gamma v, a normalised step: nothing is constrained).
    """

    ball: Ball = Ball()  # frozen
    schedule: Schedule = Schedule()  # frozen
    center: Literal["zero", "start", "here"] = "start"

    sharding: ClassVar[Sharding] = "matrix"
    workspace = 3.0

    def __post_init__(self) -> None:
        check_choice("center", self.center, ("zero", "start", "here"))
        if self.ball.kind == "simplex" and self.center != "zero":
            raise InputError("center: the simplex is a set of its own; use center='zero', and weights that lie in it")

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        own = {AVERAGE: StateSpec(leaf.shape)}
        if self.center == "start":
            own |= {CENTER: StateSpec(leaf.shape, "exact", dtype=leaf.dtype), PLACED: StateSpec((), "count")}
        return own

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        t = step.count - 1
        average: Tensor = state[AVERAGE]
        rho = self.schedule.rho(t, int(step.options.get(DIMENSION, step.leaf.numel)))
        average.mul_(1.0 - rho).add_(grad.to(average.dtype), alpha=rho)
        v = self.ball.least(average, step.leaf)
        gamma = self.schedule.step(t)
        if self.center == "here":
            return Dense(v, -gamma)
        numel = step.leaf.numel
        weight = step.weight if step.kept is None else step.kept.read(0, numel).view(step.leaf.shape)
        weight = weight.to(v.dtype)
        if self.center == "start":
            if not state[PLACED]:
                state[CENTER].copy_(step.weight)
                state[PLACED] = 1
            v = v + state[CENTER].to(v.dtype)
        return Dense(weight - v, gamma)

    def gap(self, average: Tensor, weight: Tensor, center: Tensor, leaf: Leaf) -> float:
        """<d, W - v>, never negative inside the set: how far from a stationary point."""
        v = self.ball.least(average, leaf) + center
        return float((average.double() * (weight.double() - v.double())).sum())

    def describe(self) -> str:
        return f"frank-wolfe on the {self.ball.describe()} around {self.center}"
