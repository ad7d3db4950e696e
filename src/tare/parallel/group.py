"""Group: the processes that take the steps of one run together (torchrun), seen from one of them.

How they come together and part, agree on whether to go on, and end all together on a fault of which one of them tells.
"""

import contextlib
import gc
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import distributed as dist

from tare.core.errors import InputError
from tare.parallel.meeting import meeting
from tare.zeroth.exchange import Workers, WorkersFailed

PATIENCE = timedelta(
    hours=12
)  # of those who wait for worker 0 to plan and to save; one that is gone is noticed at once
DEADLINE = timedelta(minutes=30)  # of what is exchanged inside a step
PARTING = timedelta(seconds=5)  # of those who part after a fault in a group that stays, or at the end, for the others
LOOK = timedelta(seconds=0.5)  # how often those who wait look whether one has told of a fault
GO_ON, STOP, FAILED = 0.0, 1.0, 2.0
ROOM = 3  # numbers in a message beside its first word; all are of one length, so that a fault is heard in place of any
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BROKEN = (
    "closed by peer",
    "reset by peer",
    "timed out waiting",
    "broken pipe",
    "connection refused",
    "socket",
    "nccl",
)
_joins = 0  # of this process; the same on all
_control: Any = None  # the group of control messages, where `join` has opened the default one
_broken = False  # whether a fault has ended what they did together

T = TypeVar("T")


class Elsewhere(RuntimeError):
    """The run has ended on a fault that another worker tells of; its cause is what this one saw of it."""


