"""Loss spikes: what counts as one, and the way back to the last checkpoint with the data of that stretch left out.

Chowdhery et al. (PaLM, arXiv 2204.02311, section 5.1) went back to a checkpoint before each spike and left out the batches around it, which
did no harm elsewhere: a spike comes of these data in this state. Touches the session it is given, and reads the run's checkpoints.
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from tare.train import session, sharded
from tare.train.config import TrainConfig
from tare.train.session import Session

NORMAL = 1.4826  # a median absolute deviation times this is the standard deviation of a normal law
FLOOR = 1e-3  # of the usual loss: the least spread, so that losses which hardly move do not spike by rounding
# What a way back does not undo: where the data go on, how often it was gone back, and what has been spent.
KEPT = ("position", "rollbacks", "seconds", "timed_seconds", "timed_tokens", "forwards", "sent", "skipped")


@dataclass(frozen=True)
class Spike:
    """A loss that stands out. usual: the median of those before it; apart: how many deviations lie between."""

    loss: float
    usual: float
    apart: float

    def __str__(self) -> str:
        return f"the loss {self.loss:.4g} stands {self.apart:.3g} deviations above the usual {self.usual:.4g}"


@dataclass(frozen=True)
class Back:
    """Where a run went back to. first, last: positions of the training data that it leaves out, the last one not included."""

    step: int
    folder: Path
    first: int
    last: int


def spike_of(loss: float, recent: list[float], limit: float) -> Spike | None:
    """Whether a loss stands more than `limit` deviations above the recent ones: their median, and the median of their distances to it.

    >>> str(spike_of(3.9, [3.0, 3.1, 2.9, 3.0, 3.1], limit=6))
    'the loss 3.9 stands 6.07 deviations above the usual 3'
    >>> spike_of(3.3, [3.0, 3.1, 2.9, 3.0, 3.1], limit=6), spike_of(0.1, [3.0, 3.1, 2.9, 3.0, 3.1], limit=6)
    (None, None)
    """
    usual = median(recent)
    spread = max(NORMAL * median(abs(one - usual) for one in recent), FLOOR * abs(usual))
    apart = (loss - usual) / spread if spread else 0.0
    return Spike(loss, usual, apart) if apart > limit else None


def look(loss: float, recent: list[float], train: TrainConfig) -> Spike | None:
    """The spike that a step's loss is, if it is one; else the loss joins the recent ones, of which the last `spike_memory` stay."""
    assert train.spike is not None
    if len(recent) >= train.spike_memory and (spike := spike_of(loss, recent, train.spike)):
        return spike
    recent.append(loss)
    del recent[: -train.spike_memory]
    return None


def go_back(job: Session, checkpoints: Path, counters: Any) -> Back | None:
    """Put the newest intact checkpoint back into a running session; None, and nothing done, where there is none.

    The data go on behind all that has been taken, so from here on the run is the one that was saved there and never sees that stretch:
    the same bits. counters: changed in place. No save may be under way. Workers call it together.

    Raises `CheckpointError`, as a resume does.
    """
    snapshot = sharded.latest(checkpoints, job.crew)
    if snapshot is None:
        return None
    session.restore(job, snapshot)
    saved = snapshot.trainer["counters"]
    first, last = int(saved["position"]), int(counters.position)
    for spec in fields(counters):
        if spec.name in KEPT:
            continue
        made = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        setattr(counters, spec.name, saved.get(spec.name, made))
    counters.rollbacks += 1
    return Back(snapshot.step, snapshot.folder, first, last)
