"""Exchange: several workers evaluate one step's points and send each other nothing but losses.

Directions are functions of (seed, name, step, member, element), so workers that know all losses take the same step, bit for bit, and no
weight and no gradient is ever sent. Points, data, or both are shared out; see `Workers`.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import distributed as dist

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.zeroth.closure import mean
from tare.zeroth.probes import Point
from tare.zeroth.processes import FAILED, FINE, Processes, WorkersFailed

if TYPE_CHECKING:
    from tare.zeroth.optimizer import ForwardOptimizer

__all__ = ["Exchange", "Workers", "WorkersFailed"]

LossesAt = Callable[[list[Point]], list[float]]


class Exchange(Protocol):
    """Who evaluates what. All workers get all losses, in the order of the points, and so take the same step.

    `begin(optimizer)`, if there is one, is called before each step's first question.
    """

    def evaluate(self, points: list[Point], losses_at: LossesAt) -> list[float]:
        """The losses of all points. losses_at: evaluates some of them here, several in one forward where the method can."""
        ...


class Workers(Processes):
    """The processes of `torch.distributed` (torchrun; gloo or NCCL).

    W workers make `data` groups of W / data. Each group is given data of its own; within a group everybody has the same batch, and the
    points of a step are shared out. A loss is the mean of what the groups found there.

    - data=1: points in parallel. K workers evaluate 2 n points of MeZO in the time of 2 n / K; two workers take + and -. The step is
      that of one process, bit for bit.
    - data=W: data in parallel. A step is that of one process that evaluates the mean over all batches, which are to be of one size.

    Every worker must build the same model with the same weights, and the same optimizer with the same seed; whether they did is compared:
    step, rates, leaves and seed at each step, the weights' own bytes at the first step of a process and at every `check_every`-th.

    Args:
        data: groups with data of their own; must divide the number of workers.
        group: of `torch.distributed`; None: all processes.
        check_every: steps between comparisons of weights; 0: only the first.

    A worker sends 8 bytes for each loss that it found and 24 beside, per question of a step; most methods ask once. `sent`: bytes that
    this worker has sent so far, `questions`: how often.

    Raises (in the first step):
        InputError: torch.distributed is not set up; `data` does not divide the workers; more workers than points; workers that differ.
        WorkersFailed: the closure of another worker raised, or its process is gone.
    """

    def __init__(self, data: int = 1, *, group: Any = None, check_every: int = 500):
        super().__init__(group=group, check_every=check_every)
        self.data = check_whole("data", data, 1)
        self._fresh = True

    # -- who is who ----------------------------------------------------------------------------------------------------

    @property
    def sharing(self) -> int:
        """Workers that share the points of one batch."""
        if self.workers % self.data:
            raise InputError(
                f"Invalid data: {self.data}; it must divide the {self.workers} workers: "
                f"{', '.join(str(d) for d in range(1, self.workers + 1) if self.workers % d == 0)}"
            )
        return self.workers // self.data

    @property
    def part(self) -> int:
        """Which of the `data` parts of the data is this worker's."""
        return dist.get_rank(self.group) // self.sharing

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self, optimizer: "ForwardOptimizer") -> None:
        super().begin(optimizer)
        self._fresh = True

    def _alike(self, optimizer: "ForwardOptimizer") -> list[Any]:
        return [*super()._alike(optimizer), self.data]

    def evaluate(self, points: list[Point], losses_at: LossesAt) -> list[float]:
        """The losses of all points, here and on the other workers alike."""
        sharing = self.sharing
        if self._fresh and len(points) < sharing:
            raise InputError(
                f"exchange: {sharing} workers share the points of a step, and there are {len(points)}: ask for more (n, members), or "
                f"give data=, a divisor of {self.workers} of at least {-(-self.workers // max(1, len(points)))}"
            )
        self._fresh = False
        cuts = [len(points) * lane // sharing for lane in range(sharing + 1)]
        lane, width = dist.get_rank(self.group) % sharing, max(b - a for a, b in itertools.pairwise(cuts))
        mine, found, failure = points[cuts[lane] : cuts[lane + 1]], [], None
        try:
            found = losses_at(mine) if mine else []
        except Exception as error:  # the others must hear of it
            failure = error
        padded = [*found, *[0.0] * (width - len(found))]
        try:
            rows = self._gathered([*self._row(FINE if failure is None else FAILED), *padded])
        except WorkersFailed as error:
            if failure is not None:
                raise failure from error
            raise
        if failure is not None:
            raise failure
        self._compare(rows)
        losses: list[float] = []
        for lane, (first, last) in enumerate(itertools.pairwise(cuts)):
            own = [rows[part * sharing + lane][3:] for part in range(self.data)]
            losses += [mean([row[at] for row in own]) for at in range(last - first)]
        return losses

    def describe(self) -> str:
        """For `explain()`."""
        if not (dist.is_available() and dist.is_initialized()):
            return "points are shared by workers; torch.distributed is not set up yet"
        data = f", {self.data} parts of data" if self.data > 1 else ""
        spent = f"; {self.sent / self.questions:.0f} bytes sent per question by each" if self.questions else ""
        return f"{self.workers} workers{data}, {self.sharing} to share the points of a step{spent}"
