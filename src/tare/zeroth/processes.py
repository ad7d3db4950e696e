"""Processes: what all exchanges over `torch.distributed` share: who is there, what has to be alike, and bytes that are counted."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.core.shard.layout import is_sharded
from tare.zeroth.digest import digests, parts

if TYPE_CHECKING:
    from tare.zeroth.optimizer import ForwardOptimizer

FINE, FAILED, SKIPS = 0.0, 1.0, 2.0  # what a process says of itself, first of all


class WorkersFailed(RuntimeError):
    """Another worker failed or is gone. Nobody has taken the step. told: that worker itself says how."""

    def __init__(self, text: str, told: bool = False) -> None:
        super().__init__(text)
        self.told = told


class Processes:
    """The processes of `torch.distributed` (torchrun; gloo or NCCL), which take the same steps from the same weights.

    Args:
        group: of `torch.distributed`; None: all processes.
        check_every: steps between comparisons of weights; 0: only the first.

    `sent`: bytes that this process has sent so far, `questions`: in how many messages.
    """

    def __init__(self, *, group: Any = None, check_every: int = 500):
        self.check_every = check_whole("check_every", check_every, 0)
        self.group = group
        self.sent, self.questions = 0, 0
        self._checked = -1  # the last step whose weights were compared
        self._facts, self._weights = 0, 0

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
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank(self.group) if self.workers else 0

    def begin(self, optimizer: "ForwardOptimizer") -> None:
        """What all must agree on at this step."""
        facts = self._alike(optimizer)
        for group in optimizer.param_groups:
            facts += [float(group["lr"]), float(group["weight_decay"]), int(group["seed"])]
        self._facts = _folded(repr(facts).encode())
        due = self._checked < 0 or (self.check_every and optimizer.steps - self._checked >= self.check_every)
        self._weights = 0
        if due:
            self._weights = _folded(b"".join(name.encode() + d for name, d in digests(optimizer, shared=False).items()))
            self._checked = optimizer.steps

    def _alike(self, optimizer: "ForwardOptimizer") -> list[Any]:
        """What is compared beside rates and weights."""
        return [optimizer.steps, optimizer.probe.describe()]

    def _row(self, state: float) -> list[float]:
        """What every message begins with."""
        return [state, float(self._facts), float(self._weights)]

    def _compare(self, rows: list[list[float]]) -> None:
        failed = [rank for rank, row in enumerate(rows) if row[0] == FAILED]
        if failed:
            raise WorkersFailed(
                f"exchange: worker {failed[0]} failed, its own message says how; no worker has taken this step",
                told=True,
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
        return [one.tolist() for one in self._tensors(torch.tensor(row, dtype=torch.float64))]

    def _tensors(self, own: Tensor) -> list[Tensor]:
        """Everybody's tensor of this shape, by rank, on the CPU.

        Raises:
            WorkersFailed: a process is gone.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if _nccl(self.group) else torch.device("cpu")
        mine = own.to(device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.workers)]
        try:
            dist.all_gather(found, mine, group=self.group)
        except RuntimeError as error:
            raise WorkersFailed(
                f"exchange: a worker is gone or does not answer; no worker has taken this step ({_first_line(error)})"
            ) from error
        self.sent += mine.numel() * mine.itemsize
        self.questions += 1
        return [one.cpu() for one in found]

    @torch.no_grad()
    def share_(self, model: torch.nn.Module) -> None:
        """Give all processes worker 0's weights and buffers: the only time that any are sent."""
        first = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        tensors = [*model.parameters(), *model.buffers()]
        if any(map(is_sharded, tensors)):
            raise InputError(
                "share_: fully_shard has cut the parameters, and no rank has all of them; share the model before it is cut"
            )
        for tensor in tensors:
            for piece in parts(tensor):
                dist.broadcast(piece, first, group=self.group)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}


def _folded(text: bytes) -> int:
    """A number that a double holds exactly."""
    return 1 + int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


def _nccl(group: Any) -> bool:
    return "nccl" in dist.get_backend(group)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]
