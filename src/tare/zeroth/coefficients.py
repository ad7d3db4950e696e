"""Coefficients: what becomes of directional derivatives before they weigh directions. Plain functions of a list of numbers."""

import math
from dataclasses import dataclass
from typing import Protocol

from tare.core.checks import check_number


class Coefficients(Protocol):
    """deltas -> weights of the directions, as many."""

    def __call__(self, deltas: list[float]) -> list[float]: ...


@dataclass(frozen=True)
class Plain:
    """The derivatives themselves."""

    def __call__(self, deltas: list[float]) -> list[float]:
        return deltas


@dataclass(frozen=True)
class Clip:
    """Each to [-limit, limit] (QZO, arXiv 2505.13430): with Gaussian directions the mean keeps its direction and shrinks."""

    limit: float = 100.0

    def __post_init__(self) -> None:
        check_number("clip", self.limit, 0.0)

    def __call__(self, deltas: list[float]) -> list[float]:
        return [min(max(delta, -self.limit), self.limit) for delta in deltas]


@dataclass(frozen=True)
class Sign:
    """-1, 0 or 1: the sign of the number, not of each coordinate (ZO-SGD-Sign of arXiv 2402.11592)."""

    def __call__(self, deltas: list[float]) -> list[float]:
        return [math.copysign(1.0, delta) if delta else 0.0 for delta in deltas]
