"""Workers: the processes of `torchrun` as one run. They send each other losses, and a word at every step's end on whether to go on.

Worker 0 alone writes the run's folder, evaluates and shows what happens; the others take the same steps. What goes wrong on one ends all,
and one of them says why.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import distributed as dist

from tare.core.errors import InputError
from tare.methods import registry
from tare.train.config import RunConfig
from tare.zeroth.exchange import LossesAt, Workers, WorkersFailed
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import Point

PATIENCE = timedelta(
    hours=12
)  # of those who wait for worker 0 to evaluate and to save; one that is gone is noticed at once
PARTING = timedelta(seconds=30)  # of one that failed, until the others have heard of it
GO_ON, STOP, FAILED = 0, 1, 2
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class Elsewhere(RuntimeError):
    """The run has ended on a fault that another worker tells of; its cause is what this one saw of it."""


class Losses(Workers):
    """The exchange of losses. told: whether a fault went through it, so that all know. failed: the workers whose fault it was."""

    def __init__(self, data: int) -> None:
        super().__init__(data)
        self.told, self.failed = False, list[int]()

    def evaluate(self, points: list[Point], losses_at: LossesAt) -> list[float]:
        """As `Workers`; notes faults."""
        try:
            return super().evaluate(points, losses_at)
        except Exception:
            self.told = True
            raise

    def _gathered(self, row: list[float]) -> list[list[float]]:
        rows = super()._gathered(row)
        self.failed = [rank for rank, each in enumerate(rows) if each[0]]
        return rows


@dataclass
class Crew:
    """The workers of a run, seen from one of them; the defaults are those of a process by itself.

    shares: what is shared out, the points of a step or its batch. sent: bytes sent to agree on whether to go on.
    """

    rank: int = 0
    size: int = 1
    local: int = 0  # which one on this machine
    shares: Literal["points", "data"] = "points"
    exchange: Losses | None = None
    sent: int = 0
    heard: bool = field(default=False, repr=False)  # of a fault of another

    @property
    def first(self) -> bool:
        """Whether this one writes, evaluates and shows."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """How many parts a batch is cut into."""
        return self.size if self.shares == "data" else 1

    @property
    def part(self) -> int:
        """Which one is this worker's."""
        return self.rank if self.shares == "data" else 0

    @property
    def bytes_sent(self) -> int:
        """By this worker, until now."""
        return self.sent + (self.exchange.sent if self.exchange is not None else 0)

    def device(self, name: str) -> str:
        """The device setting for this worker: on CUDA each has one of its own, unless one is named for all."""
        if self.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local >= torch.cuda.device_count():
            raise InputError(
                f"run.device: worker {self.rank} would be the {self.local + 1}th on {torch.cuda.device_count()} CUDA devices; start fewer "
                "(--nproc-per-node), or name one device for all, e.g. --device cuda:0"
            )
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def share(self, make: Callable[[], T]) -> T:
        """What worker 0 makes, on all."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        dist.broadcast_object_list(box, 0)
        found: T = box[0]  # type: ignore[assignment]
        return found

    def agree(self, stop: bool = False) -> bool:
        """Whether any worker wants to stop. Raises `WorkersFailed` where one has failed or is gone."""
        if self.size == 1:
            return stop
        states = self._states(STOP if stop else GO_ON, PATIENCE)
        if FAILED in states:
            self.heard = True
            raise WorkersFailed(f"worker {states.index(FAILED)} failed, its own message says how")
        return STOP in states

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a fault on any worker ends it on all: there, or where this is left.

        Raises:
            Elsewhere: another worker raises what is wrong.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self.agree()
        except Exception as fault:
            if not self._speaks(fault):
                raise Elsewhere(str(fault)) from fault
            fault.of_worker = True  # type: ignore[attr-defined]
            raise

    def _speaks(self, fault: Exception) -> bool:
        """Whether it is for this worker to tell of a fault; tells the others that there is one, where they do not know."""
        if self.exchange is not None and self.exchange.told:
            if self.exchange.failed:
                return self.rank == min(self.exchange.failed)
            return self.rank <= isinstance(fault, WorkersFailed)  # of one that is gone two tell: it may be worker 0
        if isinstance(fault, WorkersFailed):
            return not self.heard and self.rank <= 1
        try:
            return self.rank == self._states(FAILED, PARTING).index(FAILED)
        except WorkersFailed:
            return True

    def _states(self, own: int, patience: timedelta) -> list[int]:
        mine = torch.tensor([own], dtype=torch.int64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(rows, mine, async_op=True)
            assert work is not None
            work.wait(patience)
        except RuntimeError as fault:
            line = str(fault).strip().partition("\n")[0][:160]
            raise WorkersFailed(f"a worker is gone or does not answer ({line})") from fault
        self.sent += mine.itemsize
        return [int(row) for row in rows]

    def note(self) -> str:
        """A line for the run's beginning."""
        what = "the points of a step" if self.shares == "points" else "every batch"
        return f"{self.size} workers share {what}; they send each other losses, no weights and no gradients"


