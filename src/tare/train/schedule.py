"""Learning-rate schedules as pure functions of the step: nothing to save, and a resumed run cannot be off by one.

Touches only the `lr` of parameter groups. Linear warm-up, then constant or a cosine (Loshchilov and Hutter, arXiv 1608.03983).
"""

import math
from dataclasses import dataclass

import torch

from tare.core.errors import InputError
from tare.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The share of the peak learning rate used in each step.

    Args:
        kind: `cosine` or `constant` after the warm-up.
        steps: length of the run.
        warmup: steps of linear warm-up; the last of them runs at the peak, so no step is spent at zero.
        final: where the cosine ends, as a share of the peak; the last step runs there.

    >>> schedule = Schedule("cosine", steps=6, warmup=2, final=0.1)
    >>> [round(schedule(step), 3) for step in range(6)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """

    kind: str
    steps: int
    warmup: int = 0
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise InputError(
                f"train.warmup: expected at most train.steps = {self.steps}, got {self.warmup}; "
                "lower the warm-up or raise the steps"
            )

    @classmethod
    def of(cls, train: TrainConfig) -> "Schedule":
        """The schedule of a run; a warm-up below 1 is a share of the steps."""
        share = train.warmup < 1
        warmup = round(train.warmup * train.steps) if share else int(train.warmup)
        return cls(train.schedule, train.steps, warmup, train.final_lr_ratio)

    def __call__(self, step: int) -> float:
        """The share of the peak in `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step + 1 - self.warmup) / (self.steps - self.warmup))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, peaks: list[float], share: float) -> float:
    """Set every group's learning rate to `share` of its peak; returns the first group's."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share
    return float(optimizer.param_groups[0]["lr"])
