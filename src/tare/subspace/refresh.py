"""Refresh: when a basis is computed anew. A pure function of the step, the leaf's phase and the last refresh that succeeded."""

from dataclasses import dataclass

from tare.core.checks import check_whole


@dataclass(frozen=True)
class Refresh:
    """Every `period` updates, at updates 1, period + 1, ... as in GaLore's code. stagger: leaves take turns.

    A refresh that found no usable gradient (zero or non-finite) is due again at the next update.
    """

    period: int = 200
    stagger: bool = False

    def __post_init__(self) -> None:
        check_whole("refresh period", self.period)

    def epoch(self, previous: int, phase: float) -> int:
        """Number, from 1, of the period that the update after `previous` updates falls in."""
        offset = int(phase * self.period + 1e-6) if self.stagger else 0  # 1 / 49 * 49 is below 1
        return (previous + offset) // self.period + 1

    def due(self, previous: int, phase: float, last: int) -> bool:
        """Whether the basis is computed now; last: the period of the last successful refresh, 0 for none."""
        return self.epoch(previous, phase) > last


def every(period: int, stagger: bool = False) -> Refresh:
    """Refresh every `period` updates; stagger spreads the leaves over the period, so that no step spikes.

    >>> every(3).due(3, phase=0.0, last=1), every(3).due(4, phase=0.0, last=2)
    (True, False)
    """
    return Refresh(period, stagger)
