"""Moved: one trained leaf as memory plans see it; and what a memory plan is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tare.core.int8_weight import Int8Weight
from tare.core.state import State
from tare.zeroth.directions import Directed, Draw
from tare.zeroth.probes import Point

Loss = Tensor | float


@dataclass(frozen=True)
class Moved:
    """One trained leaf at one step: what a memory plan needs to move it.

    parameter: of a leaf that ranks share, this rank's rows. shared: then the parameter itself. start: the number of the first of its
    elements in the leaf, which `draw` speaks of as a whole.
    """

    parameter: Tensor
    directed: Directed
    state: State
    draw: Callable[[int], Draw]  # member -> direction
    shared: Tensor | None = None
    start: int = 0

    @property
    def name(self) -> str:
        return self.draw(0).leaf.name

    def terms(self, point: Point) -> Iterator[tuple[Draw, float]]:
        """(direction, factor) of what this leaf is moved by at `point`."""
        for member, coefficient in point.members.items():
            draw = self.draw(member)
            yield draw, coefficient * self.directed.law.perturbation(draw.leaf, self.state)

    def add_(
        self, target: Tensor, point: Point, sign: float = 1.0, *, start: int = 0, weight: Tensor | None = None
    ) -> None:
        """target += sign * perturbation of this leaf at `point`.

        target: the whole leaf, or its elements from `start` on, flat. weight: the unperturbed one; default the parameter.
        """
        weight = self.parameter.detach() if weight is None else weight
        terms = [(draw, sign * scale) for draw, scale in self.terms(point)]
        self.directed.law.gather_(target, terms, self.state, weight, self.start + start)

    def value(self) -> Tensor:
        """A fresh copy of the weight as a forward sees it: codes decoded, in its own dtype."""
        weight = self.parameter.detach()
        return weight.dense() if isinstance(weight, Int8Weight) else weight.clone()

    def perturbed(self, point: Point) -> Tensor:
        """A fresh copy of the weight as a forward is to see it at `point`."""
        weight = self.parameter.detach()
        if not isinstance(weight, Int8Weight):
            return self.directed.law.moved(weight, list(self.terms(point)), self.state, weight)
        copy = self.value()
        self.add_(copy, point)
        return copy


class Memory:
    """A way to evaluate a loss at a point near theta."""

    name: str = ""
    devices: frozenset[torch.device] = frozenset()  # where it has the model computed, beside the leaves' own
    drifts: bool = False  # whether weights may differ after a step by more than its update: then no log can repeat it

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        """Context in which the model stands at theta + point."""
        raise NotImplementedError
        yield

    def evaluate(self, leaves: list[Moved], point: Point, run: Callable[[], Loss]) -> Loss:
        """The loss at theta + point. run: evaluates it where the model stands; may be called again, and then finds the same randomness."""
        with self.at(leaves, point):
            return run()

    def evaluate_all(self, leaves: list[Moved], points: list[Point], run: Callable[[], Loss]) -> list[Loss]:
        """`evaluate` for several points, for plans that have something to gain from knowing them all."""
        return [self.evaluate(leaves, point, run) for point in points]

    def restore(self, leaves: list[Moved]) -> None:
        """Back to theta at the end of a step, exactly or as well as the plan can."""

    def check(self, leaves: Mapping[str, tuple[Tensor, Directed]]) -> None:
        """Raise InputError where a leaf, by its name, cannot be moved in this way. Called when the optimizer is built."""

    def describe(self) -> list[str]:
        """Lines for `explain()`."""
        return [f"perturbed {self.name}"]
