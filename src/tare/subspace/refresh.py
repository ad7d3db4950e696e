"""Refresh: when a basis is computed anew. Periodic, or adaptive (Q-GaLore): leaves whose subspace has settled wait longer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.transform import StateSpec


@dataclass(frozen=True)
class Refresh:
    """Every `period` updates, at updates 1, period + 1, ... as in GaLore's code. stagger: leaves take turns.

    A refresh that found no usable gradient (zero or non-finite) is due again at the next update. at: `start` counts as
    above; `end` refreshes at updates 1, period, 2 period, ... as DCT-AdamW's code does.
    """

    period: int = 200
    stagger: bool = False
    at: Literal["start", "end"] = "start"

    def __post_init__(self) -> None:
        check_whole("refresh period", self.period)
        check_choice("refresh at", self.at, ("start", "end"))

    compares: ClassVar[bool] = False  # whether it looks at how far the basis moved

    def spec(self, length: int, stack: tuple[int, ...]) -> dict[str, StateSpec]:
        """Further state of the calendar. length: of the projected side."""
        return {}

    def epoch(self, previous: int, phase: float) -> int:
        """Number, from 1, of the period that the update after `previous` updates falls in."""
        offset = int(phase * self.period + 1e-6) if self.stagger else 0  # 1 / 49 * 49 is below 1
        return (previous + offset + (1 if self.at == "end" else 0)) // self.period + 1

    def due(self, previous: int, phase: float, last: int) -> bool:
        """Whether the basis is computed now; last: the period of the last successful refresh, 0 for none."""
        return self.epoch(previous, phase) > last

    def is_due(self, state: Any, previous: int, phase: float) -> bool:
        """The same, from a leaf's state."""
        return self.due(previous, phase, state["refreshed"])

    def number(self, state: Any, previous: int, phase: float) -> int:
        """What `refreshed` becomes: it keys the random numbers of the new basis."""
        return max(1, self.epoch(previous, phase))

    def refreshed(self, state: Any, old: Tensor | None, fresh: Tensor) -> None:
        """Told of every refresh that succeeded; old: the basis before, None at the first."""


@dataclass(frozen=True)
class AdaptiveRefresh(Refresh):
    """Q-GaLore's lazy calendar (Zhang et al. 2024, arXiv 2407.08296): a leaf whose subspace stays put refreshes half as often.

    After every refresh the similarity of the new basis to the last one enters a queue; when the queue is full and its
    mean reaches `threshold`, the leaf's own period is multiplied by `growth`. The queue is not cleared, so that a settled
    leaf keeps doubling.

    similarity: `projector`, |P_old^T P_new|_F^2 / r, which no sign can cancel (default); `vector`, the *signed* cosine of
    the first singular vectors, as the code has it: the signs are arbitrary, so that it may cancel; `absolute`, its size.
    # differs from the published code, which uses `vector`; the paper speaks of projection matrices.
    """

    threshold: float = 0.4
    growth: float = 2.0
    queue: int = 5
    similarity: Literal["projector", "vector", "absolute"] = "projector"

    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, -1.0)
        check_number("growth", self.growth, 1.0, inclusive=True)
        check_whole("queue", self.queue)
        check_choice("similarity", self.similarity, ("projector", "vector", "absolute"))

    def spec(self, length: int, stack: tuple[int, ...]) -> dict[str, StateSpec]:
        specs = {
            "gap": StateSpec((), "count", init=self.period),
            "similarities_seen": StateSpec((), "count"),
            "similarities": StateSpec((self.queue,), "exact"),
        }
        if self.similarity != "projector":
            specs["first_vector"] = StateSpec((*stack, length), "exact")
        return specs

    def is_due(self, state: Any, previous: int, phase: float) -> bool:
        gap = state["gap"]
        offset = int(phase * self.period + 1e-6) if self.stagger else 0
        # `refresh_failures` after the last success: the refresh is still owed.
        return state["refreshed"] == 0 or (previous + offset) % gap == 0 or state["refresh_owed"] > 0

    def number(self, state: Any, previous: int, phase: float) -> int:
        return int(state["refreshed"]) + 1

    def refreshed(self, state: Any, old: Tensor | None, fresh: Tensor) -> None:
        if self.similarity == "projector":
            value = None if old is None else (old.to(fresh.dtype).mT @ fresh).square().sum((-2, -1)) / fresh.shape[-1]
        else:
            first = fresh[..., 0]
            before = state["first_vector"]
            cosine = torch.nn.functional.cosine_similarity(before.to(first.dtype), first, dim=-1)
            value = None if old is None else cosine if self.similarity == "vector" else cosine.abs()
            state["first_vector"] = first
        if value is None:
            return
        values = state["similarities"].roll(-1)
        values[-1] = value.mean()
        state["similarities"] = values
        state["similarities_seen"] += 1
        if state["similarities_seen"] >= self.queue and float(values.mean()) >= self.threshold:
            state["gap"] = int(self.growth * state["gap"])


def every(period: int, stagger: bool = False) -> Refresh:
    """Refresh every `period` updates; stagger spreads the leaves over the period, so that no step spikes.

    >>> every(3).due(3, phase=0.0, last=1), every(3).due(4, phase=0.0, last=2)
    (True, False)
    """
    return Refresh(period, stagger)
