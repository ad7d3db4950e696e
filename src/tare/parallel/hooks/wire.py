"""Wire: the collectives of a hook, and the count of what they send."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.futures import Future

from tare.core.errors import InputError


@dataclass
class Traffic:
    """Bytes that one rank puts on its links, if collectives run as rings, and how often it called one.

    An all-reduce of b bytes among W ranks sends 2 (W - 1) / W b from each, an all-gather of b from each sends (W - 1) b. whole: what
    sending every gradient as it is would have sent.
    """

    sent: int = 0
    whole: int = 0
    calls: int = 0

    def add(self, other: "Traffic") -> None:
        self.sent += other.sent
        self.whole += other.whole
        self.calls += other.calls


class Wire:
    """Sums and gathers among the ranks of one group. now: the traffic of the step that goes on."""

    def __init__(self, group: Any = None):
        self.group = group
        self.now = Traffic()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "hooks: torch.distributed is not set up; start with torchrun and call torch.distributed.init_process_group()"
            )
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank(self.group)

    def summed(self, payload: int) -> None:
        """Count an all-reduce of so many bytes."""
        self.now.sent += 2 * (self.size - 1) * payload // self.size
        self.now.calls += 1

    def mean(self, tensor: Tensor) -> Future[Any]:
        """The mean over ranks, in the memory of `tensor`; divided first, as DDP does, so that narrow numbers do not overflow."""
        tensor.div_(self.size)
        self.summed(tensor.nbytes)
        return _future(dist.all_reduce(tensor, group=self.group, async_op=True))

    def gather(self, mine: Tensor) -> tuple[Future[Any], Tensor]:
        """Everybody's tensor, [ranks, ...], once the future is done."""
        rows = mine.new_empty((self.size, *mine.shape))
        self.now.sent += (self.size - 1) * mine.nbytes
        self.now.calls += 1
        return _future(dist.all_gather_into_tensor(rows.view(-1), mine, group=self.group, async_op=True)), rows


def _future(work: Any) -> Future[Any]:
    found: Future[Any] = work.get_future()
    return found


def used_here(*tensors: Tensor) -> None:
    """Tell the allocator that tensors are read on the stream of this callback, which need not be the one they were made on."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