@contextlib.contextmanager
def join(config: RunConfig) -> Iterator[Crew]:
    """The workers that this process was started with, by torchrun or a process group that is there already; else itself alone."""
    ours = not (dist.is_available() and dist.is_initialized())
    if ours and (not all(name in os.environ for name in _LAUNCHED) or int(os.environ["WORLD_SIZE"]) < 2):
        yield Crew()
        return
    if not dist.is_available():
        raise InputError("torchrun: this torch has no torch.distributed; start one process")
    crew = Crew(local=int(os.environ.get("LOCAL_RANK", 0)))
    if ours:
        apart = torch.cuda.is_available() and config.run.device in ("auto", "cuda")
        dist.init_process_group("cpu:gloo,cuda:nccl" if apart else "gloo", timeout=PATIENCE)
    try:
        crew.rank, crew.size = dist.get_rank(), dist.get_world_size()
        yield crew
    finally:
        if ours:
            dist.destroy_process_group()


def enlist(config: RunConfig, crew: Crew) -> RunConfig:
    """Checks that a resolved configuration can be shared out, and gives it back with `train.workers` settled.

    Raises `InputError` for methods with gradients, for those that share nothing, and for batches that do not divide.
    """
    shares = config.train.workers or "points"
    if crew.size == 1:
        return config
    key, batch = config.method.key, config.train.batch
    if "exchange" not in registry.options(key):
        able = [name for name in registry.keys("forward") if "exchange" in registry.options(name)]
        why = "steps with gradients" if registry.card(key).kind == "gradient" else "shares no points"
        raise InputError(
            f"method {key!r} {why}, and workers (torchrun) share the losses of forward passes alone; start it without torchrun, or use one "
            f"of {', '.join(able)}"
        )
    if shares == "data" and batch % crew.size:
        raise InputError(
            f"train.batch: {batch} sequences do not divide among {crew.size} workers (train.workers: data); give a multiple of {crew.size}"
        )
    return replace(config, train=replace(config.train, workers=shares))


def local(config: RunConfig, crew: Crew) -> RunConfig:
    """The configuration as far as one worker's memory goes: with its own part of the batch."""
    if not (crew.size > 1 and config.train.workers == "data"):
        return config
    return replace(config, train=replace(config.train, batch=config.train.batch // crew.size))


def attach(crew: Crew, config: RunConfig, optimizer: Any) -> None:
    """Let a built optimizer share its points. Raises `InputError` where there are fewer of them than workers."""
    if crew.size == 1:
        return
    assert isinstance(optimizer, ForwardOptimizer)
    crew.shares = config.train.workers or "points"
    crew.exchange = Losses(crew.parts)
    optimizer.exchange = crew.exchange
    with contextlib.closing(optimizer.probe.ask(0, {"lr": float(optimizer.param_groups[0]["lr"])})) as asking:
        points = len(next(asking))
    if crew.shares == "points" and points < crew.size:
        raise InputError(
            f"train.workers: {crew.size} workers share the points of a step, and {config.method.key} asks for {points}: start fewer, share "
            "the data (--workers data), or set an option for more points (n, members)"
        )
