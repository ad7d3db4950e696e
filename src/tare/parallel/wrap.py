"""Wrap: one model on several processes, each with its own part of the batch, and gradients that are the mean over all of them.

DDP holds the model whole on each (arXiv 2006.15704), FSDP2 cuts it by blocks (arXiv 2304.11277), HSDP cuts it within groups of them.
Where gradients may not wait for the end of backward, whole models send them leaf by leaf.
"""

import inspect
import socket
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tare.core.block_list import block_list
from tare.core.clipping import squared_norm
from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.shard.layout import is_sharded, local, summed
from tare.core.weights import plain_parts
from tare.parallel.group import Crew, has_nccl
from tare.parallel.hooks import Hook

Form = Literal["alone", "ddp", "leaves", "fsdp"]
# What DDP calls the copying of worker 0's buffers at every forward; older ones know the second name alone.
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(nn.parallel.DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class Unit:
    """Bytes of a process's piece of what is gathered at once, padded to the largest one: of weights, and of gradients as they are sent."""

    weights: int
    gradients: int

    @classmethod
    def of(cls, params: Iterable[Tensor], shards: int, reduce: torch.dtype | None) -> "Unit":
        sizes = [(-(-p.shape[0] // shards) * (p.numel() // max(1, p.shape[0])), p) for p in params]
        weights = sum(size * p.element_size() for size, p in sizes)
        return cls(weights, sum(size * (reduce or p.dtype).itemsize for size, p in sizes if p.requires_grad))


@dataclass
class Spread:
    """How a model lies over processes, and what a step does differently because of it.

    Args:
        module: what is called in training: the model, or DDP's wrapper around it.
        form: `leaves`: whole on each, gradients averaged one by one inside backward.
        each: whether gradients are averaged after every micro-batch; else once a step.
        handles: of hooks.
        hook: what compresses gradients on their way, if anything does.
        units, shards, repeated: of `fsdp`: what is gathered at once, the root last; pieces of a weight; how often there is each.
    """

    module: nn.Module
    form: Form = "alone"
    each: bool = False
    handles: list[Any] = field(default_factory=list, repr=False)
    hook: Hook | None = field(default=None, repr=False)
    units: list["Unit"] = field(default_factory=list, repr=False)
    shards: int = 1
    repeated: int = 1

    @property
    def in_step(self) -> bool:
        """Whether a forward needs all processes."""
        return self.form == "fsdp"

    def micro_batch(self, last: bool) -> None:
        """Called before the forward of a micro-batch. last: of the step."""
        if self.form == "ddp":
            self.module.require_backward_grad_sync = last or self.each  # type: ignore[assignment]  # what DDP.no_sync sets
        elif self.form == "fsdp":
            self.module.set_requires_gradient_sync(last or self.each)  # type: ignore[operator]

    def drop(self) -> None:
        """Forget the gradients of a step that is not taken, those too that FSDP2 keeps whole until the last micro-batch, out of the
        reach of `zero_grad`."""
        if self.form != "fsdp" or self.each:
            return
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            for param in group.fsdp_params if group else ():
                param.unsharded_accumulated_grad = None
                if (whole := getattr(param, "_unsharded_param", None)) is not None:
                    whole.grad = None

    def traffic(self, batches: int) -> dict[str, int]:
        """Bytes that this process hands to collectives for weights and gradients in a step of so many micro-batches, by kind.

        `reduced`: gradients, for an all-reduce. `gathered`: its shard of every unit of weights, at each forward and, of blocks, each
        backward. `scattered`: whole gradients of every unit, for a reduce-scatter.
        """
        if self.form == "alone":
            return {}
        times = batches if self.each else 1
        if self.form != "fsdp":
            trained = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
            return {"reduced": times * trained}
        *blocks, root = self.units
        gathered = batches * (2 * sum(unit.weights for unit in blocks) + root.weights)
        gradients = times * sum(unit.gradients for unit in self.units)
        found = {"gathered": gathered, "scattered": self.shards * gradients}
        return found if self.repeated == 1 else {**found, "reduced": gradients}

    def sent(self, batches: int, size: int) -> int:
        """Bytes of `traffic`, or of what a hook makes of it, that this one of `size` processes sends, where collectives run as rings."""
        if self.hook is not None:
            return self.hook.last.sent
        found = self.traffic(batches)
        around = size if self.form != "fsdp" else self.repeated
        return (
            2 * (around - 1) * found.get("reduced", 0) // around
            + (self.shards - 1) * found.get("gathered", 0)
            + (self.shards - 1) * found.get("scattered", 0) // self.shards
        )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def replicate(model: nn.Module, *, partial: bool = False, each: bool = False) -> Spread:
    """DDP: the whole model on each process, gradients averaged in buckets while backward goes on.

    partial: some weights may have no gradient in a step. each: average after every micro-batch. Check the device first.
    """
    device = next(model.parameters()).device
    saved = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    options: dict[str, Any] = {_BUFFERS: bool(saved)}  # those that are not saved are constants
    places = [device] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel(
        model, device_ids=places, gradient_as_bucket_view=True, find_unused_parameters=partial, **options
    )
    return Spread(ddp, "ddp", each)


def leaf_by_leaf(model: nn.Module, crew: Crew) -> Spread:
    """The whole model on each process, each gradient averaged by a hook as soon as it is there: before hooks that are registered later.

    Every process must have the same gradients in the same order. Raises InputError as `check_device`.
    """
    check_device(model, crew)
    return Spread(model, "leaves", True, average_leaves(model))


def average_leaves(model: nn.Module) -> list[Any]:
    """Average every gradient over all processes as soon as backward has it. Returns handles of the hooks."""
    size = dist.get_world_size()

    def average(p: Tensor) -> None:
        grad = p.grad
        assert grad is not None
        grad.div_(size)
        turned = not grad.is_contiguous() and grad.mT.is_contiguous() if grad.ndim > 1 else False
        whole = grad.mT if turned else grad.contiguous()
        dist.all_reduce(whole)
        if not turned and whole is not grad:
            grad.copy_(whole)

    return [p.register_post_accumulate_grad_hook(average) for p in model.parameters() if p.requires_grad]


def shard(
    model: nn.Module, crew: Crew, device: torch.device, *, shards: int | None = None, each: bool = True
) -> Spread:
    """Cut every weight by rows among processes, block by block; what is outside of the blocks, tied weights with it, is a unit of its own.

    The optimizer is to be built afterwards. Gradients are reduced in fp32 whatever they are kept in.

    Args:
        device: where the shards go; the model may be on the CPU still.
        shards: processes among which the weights are cut, and that is repeated (HSDP); None: all of them (FSDP2).
        each: reduce gradients after every micro-batch; else once a step, for which whole gradients wait on every process.

    Raises:
        InputError: no list of equal blocks; int8 weights; weights tied across blocks; CUDA without NCCL.
    """
    check_device(model, crew, device)
    blocks = _units(model)
    count = shards or crew.size
    reduce = _reduced_in(model)
    inside = {p for block in blocks for p in block.parameters()}
    units = [Unit.of(block.parameters(), count, reduce) for block in blocks]
    units.append(Unit.of((p for p in model.parameters() if p not in inside), count, reduce))
    cut(model, blocks, mesh_of(device.type, count, crew.size // count))
    model.to(device)  # buffers
    return Spread(model, "fsdp", each, units=units, shards=count, repeated=crew.size // count)


def mesh_of(device: str, shards: int, replicas: int = 1) -> Any:
    """All ranks as [shards], or as [replicas, shards]."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def cut(model: nn.Module, blocks: Iterable[nn.Module], mesh: Any) -> None:
    """`fully_shard` each block, and then what is around them; 16-bit gradients are reduced in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=_reduced_in(model), cast_forward_inputs=False)
    for block in [*blocks, model]:
        fully_shard(block, mesh=mesh, mp_policy=policy)


def _reduced_in(model: nn.Module) -> torch.dtype | None:
    return torch.float32 if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()) else None


def _units(model: nn.Module) -> list[nn.Module]:
    found = block_list(model)
    if found is None:
        raise InputError(
            f"train.parallel: a {type(model).__name__} has no list of equal blocks (nn.ModuleList) to cut it by; use ddp"
        )
    name, blocks = found
    inside = {part: number for number, block in enumerate(blocks) for part in block.modules()}
    owners: dict[Tensor, set[int]] = defaultdict(set)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[p].add(inside.get(module, -1))
    for leaf, p in model.named_parameters():
        if len(owners[p]) > 1:
            raise InputError(
                f"train.parallel: {leaf} is tied across the blocks of {name}, which are cut one by one; use ddp, or untie it"
            )
        if isinstance(p, Int8Weight):
            raise InputError(
                f"train.parallel: {leaf} is int8, which cannot be cut among processes; use ddp, or storage.weight plain"
            )
    return list(blocks)


def check_device(model: nn.Module, crew: Crew, device: torch.device | None = None) -> None:
    """Raise InputError unless gradients can go between the processes where the model is."""
    place = device or next(model.parameters()).device
    if place.type == "mps":
        raise InputError("run.device: mps has no way to send gradients between processes; use cpu, or one process")
    if place.type != "cuda":
        return
    if not has_nccl():
        raise InputError(
            "run.device: gradients on CUDA go by NCCL, and these processes have joined by gloo; use --device cuda (one device each), or "
            'init_process_group("cpu:gloo,cuda:nccl") before, or --device cpu'
        )
    places = crew.gather((socket.gethostname(), place.index or 0))
    if len(set(places)) < len(places):
        raise InputError(
            f"run.device: {crew.size} processes share a CUDA device ({place}); NCCL wants one for each: use --device cuda, or start fewer"
        )


def always_reached(loss: Tensor, model: nn.Module) -> bool:
    """Whether backward of a loss gives every weight that is trained a gradient; nothing is computed."""
    seen, todo, reached = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(node.variable)
        todo.extend(after for after, _ in node.next_functions)
    return all(p in reached for p in model.parameters() if p.requires_grad)


# -- numbers of what lies on several processes ---------------------------------------------------------------------------


def squares(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Squared norms of gradients, of the whole where they are cut; all of those by one message."""
    found = list(gradients)
    own = [squared_norm(local(gradient)) for gradient in found]
    alike: dict[Any, list[int]] = defaultdict(list)
    for at, gradient in enumerate(found):
        if is_sharded(gradient):
            alike[gradient.device_mesh, gradient.placements].append(at)  # type: ignore[attr-defined]
    for places in alike.values():
        both = summed(torch.stack([own[at].double() for at in places]), found[places[0]])
        for at, number in zip(places, both, strict=True):
            own[at] = number
    return own


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict of a model that is cut, whole and on the CPU, gathered leaf by leaf; tied weights share memory. All call it together.

    keep: whether this process wants it; else it is empty here.
    """
    held: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in held:
            whole = tensor.detach()
            whole = whole.full_tensor() if is_sharded(whole) else whole
            if not keep:
                continue
            held[id(tensor)] = whole.cpu()
        state[name] = held[id(tensor)]
    return state


def local_weights(model: nn.Module) -> dict[str, Tensor]:
    """This process's part of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {part: local(inner) for name, t in named for part, inner in plain_parts(name, t.detach()).items()}


def differing(model: nn.Module, crew: Crew, shards: int = 1) -> tuple[int, str] | None:
    """A process whose weights are not those of process 0, and the first leaf that differs; None if all are the same.

    Compared are sums of the bits of every leaf, weighted by place, modulo 2^64. All call it together.

    shards: of HSDP: process r is compared with r modulo shards, which has the same pieces.
    """
    weights = local_weights(model)
    rows = crew.gather({name: fold(tensor) for name, tensor in weights.items()})
    for rank, row in enumerate(rows):
        if row != (first := rows[rank % shards]):
            return rank, next(name for name in weights if row.get(name) != first.get(name))
    return None


@torch.no_grad()
def fold(tensor: Tensor) -> int:
    """A number of all bits of a tensor, computed where it lies and in little memory.

    >>> fold(torch.tensor([1.0, 2.0])) != fold(torch.tensor([2.0, 1.0])), fold(torch.ones(3)) == fold(torch.ones(3))
    (True, True)
    """
    flat = tensor.detach().contiguous().view(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = 0
    for start, piece in enumerate(flat.view(width).split(1 << 20)):
        at = torch.arange(1, len(piece) + 1, device=piece.device)
        total = (total * 1_000_003 + int((piece.long() * (2 * at + 1)).sum()) + start) % (1 << 64)
    return total
