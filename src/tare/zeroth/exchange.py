"""Exchange: several workers evaluate one step's points and send each other nothing but losses.

Directions are functions of (seed, name, step, member, element), so workers that know all losses take the same step, bit for bit, and no
weight and no gradient is ever sent. Points, data, or both are shared out; see `Workers`.
"""

import hashlib
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed as dist

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.zeroth.closure import mean
from tare.zeroth.digest import digests, parts
from tare.zeroth.probes import Point

if TYPE_CHECKING:
    from tare.zeroth.optimizer import ForwardOptimizer

LossesAt = Callable[[list[Point]], list[float]]


class Exchange(Protocol):
    """Who evaluates what. All workers get all losses, in the order of the points, and so take the same step.

    `begin(optimizer)`, if there is one, is called before each step's first question.
    """

    def evaluate(self, points: list[Point], losses_at: LossesAt) -> list[float]:
        """The losses of all points. losses_at: evaluates some of them here, several in one forward where the method can."""
        ...


class WorkersFailed(RuntimeError):
    """Another worker failed or is gone. Nobody has taken the step."""


class Workers:
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
        self.data = check_whole("data", data, 1)
        self.check_every = check_whole("check_every", check_every, 0)
        self.group = group
        self.sent, self.questions = 0, 0
        self._checked = -1  # the last step whose weights were compared
        self._facts, self._weights, self._fresh = 0, 0, True

    # -- who is who ----------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many there are."""
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "exchange: torch.distributed is not set up; start with torchrun and call torch.distributed.init_process_group(), or leave "
                "exchange out"
            )
        return dist.get_world_size(self.group)

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
        """What all workers must agree on at this step."""
        facts = [optimizer.steps, optimizer.probe.describe(), self.data]
        for group in optimizer.param_groups:
            facts += [float(group["lr"]), float(group["weight_decay"]), int(group["seed"])]
        self._facts = _folded(repr(facts).encode())
        due = self._checked < 0 or (self.check_every and optimizer.steps - self._checked >= self.check_every)
        self._weights = 0
        if due:
            self._weights = _folded(b"".join(name.encode() + d for name, d in digests(optimizer).items()))
            self._checked = optimizer.steps
        self._fresh = True

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
            rows = self._gathered([float(failure is not None), float(self._facts), float(self._weights), *padded])
        except RuntimeError as error:
            if failure is not None:
                raise failure from error
            raise WorkersFailed(
                f"exchange: a worker is gone or does not answer; no worker has taken this step ({_first_line(error)})"
            ) from error
        if failure is not None:
            raise failure
        self._compare(rows)
        losses: list[float] = []
        for lane, (first, last) in enumerate(itertools.pairwise(cuts)):
            own = [rows[part * sharing + lane][3:] for part in range(self.data)]
            losses += [mean([row[at] for row in own]) for at in range(last - first)]
        return losses

    def _compare(self, rows: list[list[float]]) -> None:
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if failed:
            raise WorkersFailed(
                f"exchange: worker {failed[0]} failed, its own message says how; no worker has taken this step"
            )
        for at, what, cure in (
            (
                1,
                "steps, rates, seeds or probe",
                "build the same optimizer everywhere, and resume all from the same state",
            ),
            (2, "weights", "load the same weights everywhere, or call exchange.share_(model) before the first step"),
        ):
            other = next((rank for rank, row in enumerate(rows) if row[at] != rows[0][at]), None)
            if other is not None:
                self._checked = -1
                raise InputError(f"exchange: the {what} of worker {other} are not those of worker 0; {cure}")

    def _gathered(self, row: list[float]) -> list[list[float]]:
        """Everybody's row, by rank."""
        device = torch.device("cuda", torch.cuda.current_device()) if _nccl(self.group) else torch.device("cpu")
        mine = torch.tensor(row, dtype=torch.float64, device=device)
        all_rows = [torch.empty_like(mine) for _ in range(self.workers)]
        dist.all_gather(all_rows, mine, group=self.group)
        self.sent += mine.numel() * mine.itemsize
        self.questions += 1
        found: list[list[float]] = torch.stack(all_rows).tolist()
        return found

    # -- beside ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def share_(self, model: torch.nn.Module) -> None:
        """Give all workers worker 0's weights and buffers: the only time that any are sent."""
        first = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        for tensor in [*model.parameters(), *model.buffers()]:
            for piece in parts(tensor):
                dist.broadcast(piece, first, group=self.group)

    def describe(self) -> str:
        """For `explain()`."""
        if not (dist.is_available() and dist.is_initialized()):
            return "points are shared by workers; torch.distributed is not set up yet"
        data = f", {self.data} parts of data" if self.data > 1 else ""
        spent = f"; {self.sent / self.questions:.0f} bytes sent per question by each" if self.questions else ""
        return f"{self.workers} workers{data}, {self.sharing} to share the points of a step{spent}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}


def _folded(text: bytes) -> int:
    """A number that a double holds exactly."""
    return 1 + int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


def _nccl(group: Any) -> bool:
    return "nccl" in dist.get_backend(group)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]
