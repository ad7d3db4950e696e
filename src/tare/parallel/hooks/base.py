"""Hook: what all communication hooks share: the names of leaves, the count of steps and bytes, and a state that can be saved."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tare.core.errors import CheckpointError, InputError
from tare.parallel.hooks.wire import Traffic, Wire

if TYPE_CHECKING:
    from torch.distributed import GradBucket
else:
    GradBucket = getattr(dist, "GradBucket", object)  # builds of torch without it may import this

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
H = TypeVar("H", bound="Hook")


@dataclass
class Piece:
    """One leaf's part of a bucket: its elements in the order of memory, flat, and the same as its shape has them."""

    name: str
    parameter: Tensor
    flat: Tensor
    grad: Tensor


class Hook:
    """Base of the communication hooks of this library.

    Every hook leaves one and the same gradient on all ranks, which stands for the mean of theirs. It is called once for each bucket of
    gradients in a backward that synchronises (not inside `no_sync`); a step is counted when the last bucket comes.

    Args:
        group: the process group; None: that of all processes. Give what DDP was given.
    """

    kind: ClassVar[str] = ""

    def __init__(self, group: Any = None):
        self.wire = Wire(group)
        self.steps = 0  # backward passes that were exchanged
        self.traffic = Traffic()  # of all of them
        self.last = Traffic()  # of the last one
        self._names: dict[Tensor, str] = {}

    # -- taking part ---------------------------------------------------------------------------------------------------

    def attach(self: H, model: nn.Module) -> H:
        """Let a DDP model exchange its gradients through this hook; once per model, before its first backward. Returns the hook.

        Raises:
            InputError: `model` is not a `DistributedDataParallel`, or has a hook.
        """
        self.name_leaves(model)
        assert isinstance(model, DistributedDataParallel)
        try:
            model.register_comm_hook(self, compress)
        except RuntimeError as fault:
            if "register_comm_hook" not in str(fault):
                raise
            raise InputError(
                f"{type(self).__name__}: this model has a communication hook already, and torch takes one; wrap the model anew"
            ) from fault
        return self

    def name_leaves(self: H, model: nn.Module) -> H:
        """Learn the names of a DDP model's leaves, for those who call `model.register_comm_hook(hook, tare.hooks.compress)`."""
        if not isinstance(model, DistributedDataParallel):
            raise InputError(
                f"{type(self).__name__}: expected a torch.nn.parallel.DistributedDataParallel, got {type(model).__name__}; wrap the model "
                "first (FSDP exchanges gradients by itself and takes no hooks of this kind)"
            )
        self._names = {p: name for name, p in model.module.named_parameters() if p.requires_grad}
        return self

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What one bucket becomes. Called by torch, through `compress`."""
        buffer = bucket.buffer()
        if not self._names:
            raise InputError(
                f"{type(self).__name__}: it does not know the model's leaves; use attach(ddp_model), or name_leaves(ddp_model) before "
                "register_comm_hook"
            )
        if buffer.is_sparse or buffer.dtype not in DTYPES:
            what = "sparse gradients" if buffer.is_sparse else f"gradients in {buffer.dtype}"
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise InputError(f"{type(self).__name__}: {what} are not offered; expected dense ones in {allowed}")
        self.wire.now.whole += 2 * (self.wire.size - 1) * buffer.nbytes // self.wire.size
        with torch.no_grad():
            found = self.exchange(bucket)
        if bucket.is_last():
            self.steps += 1
            self.last, self.wire.now = self.wire.now, Traffic()
            self.traffic.add(self.last)
        return found

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The same, where it is known to be sound."""
        raise NotImplementedError

    def pieces(self, bucket: GradBucket) -> Iterator[Piece]:
        """The leaves of a bucket, in its order."""
        buffer, start = bucket.buffer(), 0
        for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if p not in self._names:
                raise InputError(
                    f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} is new since the hook was attached"
                )
            yield Piece(self._names[p], p, buffer[start : start + p.numel()], grad)
            start += p.numel()

    def send_whole(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """A bucket as DDP itself would reduce it."""
        found: torch.futures.Future[Tensor] = self.wire.mean(buffer).then(lambda done: done.value()[0])
        return found

    # -- words and bytes -----------------------------------------------------------------------------------------------

    @property
    def bytes_sent(self) -> int:
        """By this rank in all steps, if collectives run as rings; see `Traffic`. `last.sent`: in the last step."""
        return self.traffic.sent

    @property
    def bytes_whole(self) -> int:
        """What whole gradients would have taken."""
        return self.traffic.whole

    def describe(self) -> str:
        """A few words: what is sent."""
        return self.kind

    def report(self) -> str:
        """A line: bytes of a step, and what they would have been."""
        if not self.steps:
            return f"{self.describe()}; nothing sent yet"
        share = self.traffic.sent / max(1, self.traffic.whole)
        return (
            f"{self.describe()}; sent {self.traffic.sent / self.steps:,.0f} bytes a step by each of {self.wire.size} ranks instead of "
            f"{self.traffic.whole / self.steps:,.0f} ({100 * share:.3g} %)"
        )

    # -- state ---------------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """What further steps depend on: numbers, words and tensors by name; `error.` before the names of those that ranks have apart."""
        return {}

    def load_own(self, state: dict[str, Any]) -> None:
        """Take what `own_state` gave; tensors may be taken as they are. Raises `CheckpointError`."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: a flat dict of tensors (not copied), numbers and words; safe for `torch.load(weights_only=True)`.

        Ranks differ in what error feedback keeps: save one for each rank, or `gather_state`.
        """
        counts = {
            "steps": self.steps,
            "sent": self.traffic.sent,
            "whole": self.traffic.whole,
            "calls": self.traffic.calls,
        }
        return {"hook": self.kind, **counts, **self.own_state()}

    def gather_state(self) -> dict[str, Any] | None:
        """The state of all ranks in one dict on rank 0, on the CPU; None on the others. All ranks must call it.

        What ranks have apart is [ranks, ...] there. `load_state_dict` takes it with any number of ranks.
        """
        state, size, first = self.state_dict(), self.wire.size, self.wire.rank == 0
        root = dist.get_global_rank(self.wire.group, 0) if self.wire.group is not None else 0
        for name in [name for name in state if name.startswith("error.")]:
            mine = state[name]
            rows = [torch.empty_like(mine) for _ in range(size)] if first else None
            dist.gather(mine, rows, dst=root, group=self.wire.group)
            if rows is not None:
                state[name] = torch.stack([row.cpu() for row in rows])
        if not first:
            return None
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave on this rank, or `gather_state` on rank 0: with as many ranks as then each takes its own, and
        goes on bit for bit; with others all take the mean of what the ranks kept, so that nothing owed is lost.

        Raises:
            CheckpointError: the state of another hook or of another model.
        """
        if state.get("hook") != self.kind:
            raise CheckpointError(
                f"{type(self).__name__}: the state is that of {state.get('hook')!r}, expected {self.kind!r}"
            )
        self.load_own({name: self._own(value) if name.startswith("error.") else value for name, value in state.items()})
        self.steps = int(state["steps"])
        self.traffic = Traffic(int(state["sent"]), int(state["whole"]), int(state["calls"]))
        self.last, self.wire.now = Traffic(), Traffic()

    def _own(self, value: Tensor) -> Tensor:
        if value.ndim == 1:
            return value
        return value[self.wire.rank] if len(value) == self.wire.size else value.mean(0)


def compress(state: Hook, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What `DistributedDataParallel.register_comm_hook` takes, with a hook as the state."""
    return state.reduce(bucket)
