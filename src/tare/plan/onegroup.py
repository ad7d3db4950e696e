"""One process that plays rank 0 of many: the real `fully_shard` model on fake tensors, in a group that only pretends to communicate.

What torch's own engine holds is thereby followed and not modelled, for any model and any number of ranks. `plan.sharded` gives the same
by arithmetic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed as dist
from torch import nn

from tare.core.errors import InputError
from tare.parallel.wrap import cut, mesh_of
from tare.plan.activations import Precision, Tokens, Workload, autocast, fake_tensors, skeleton
from tare.plan.models import enable_checkpointing
from tare.plan.profile import Moment
from tare.plan.sharded import Sharded
from tare.plan.tracker import MemoryTracker
from tare.plan.units import units

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The buffers of collectives, by operator: the place of the argument that is one.
BUFFERS = {"fsdp::all_gather_copy_in": 1, "c10d::_reduce_scatter_base_": 1}
OUT = (
    "fsdp::chunk_cat",
    "fsdp::split_with_sizes_copy",
)  # those that write into buffers and whole weights given as `out`


def can_follow() -> bool:
    """Whether this torch knows the collectives of `fully_shard` on fake tensors: 2.8 does not."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("c10d::_allgather_base_", "Meta"))


@contextmanager
def pretended(shards: int, replicas: int = 1) -> Iterator[Any]:
    """The mesh [shards], or [replicas, shards], of which this process is rank 0; nothing is ever sent.

    Raises:
        InputError: this process is part of a real group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InputError("plan: ranks cannot be planned from within a process group; plan before it is made, or after")
    store = cast(Any, FakeStore)()
    dist.init_process_group("fake", store=store, rank=0, world_size=shards * replicas)
    try:
        yield mesh_of("cpu", shards, replicas)
    finally:
        dist.destroy_process_group()


class RankTracker(MemoryTracker):
    """A tracker that looks into DTensors, sees storages that change their size, and knows the buffers of collectives."""

    def __enter__(self) -> "RankTracker":
        self._resize = torch.UntypedStorage.resize_
        resize, tracker = self._resize, self

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracker.resized(storage, size)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*fault)

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage anew: only the weights that `fully_shard` gathers and drops change their size."""
        known = self._alive.get(storage._cdata)
        if known is not None:
            self._add(known[1], -known[0])
            self._alive[storage._cdata] = (size, "gathered", known[2])
            self._add("gathered", size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # which then comes again with its pieces
        result = super().__torch_dispatch__(func, types, args, kwargs)
        at = BUFFERS.get(func._schema.name)
        if at is not None:
            self.mark([args[at]], "gathered")
        elif func._schema.name in OUT:
            out = (kwargs or {})["out"]
            self.mark([out] if isinstance(out, torch.Tensor) else out, "gathered")
        return result

    def _count(self, tensor: torch.Tensor, category: Any) -> None:
        super()._count(getattr(tensor, "_local_tensor", tensor), category)


def track_shards(
    config: "PretrainedConfig",
    batch: int,
    seq: int,
    dtype: torch.dtype,
    precision: Precision,
    *,
    shards: int,
    replicas: int = 1,
    checkpointing: bool = False,
    trained: tuple[str, ...] | None = None,
    work: Workload | None = None,
) -> tuple[int, Sharded]:
    """Bytes of weights on rank 0, and its highest moments.

    Args:
        config: of the model. batch, seq: of one rank's micro-batch.
        shards: ranks that share the weights; replicas: how many such groups there are.
        checkpointing, trained, work: as for `profile_model`.
    """
    with pretended(shards, replicas) as mesh, fake_tensors():
        model = skeleton(config, dtype, work).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained is None or name in trained)
        if checkpointing:
            enable_checkpointing(model)
        cut(model, [part for _, part in units(model)], mesh)
        found = track_rank(model, work or Tokens(torch.zeros(batch, seq, dtype=torch.long)), precision)
        del model
    return found


def track_rank(model: nn.Module, work: Workload, precision: Precision = "fp32") -> tuple[int, Sharded]:
    """Track an evaluation and a micro-batch of a model that `parallel.wrap.cut` has cut."""
    tracker = RankTracker()
    for parameter in model.parameters():
        tracker.mark([_padded(parameter)], "parameter")
    tracker.mark(model.buffers(), "parameter")
    weights = tracker.total
    batch, held = work.batches()
    tracker.mark(work.tensors(batch), "input")
    hooks: list[Any] = [
        p.register_post_accumulate_grad_hook(_finished(tracker)) for p in model.parameters() if p.requires_grad
    ]
    for part in (model, *(unit for _, unit in units(model))):  # called after `fully_shard` has gathered it
        hooks.append(part.register_forward_pre_hook(_gathered(tracker)))
    with tracker:
        with tracker.phase("forward", born="activation"), autocast(precision):
            loss = work.loss(model, batch)
        with tracker.phase("backward"):
            loss.backward()
        gradients = tracker.current["gradient"]
        del loss
        model.zero_grad()
        with tracker.phase("evaluation", born="activation"), torch.no_grad(), autocast(precision):
            work.look(model, held)
    for hook in hooks:
        hook.remove()
    forward, backward, evaluation = (Moment.of(tracker.peak(name)) for name in ("forward", "backward", "evaluation"))
    return weights, Sharded(forward, backward, evaluation, gradients)


def _padded(parameter: torch.Tensor) -> torch.Tensor:
    """What a rank holds of a parameter: the piece that `fully_shard` keeps, padded."""
    return getattr(parameter, "_local_tensor", parameter)


def _gathered(tracker: MemoryTracker) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        from torch.distributed.tensor import DTensor

        tracker.mark((p for p in module.parameters() if not isinstance(p, DTensor)), "gathered")

    return hook


def _finished(tracker: MemoryTracker) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        tracker.mark([parameter.grad], "gradient")

    return hook
