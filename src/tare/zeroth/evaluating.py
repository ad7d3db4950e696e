"""Evaluating: the conversation of a probe with a closure. The side of the optimizer that looks, and writes nothing."""

import math
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tare.zeroth.closure import Watch, explained, loss_from, numbers
from tare.zeroth.dice import Dice
from tare.zeroth.exchange import Exchange
from tare.zeroth.memory import Memory, Moved
from tare.zeroth.probes import Asking, Estimate, Point, Probe, finite
from tare.zeroth.record import KEPT
from tare.zeroth.tangent import slope_at


class Evaluating:
    """The part of `ForwardOptimizer` that has points evaluated, by itself or with others."""

    if TYPE_CHECKING:
        model: nn.Module | None
        probe: Probe
        memory: Memory
        exchange: Exchange | None
        evaluated: int
        param_groups: list[dict[str, Any]]
        _watch: Watch

        @property
        def steps(self) -> int: ...

    def _ask(self, leaves: list[Moved], closure: Callable[[], Any], losses: list[float]) -> Estimate | None:
        """The probe's estimate; None where a loss was not finite. The weights are back at theta in any case."""
        kept = dict(self.param_groups[0][KEPT])
        if len(rates := {float(group["lr"]) for group in self.param_groups}) == 1:
            (kept["lr"],) = rates
        if (begin := getattr(self.exchange, "begin", None)) is not None:
            begin(self)
        dice, failed = Dice({leaf.parameter.device for leaf in leaves} | self.memory.devices), True
        try:
            with closing(self.probe.ask(self.steps, kept)) as asking:
                estimate = self._converse(asking, leaves, closure, losses, dice)
            failed = False
            return estimate
        except RuntimeError as error:
            if (line := explained(error)) is not None:
                raise line from error
            raise
        finally:
            self.memory.restore(leaves)
            dice.settle(failed)

    def _converse(
        self, asking: Asking, leaves: list[Moved], closure: Callable[[], Any], losses: list[float], dice: Dice
    ) -> Estimate | None:
        try:
            points = next(asking)
            while True:
                values = self._evaluate(leaves, points, closure, losses, dice)
                if (bearable := getattr(self.probe, "bearable", None)) is not None:
                    if sum(map(math.isfinite, values)) < bearable(points):
                        return None
                    values = [value if math.isfinite(value) else self.probe.worst for value in values]  # type: ignore[attr-defined]
                elif not finite(values) or not finite(losses):
                    return None
                points = asking.send(values)
        except StopIteration as done:
            found: Estimate | None = done.value
            return found

    def _evaluate(
        self, leaves: list[Moved], points: list[Point], closure: Callable[[], Any], losses: list[float], dice: Dice
    ) -> list[float]:
        """A number for every point; the losses among them, and those that came with derivatives, go to `losses` too."""
        beside: dict[int, Tensor | float] = {}  # losses that came with derivatives, by point

        def run() -> Tensor | float:
            self.evaluated += 1
            with dice.throw():
                return loss_from(closure())

        def slope(point: Point) -> Tensor | float:
            self.evaluated += 1
            with dice.throw():
                loss, value = slope_at(self.model, leaves, point, closure)
            beside[id(point)] = loss
            return value

        def look(some: list[Point]) -> list[float]:
            if any(point.along for point in some):
                found = [slope(point) if point.along else self.memory.evaluate(leaves, point, run) for point in some]
            else:
                found = self.memory.evaluate_all(leaves, some, run)
            for value in found:
                self._watch.loss(value)
            return numbers(found)

        def also(some: list[Point]) -> list[float]:
            return numbers(beside.get(id(point), 0.0) for point in some)

        shared = self.exchange.evaluate if self.exchange is not None else lambda points, evaluate: evaluate(points)
        values, extra = shared(points, look), []
        if any(point.along for point in points):
            extra = [loss for point, loss in zip(points, shared(points, also), strict=True) if point.along]
        losses += [value for point, value in zip(points, values, strict=True) if not point.along] + extra
        return values
