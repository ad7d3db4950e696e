"""Streamed: perturbed inside forward while blocks come and go, several points at every block as long as it is there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tare.core.errors import InputError
from tare.zeroth.dice import Dice
from tare.zeroth.inforward import InForward
from tare.zeroth.moved import Loss, Moved
from tare.zeroth.probes import Point
from tare.zeroth.stream import Stream
from tare.zeroth.stream_lanes import Lanes, alone_because
from tare.zeroth.swaps import Trial


class Streamed(InForward):
    """Args:
        stream: of the model's blocks.
        together: points that pass a block while it is there. 1: each point takes a pass of its own over all blocks.

    Points together run the closure in lanes that wait for one another at every block (see `stream_lanes`). The first step evaluates its
    points both ways, and where a loss is another one, or a weight has to be perturbed in place, each point takes its own pass from then
    on: the losses are the same, and every block is brought once for each point.
    """

    def __init__(self, stream: Stream, together: int = 2):
        super().__init__(stream.model)
        self.stream, self.together = stream, together
        self.apart = ""  # why points take passes of their own
        self._lately = ""  # why they did in the last evaluation
        self._tried = together == 1
        self.devices = frozenset({stream.carrier.device})

    def evaluate_all(self, leaves: list[Moved], points: list[Point], run: Callable[[], Loss]) -> list[Loss]:
        found: list[Loss] = []
        while len(found) < len(points):
            found += self._some(leaves, points[len(found) : len(found) + self.together], run)
        return found

    def _some(self, leaves: list[Moved], points: list[Point], run: Callable[[], Loss]) -> list[Loss]:
        each: list[Loss] | None = None
        if not self._tried or self._sort_out(leaves):
            each = [self.evaluate(leaves, point, run) for point in points]
        hindered = self._hindered(points) or (each is not None and self._tried)
        found = None if hindered else self._in_lanes(leaves, points, run)
        if each is None:
            return found if found is not None else [self.evaluate(leaves, point, run) for point in points]
        if found is not None:
            self._tried = True
            if not _equal(each, found):
                again = [self.evaluate(leaves, point, run) for point in points]
                if _equal(each, again):  # else the model is not the same twice
                    self.apart = "together, a loss was another one"
        return each

    def _hindered(self, points: list[Point]) -> str:
        """Why these points cannot go together."""
        if self.elsewhere and not self.apart:
            name, why = next(iter(self.elsewhere.values()))
            self.apart = f"{name} is perturbed in place, {why}"
        if len(points) == 1 or any(not point.members for point in points):
            return "one point"
        self._lately = self.apart or alone_because()
        return self._lately

    def _in_lanes(self, leaves: list[Moved], points: list[Point], run: Callable[[], Loss]) -> list[Loss] | None:
        """None where a module was not called as usual: then points are looked at one by one."""
        dice = Dice({leaf.parameter.device for leaf in leaves} | {self.stream.carrier.device})
        held: dict[int, Any] = {}
        with self._standing(leaves, points[0], False) as trial:

            def enter(lane: int) -> None:
                for swap in trial.swaps:
                    swap.point = points[lane]
                if lane in held:
                    numbers, copies = held.pop(lane)
                    dice.put(numbers)
                    for swap, own in zip(trial.swaps, copies, strict=True):
                        swap.resume(own)

            def leave(lane: int) -> None:
                held[lane] = dice.look(), [swap.suspend() for swap in trial.swaps]

            lanes = Lanes([run] * len(points), enter, leave)
            self.stream.turn = lanes.gate
            try:
                found = lanes.run()
            finally:
                self.stream.turn = None
        missing = {leaf.parameter for leaf in self._inside(leaves)} - trial.entered - self._resting
        return None if missing or any(swap.traced for swap in trial.swaps) else found

    @contextmanager
    def _standing(self, leaves: list[Moved], point: Point, watch: bool) -> Iterator[Trial]:
        if self.elsewhere:
            kept = [name for p, (name, _) in self.elsewhere.items() if p in self.stream.codes]
            if kept:
                raise InputError(
                    f"{kept[0]}: it has to be perturbed in place, which transfer={self.stream.transfer!r} would round away; use "
                    "transfer='exact'"
                )
            self.stream.flush(self.elsewhere)  # what is written in place must be up to date before it is
        with self.stream.passing(), super()._standing(leaves, point, watch) as trial:
            self.stream.attach()
            self.stream.reads = trial.reads
            try:
                yield trial
            finally:
                self.stream.reads = None

    def describe(self) -> list[str]:
        many = f"{self.together} points pass a block while it is there; it is brought once for them"
        apart = f"each point takes a pass of its own{f' ({self._lately})' if self._lately else ''}"
        return [*super().describe(), self.stream.describe(), apart if self._lately or self.together == 1 else many]


def _equal(ones: list[Loss], others: list[Loss]) -> bool:
    pairs = [(float(a), float(b)) for a, b in zip(ones, others, strict=True)]
    return all(a == b or (a != a and b != b) for a, b in pairs)
