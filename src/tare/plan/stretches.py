"""The stretches of a step: what is alive between the moments at which a unit of the model begins or ends."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal

from torch import nn

from tare.core.errors import InputError
from tare.plan.profile import Moment, Stretch
from tare.plan.tracker import MemoryTracker, Peak
from tare.plan.units import ROOT, units, watched

Phase = Literal["forward", "backward", "evaluation"]
Begins = Literal["phase", "enter", "leave", "end"]


class Stretches:
    """Records the stretches of the phases of a tracked step, in `found`; none for a model without units."""

    def __init__(self, model: nn.Module, tracker: MemoryTracker) -> None:
        self.found: list[Stretch] = []
        self._tracker = tracker
        self._open: tuple[Phase, Begins, int, Moment] | None = None
        self._phase: Phase = "forward"
        self._watching: AbstractContextManager[Any] | None = None
        try:
            self._units = [list(part.parameters()) for _, part in units(model)]
            self._watching = watched(model, self._forward, self._backward)
        except InputError:
            pass

    def __enter__(self) -> "Stretches":
        if self._watching is not None:
            self._watching.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching is not None:
            self._watching.__exit__(kind, fault, trace)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Inside, stretches are those of this phase."""
        if self._watching is None:
            yield
            return
        self._phase = name
        self._begin("phase", ROOT)
        yield
        self._begin("end", ROOT)
        self._end()

    def _forward(self, begins: Literal["enter", "leave"], unit: int) -> None:
        self._begin(begins, unit)

    def _backward(self, begins: Literal["enter", "leave"], unit: int) -> None:
        left = self._units[unit] if begins == "leave" and unit != ROOT else []
        self._begin(begins, unit, sum(p.grad.untyped_storage().nbytes() for p in left if p.grad is not None))

    def _begin(self, begins: Begins, unit: int, settled: int = 0) -> None:
        self._end()
        start = Moment.of(Peak(0, self._tracker.current)).plus(gradients=-self._tracker.settled)
        self._tracker.stretch(settled)
        self._open = self._phase, begins, unit, start

    def _end(self) -> None:
        if self._open is not None:
            peak = self._tracker.stretch()
            assert peak is not None
            self.found.append(Stretch(*self._open, Moment.of(peak)))
            self._open = None
