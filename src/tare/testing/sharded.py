"""Sharded: what every registered method must keep to where its leaves are cut among ranks. Each check runs on all ranks of a group.

Leaves are DTensors as `fully_shard` makes them, with the gradients of `subject`, so what differs from one process is the engine's doing.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from tare.core.storage import Storage
from tare.testing.subject import SHAPES, Subject, gradient, leaves, near

# Rows even and uneven among two or three ranks, fewer rows than ranks, none; `gain` has no rows and stays whole on every rank.
NAMES = tuple(name for name in SHAPES if name != "nothing")
STEPS = 5  # past the second refresh
# Element-wise kernels treat the last few elements of a piece apart, and fused multiply-adds round once where two operations round twice.
GAP = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.0}


def cut(named: list[tuple[str, nn.Parameter]], mesh: Any) -> list[tuple[str, nn.Parameter]]:
    """The same parameters, cut along dimension 0."""
    return [(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) if p.ndim else p) for name, p in named]


def whole(value: Any) -> Any:
    """A DTensor from all ranks; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def drive_cut(optimizer: torch.optim.Optimizer, named: Any, mesh: Any, first: int, last: int) -> None:
    """Updates first .. last - 1 with the fixed gradients, cut like the parameters."""
    for step in range(first, last):
        for name, p in named:
            grad = gradient(name, step, tuple(p.shape), p.dtype)
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if p.ndim else grad
        optimizer.step()


def check_equals_one_process(
    key: str, mesh: Any, storage: Storage | None = None, dtype: torch.dtype = torch.float32, **own: Any
) -> dict[str, Any]:
    """Steps of cut leaves are those of whole ones, and so is their state. Returns bytes of state here, and in one process."""
    subject = Subject(key)
    alone, together = leaves(NAMES, dtype), cut(leaves(NAMES, dtype), mesh)
    reference = subject.build(alone, storage=storage or Storage(), weight_decay=0.1, **own)
    optimizer = subject.build(together, storage=storage or Storage(), weight_decay=0.1, **own)
    for step in range(STEPS):
        for name, p in alone:
            p.grad = gradient(name, step, tuple(p.shape), p.dtype)
        reference.step()
        drive_cut(optimizer, together, mesh, step, step + 1)
    what = f"{key} {dtype} {storage or ''}"
    near(
        {name: whole(p.detach()) for name, p in together}, {name: p.detach() for name, p in alone}, GAP[dtype], what
    )  # fmt: skip
    states = [
        (name, optimizer.state[cut_p], reference.state[p])
        for (name, cut_p), (_, p) in zip(together, alone, strict=True)
    ]
    for name, mine, theirs in states:
        assert mine.get("step") == theirs.get("step"), f"{what}: {name} has taken {mine.get('step')} steps"
        for part, value in mine.items():
            found, wanted = whole(value), theirs[part]
            if isinstance(wanted, Tensor):
                assert found.shape == wanted.shape, f"{what}: {part} of {name} is {tuple(found.shape)}"
                assert found.dtype == wanted.dtype, f"{what}: {part} of {name} is {found.dtype}"
            else:
                assert found == wanted, f"{what}: {part} of {name} is {found}, alone {wanted}"
    return {"here": int(optimizer.state_bytes()), "alone": int(reference.state_bytes()), "kept": _kept(optimizer)}


def _kept(optimizer: Any) -> int:
    """Bytes of the tensors that this rank really holds."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    locals_ = [v.to_local() if isinstance(v, DTensor) else v for v in tensors]
    return sum(v.numel() * v.element_size() for v in locals_)


def check_goes_on_after_loading(key: str, mesh: Any, storage: Storage | None = None) -> None:
    """What `state_dict` gives on each rank is taken up, and so is the state of one process: the steps after it are the same bits."""
    subject, half = Subject(key), STEPS // 2 + 1
    first = cut(leaves(NAMES), mesh)
    optimizer = subject.build(first, storage=storage or Storage())
    drive_cut(optimizer, first, mesh, 0, half)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {name: whole(p.detach()).clone() for name, p in first}
    drive_cut(optimizer, first, mesh, half, STEPS + 2)
    alone = leaves(NAMES)
    reference = subject.build(alone, storage=storage or Storage())
    for step in range(half):
        for name, p in alone:
            p.grad = gradient(name, step, tuple(p.shape), p.dtype)
        reference.step()
    for kind, state in (("its own state", saved), ("that of one process", reference.state_dict())):
        start = [(name, nn.Parameter(weights[name].clone())) for name, _ in alone]
        second = cut(start, mesh)
        other = subject.build(second, storage=storage or Storage())
        other.load_state_dict(state)
        drive_cut(other, second, mesh, half, STEPS + 2)
        gap = 0.0 if kind == "its own state" else GAP[torch.float32]
        near(
            {name: whole(p.detach()) for name, p in second}, {name: whole(p.detach()) for name, p in first}, gap,
            f"{key} with {kind}",
        )  # fmt: skip


def forms() -> dict[str, Storage]:
    """Ways to keep moments that are cut where rows are, and weights that are rounded at random."""
    small = {"min_quantized": 1}
    return {
        "int8": Storage("int8", block=4, **small),  # type: ignore[arg-type]
        "bf16": Storage("bf16"),
        "int8-straddling": replace(Storage("int8", block=64), min_quantized=1),
    }


def mesh_of(size: int) -> Any:
    """All ranks in a row."""
    return init_device_mesh("cpu", (size,))