@dataclass
class Crew:
    """The workers of a run, seen from one of them; the defaults are those of a process by itself.

    shares: what is shared out, the points of a step or its batch. exchange: of losses, for methods without gradients. sent: bytes sent
    besides. control: the group (gloo) for the few numbers that they agree by. number: of the run in this process. ours: the
    groups end with the run, and its processes with a fault; else a fault is told to who waits.
    """

    rank: int = 0
    size: int = 1
    local: int = 0  # which one on this machine
    shares: Literal["points", "data"] = "points"
    exchange: Workers | None = None
    sent: int = 0
    control: Any = field(default=None, repr=False)
    number: int = 0
    ours: bool = False

    @property
    def first(self) -> bool:
        """Whether this one writes and shows."""
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
    def on_host(self) -> int:
        """How many there are on this machine, as torchrun says; else all."""
        return int(os.environ.get("LOCAL_WORLD_SIZE") or self.size)

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

    # -- messages --------------------------------------------------------------------------------------------------

    def share(self, make: Callable[[], T]) -> T:
        """What worker 0 makes, on all."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        self._message(GO_ON, [], PATIENCE)  # so that those who wait hear of it if it could not be made
        dist.broadcast_object_list(box, _root(self.control), group=self.control)
        found: T = box[0]  # type: ignore[assignment]
        return found

    def gather(self, own: T) -> list[T]:
        """Everybody's, by rank; plain values."""
        if self.size == 1:
            return [own]
        rows: list[Any] = [None] * self.size
        dist.all_gather_object(rows, own, group=self.control)
        return rows

    def sums(self, *own: float) -> list[float]:
        """The sum over workers of each number, exactly rounded and therefore the same on all; NaN and infinity come through."""
        if self.size == 1:
            return list(own)
        found: list[float] = []
        for start in range(0, len(own), ROOM):
            some = own[start : start + ROOM]
            rows = self._message(GO_ON, some, DEADLINE)
            found += [_sum(column) for column in zip(*(row[1:] for row in rows), strict=True)][: len(some)]
        return found

    def dealt(self, items: Iterable[T], in_step: bool = False) -> Iterator[tuple[int, T, bool]]:
        """This worker's part of what is evaluated, dealt out in turn: number, item, and whether it counts.

        in_step: every worker gets as many, since each can only act with all others; what is there to make up the number does not count.
        """
        hand: list[tuple[int, T]] = []
        for pair in enumerate(items):
            hand.append(pair)
            if len(hand) == self.size:
                yield (*hand[self.rank], True)
                hand = []
        if self.rank < len(hand):
            yield (*hand[self.rank], True)
        elif hand and in_step:
            yield (*hand[0], False)

    # -- agreement -------------------------------------------------------------------------------------------------

    def agree(self, stop: bool = False) -> bool:
        """Whether any worker wants to stop. Raises `WorkersFailed` where one has failed or is gone."""
        if self.size == 1:
            return stop
        return STOP in [row[0] for row in self._message(STOP if stop else GO_ON, [], PATIENCE)]

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
            global _broken
            _broken = True
            seen = _lost(fault) or fault
            if not self._speaks(seen):
                raise Elsewhere(str(seen)) from fault
            seen.of_worker = True  # type: ignore[attr-defined]
            if seen is fault:
                raise
            raise seen from fault

    def _speaks(self, fault: Exception) -> bool:
        """Whether it is for this worker to tell of a fault: for the first that claims it. Nobody is left waiting in a group that stays."""
        told = isinstance(fault, WorkersFailed) and fault.told
        winner = -1 if told else self._claim(fault)
        if not self.ours and not getattr(fault, "answered", False):
            with contextlib.suppress(WorkersFailed):
                self._message(FAILED, [], PARTING)
        return winner == self.rank

    def _claim(self, fault: Exception) -> int:
        try:
            return int(_store().compare_set(self._key, "", str(self.rank)))
        except RuntimeError:  # who kept the store is gone: worker 0, or what has launched them
            told = isinstance(fault, InputError)  # wrong input is the same for all: worker 0 has said so before it left
            return 0 if told else min(self.rank, 1)

    def _claimed(self) -> int | None:
        try:
            store = _store()
            return int(store.get(self._key)) if store.check([self._key]) else None
        except RuntimeError:
            return None

    @property
    def _key(self) -> str:
        return f"tare/fault/{self.number}"

    def _message(self, word: float, numbers: Sequence[float], patience: timedelta) -> list[list[float]]:
        """Everybody's word and numbers. Raises `WorkersFailed` where one has failed or is gone."""
        padded = [word, *numbers, *[0.0] * (ROOM - len(numbers))]
        mine = torch.tensor(padded, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(rows, mine, group=self.control, async_op=True)
            self._wait(work, patience)
        except RuntimeError as fault:
            if isinstance(fault, WorkersFailed):
                raise
            raise _gone(fault) from fault
        self.sent += mine.numel() * mine.itemsize
        found = [row.tolist() for row in rows]
        words = [row[0] for row in found]
        if FAILED in words and word != FAILED:
            heard = WorkersFailed(f"worker {words.index(FAILED)} failed, its own message says how", told=True)
            heard.answered = True  # type: ignore[attr-defined]
            raise heard
        return found

    def _wait(self, work: Any, patience: timedelta) -> None:
        """Until a message is there. Raises `WorkersFailed` as soon as another worker has claimed a fault: it will not answer any more."""
        if not self.ours:
            work.wait(patience)
            return
        end = time.monotonic() + patience.total_seconds()
        while not work.is_completed():
            try:
                work.wait(LOOK)
            except RuntimeError:
                if work.is_completed() or time.monotonic() > end:
                    raise
                if (who := self._claimed()) is not None and who != self.rank:
                    raise WorkersFailed(f"worker {who} failed, its own message says how", told=True) from None
        work.wait()


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[Crew]:
    """The workers that this process was started with, by torchrun or a process group that is there already; else itself alone.

    device: the setting; where each worker has a CUDA device of its own, tensors there go by NCCL, all others by gloo.

    Raises:
        InputError: some of torchrun's variables are missing, or this torch cannot.
    """
    global _joins, _control, _broken
    opens = not (dist.is_available() and dist.is_initialized())
    if opens and not launched():
        yield Crew()
        return
    if not dist.is_available():
        raise InputError("torchrun: this torch has no torch.distributed; start one process")
    if opens:
        apart = torch.cuda.is_available() and device in ("auto", "cuda")
        dist.init_process_group("cpu:gloo,cuda:nccl" if apart else "gloo", timeout=DEADLINE, **meeting(DEADLINE))
    control = _control
    if control is None:
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(group=control)  # one that leaves at once would close the connections that another still opens
    if opens:
        _control = control
    _joins += 1
    _broken = _broken and not opens
    fault: BaseException | None = None
    local, ours = int(os.environ.get("LOCAL_RANK", 0)), _control is not None
    crew = Crew(dist.get_rank(), dist.get_world_size(), local, control=control, number=_joins, ours=ours)
    try:
        yield crew
    except BaseException as error:
        fault = error
        raise
    finally:
        if opens:
            _control = None
            _leave(control, fault)
        elif _control is None:
            dist.destroy_process_group(control)


def launched() -> bool:
    """Whether the environment says that this is one of several processes.

    Raises:
        InputError: it says so in part.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return False
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdigit() and int(size) < 2:
        return False
    missing = [name for name in VARIABLES if name not in os.environ]
    wrong = [name for name in ("RANK", "WORLD_SIZE") if name not in missing and not os.environ[name].isdigit()]
    if missing or wrong:
        there = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
        what = f"{', '.join(missing)} missing" if missing else f"{wrong[0]} is no number"
        raise InputError(
            f"torchrun: the environment has {there}, and {what}; start with torchrun --nproc-per-node N -m tare train ... or "
            "tare train --nproc N ..., or unset them to run alone"
        )
    return True


def has_nccl() -> bool:
    """Whether tensors on CUDA can go between the processes."""
    try:
        return "nccl" in str(dist.get_backend_config())
    except (RuntimeError, ValueError):
        return "nccl" in str(dist.get_backend())


def _leave(control: Any, fault: BaseException | None) -> None:
    """Part so that no process aborts: a model that is still wrapped would end its threads under it. The fault keeps its traceback."""
    seen = fault
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    if fault is None and not _broken:
        with contextlib.suppress(RuntimeError):  # of one that ends otherwise its own fault tells
            dist.barrier(group=control, async_op=True).wait(PARTING)
    dist.destroy_process_group()


def _root(group: Any) -> int:
    return 0 if group is None else dist.get_global_rank(group, 0)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _gone(fault: Exception) -> WorkersFailed:
    line = str(fault).strip().partition("\n")[0][:160]
    return WorkersFailed(f"a worker is gone or does not answer ({line})")


def _lost(fault: Exception) -> WorkersFailed | None:
    """What an operation of torch says when another process is gone, in our words; None for any other fault."""
    if isinstance(fault, WorkersFailed) or not isinstance(fault, RuntimeError):
        return None
    text = str(fault).lower()
    return _gone(fault) if ("gloo" in text and any(word in text for word in _BROKEN)) or "nccl error" in text else None


def _sum(column: Sequence[float]) -> float:
    return math.fsum(column) if all(map(math.isfinite, column)) else sum(column)
