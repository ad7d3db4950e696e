"""Exchange: several workers evaluate one step's points and send each other nothing but losses."""

from collections.abc import Callable
from typing import Protocol

from tare.zeroth.probes import Point


class Exchange(Protocol):
    """Who evaluates what. All workers get all losses, in the order of the points, and so take the same step."""

    def evaluate(self, points: list[Point], losses_at: Callable[[list[Point]], list[float]]) -> list[float]:
        """The losses of all points. losses_at: evaluates some of them here, several in one forward where the method can."""
        ...
