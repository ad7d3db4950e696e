"""Probes: at which points a loss is evaluated, and which combination of directions estimates the gradient from what was found.

A probe is a generator: it yields lists of points, is sent their losses, and returns terms. So points of one list may be evaluated anywhere
and in any order (by several workers), and a probe that decides what to try next from what it has seen is written down as it reads.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tare.core.checks import check_number, check_whole
from tare.zeroth.coefficients import Coefficients, Plain


@dataclass(frozen=True)
class Point:
    """theta + sum of coefficient z_member over `offsets`; the empty sum is theta itself.

    along: where it is not empty, what is asked for is not the loss but its derivative at theta in that direction.
    """

    offsets: tuple[tuple[int, float], ...] = ()
    along: tuple[tuple[int, float], ...] = ()

    @property
    def members(self) -> dict[int, float]:
        """member -> coefficient, zero ones left out."""
        found: dict[int, float] = {}
        for member, coefficient in self.offsets:
            found[member] = found.get(member, 0.0) + coefficient
        return {member: c for member, c in found.items() if c != 0.0}


@dataclass(frozen=True)
class Term:
    """coefficient z_member, as part of the estimated gradient."""

    member: int
    coefficient: float


@dataclass
class Estimate:
    """What a probe found.

    terms: the gradient is their sum. deltas: the directional derivatives behind them, for logs. keep: numbers that the next step's
    `ask` gets as `kept`, and laws in `learn`; they are saved with the optimizer. factor: multiplies the learning rate of this step (a
    line search: which length was best). moves: False where the step only looked: no leaf is stepped, decayed or counted.
    """

    terms: list[Term]
    deltas: list[float]
    keep: dict[str, float] | None = None
    factor: float = 1.0
    moves: bool = True


Asking = Generator[list[Point], list[float], Estimate | None]  # None: nothing can be said, the step is skipped


PLAIN = Plain()


class Probe(Protocol):
    """What evaluates the loss around theta.

    A step with a loss that is not finite is skipped, unless the probe has `bearable(points)`, how many finite ones are enough: it is then
    sent its `worst` for each of the others.
    """

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        """One step's questions; see the module.

        step: from 0. kept: what the last step's estimate asked to keep; and `lr`, where all leaves share one learning rate.
        """
        ...

    @property
    def evaluations(self) -> float:
        """Forward passes per step."""
        ...

    def describe(self) -> str: ...


THETA = Point()


def away(member: int, coefficient: float) -> Point:
    """theta + coefficient z_member."""
    return Point(((member, coefficient),))


@dataclass(frozen=True)
class Sampled:
    """What probes of n directions share. eps: how far the points stand off. mean: False sums the directions' estimates instead, so that the
    learning rate need not grow with n. coefficients: what is made of the derivatives."""

    eps: float = 1e-3
    n: int = 1
    mean: bool = True
    coefficients: Coefficients = PLAIN

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0)
        check_whole("n", self.n, 1)

    def found(self, deltas: list[float]) -> Estimate:
        """The estimate, given the derivative along each direction."""
        return Estimate(mean_of(self.coefficients(deltas), self.n if self.mean else 1), deltas)


@dataclass(frozen=True)
class TwoSided(Sampled):
    """delta_j = (f(theta + eps z_j) - f(theta - eps z_j)) / (2 eps) for n members; the gradient is the mean of delta_j z_j.

    SPSA (Spall 1992), as in MeZO (arXiv 2305.17333).
    """

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        values = yield [away(j, sign * self.eps) for j in range(self.n) for sign in (1.0, -1.0)]
        deltas = [(values[2 * j] - values[2 * j + 1]) / (2.0 * self.eps) for j in range(self.n)]
        return self.found(deltas)

    @property
    def evaluations(self) -> float:
        return 2.0 * self.n

    def describe(self) -> str:
        return f"two-sided, eps {self.eps:g}, n {self.n}"


@dataclass(frozen=True)
class OneSided(Sampled):
    """delta_j = (f(theta + eps z_j) - f(theta)) / eps: n + 1 evaluations, biased by eps / 2 times the curvature along z_j."""

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        here, *values = yield [THETA, *(away(j, self.eps) for j in range(self.n))]
        deltas = [(value - here) / self.eps for value in values]
        return self.found(deltas)

    @property
    def evaluations(self) -> float:
        return self.n + 1.0

    def describe(self) -> str:
        return f"one-sided, eps {self.eps:g}, n {self.n}"


@dataclass(frozen=True)
class OnePoint:
    """delta = (f(theta + eps z) - what the last step found there) / eps: one evaluation a step, and a noisier estimate.

    The first step has nothing to compare with, and only looks.
    """

    eps: float = 1e-3
    coefficients: Coefficients = PLAIN

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0)

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        (value,) = yield [away(0, self.eps)]
        if "loss" not in kept:
            return Estimate([], [0.0], {"loss": value}, moves=False)
        delta = (value - kept["loss"]) / self.eps
        return Estimate(mean_of(self.coefficients([delta]), 1), [delta], {"loss": value})

    @property
    def evaluations(self) -> float:
        return 1.0

    def describe(self) -> str:
        return f"one-point, eps {self.eps:g}"


def mean_of(deltas: list[float], n: int) -> list[Term]:
    """(1/n) sum delta_j z_j."""
    return [Term(j, delta / n) for j, delta in enumerate(deltas)]


def finite(values: list[Any]) -> bool:
    """Whether all losses are numbers that an estimate can be made of."""
    return all(math.isfinite(value) for value in values)
