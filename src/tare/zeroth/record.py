"""Record: one step of a forward-only method as a log keeps it. With the weights before it, all that is needed to do it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tare.zeroth.probes import Term

# In every parameter group: steps done, numbers kept, steps skipped in a row, and in all, terms of former steps.
STEPS, KEPT, SKIPPED, SKIPS, PAST = "forward_steps", "forward_kept", "forward_skipped", "forward_skips", "forward_past"  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What one step did.

    step: from 0. terms: member and coefficient of the estimated gradient, before the learning rate. factor: of the learning rate.
    rates: learning rate and weight decay of each group. losses: values in the order of evaluation. deltas: directional derivatives.
    skipped: a loss was not finite. moved: whether leaves were stepped; not where the step was skipped, or only looked. keep: numbers
    of the probe that outlive the step. leaves: names of the leaves that were stepped, or would have been.
    """

    step: int
    terms: tuple[Term, ...]
    factor: float
    rates: tuple[tuple[float, float], ...]
    losses: tuple[float, ...] = ()
    deltas: tuple[float, ...] = ()
    skipped: bool = False
    moved: bool = True
    keep: Mapping[str, float] | None = None
    leaves: tuple[str, ...] = ()


class Recorder(Protocol):
    """Who is told of every step. `begin`, if there is one, is called before the first step that it is told of."""

    def __call__(self, record: Record, /) -> Any: ...
