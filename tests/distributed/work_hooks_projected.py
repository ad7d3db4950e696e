"""What the ranks do for the tests of projected gradients and of PowerSGD."""

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as theirs
from torch.nn.parallel import DistributedDataParallel

from tare.core.errors import CheckpointError, InputError
from tare.core.optimizer import Optimizer
from tare.core.recipe import Recipe
from tare.core.transform import Transform
from tare.methods import registry
from tare.parallel import hooks
from tare.rules.adam import Adam
from tare.subspace.bases import GaussianBasis
from tare.subspace.refresh import every
from tare.subspace.wrapper import Subspace
from tare.testing.subject import Net, Subject, batch

STEPS = 5  # refreshes at 1 and 4


def built(key: str, view: bool = True, **own: Any) -> tuple[Any, Optimizer]:
    net = Net().double()
    optimizer = Subject(key).build(net, **own)
    # gradients that are views of buckets, as `tare train` has them, unless told otherwise
    return DistributedDataParallel(net, bucket_cap_mb=0.0005, gradient_as_bucket_view=view), optimizer


def losses(rank: int, step: int, ddp: Any) -> Tensor:
    tokens, targets = batch(2 * step + rank)
    found: Tensor = (ddp(tokens) - targets.double()).square().mean()
    return found


def gap(a: Any, b: Any) -> float:
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True))


def states(optimizer: Optimizer) -> list[Tensor]:
    return [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor) and value.numel()
    ]


def train(
    rank: int, ddp: Any, optimizer: Optimizer, steps: int = STEPS, factor: float = 1.0, hook: Any = None
) -> list[int]:
    sent = []
    for step in range(steps):
        optimizer.zero_grad()
        losses(rank, step, ddp).backward()
        if factor != 1.0:
            for p in ddp.parameters():
                p.grad.mul_(factor)
        optimizer.step()
        if hook is not None:
            sent.append(hook.last.sent)
    return sent


def every_method(rank: int, size: int) -> dict[str, Any]:
    """By method: how far weights and states are from plain DDP, bytes of steps, and what is whole; or why it is refused."""
    found: dict[str, Any] = {}
    for key in registry.keys("gradient"):
        ddp, optimizer = built(key)
        try:
            hook = hooks.Projected(optimizer).attach(ddp)
        except InputError as fault:
            found[key] = str(fault)
            continue
        sent = train(rank, ddp, optimizer, hook=hook)
        plain, reference = built(key)
        train(rank, plain, reference)
        found[key] = (
            gap(ddp.parameters(), plain.parameters()), gap(states(optimizer), states(reference)), sent, hook.last.whole, hook.why(),
            hook.describe(),
        )  # fmt: skip
    return found


def bytes_of_galore(rank: int, size: int) -> tuple[list[int], int]:
    """GaLore's bytes of each step, and those of whole gradients."""
    ddp, optimizer = built("galore")
    hook = hooks.Projected(optimizer).attach(ddp)
    return train(rank, ddp, optimizer, hook=hook), hook.last.whole


def options_of(rank: int, size: int) -> dict[str, float]:
    """The distance to plain DDP under options that change what the step does with the projection."""
    found = {}
    eight = {"moment": "int8", "min_quantized": 1}
    cases: dict[str, dict[str, Any]] = {
        "maximize": {"maximize": True, "lr": 1e-4},
        "decay": {"weight_decay": 0.1},
        "int8": {"storage": eight},
        "seeded": {"basis": GaussianBasis(2), "storage": {"basis": "seed"}},
        "both sides": {"side": "both"},
        "rotated": {"transfer": "rotate"},
        "reset": {"transfer": "zero"},
    }
    for name, own in cases.items():
        pairs = [built("galore", **own) for _ in range(2)]
        hooks.Projected(pairs[0][1]).attach(pairs[0][0])
        for ddp, optimizer in pairs:
            train(rank, ddp, optimizer, factor=0.5)
        found[name] = gap(pairs[0][0].parameters(), pairs[1][0].parameters())
    return found


def coupled(rank: int, size: int) -> tuple[float, list[int], int]:
    """Coupled decay, and a basis that is drawn: the distance, the bytes of steps, and the projected numbers of one."""
    rule: Transform = Subspace(Adam(), GaussianBasis(rank=3), every(3))
    pairs = []
    for _ in range(2):
        net = Net().double()
        recipe = Recipe((("*", rule),), decay="l2")
        optimizer = Optimizer(net, recipe, 5e-3, weight_decay=0.1)
        pairs.append((DistributedDataParallel(net, bucket_cap_mb=0.0005), optimizer))
    hook = hooks.Projected(pairs[0][1]).attach(pairs[0][0])
    sent = train(rank, *pairs[0], hook=hook)
    train(rank, *pairs[1])
    numbers = sum(3 * p.numel() // min(p.shape) if p.ndim == 2 else p.numel() for p in pairs[0][0].parameters())
    return gap(pairs[0][0].parameters(), pairs[1][0].parameters()), sent, 8 * numbers


def accumulated(rank: int, size: int) -> float:
    """Two micro-batches in each step, the first in no_sync."""
    pairs = [built("galore") for _ in range(2)]
    hooks.Projected(pairs[0][1]).attach(pairs[0][0])
    for ddp, optimizer in pairs:
        for step in range(5):
            optimizer.zero_grad()
            with ddp.no_sync():
                (losses(rank, 2 * step, ddp) / 2).backward()
            (losses(rank, 2 * step + 1, ddp) / 2).backward()
            optimizer.step()
    return gap(pairs[0][0].parameters(), pairs[1][0].parameters())


def dropped(rank: int, size: int, how: str, view: bool) -> float:
    """A step that is not taken, with gradients cleared by the optimizer, by the model, or by hand."""
    pairs = [built("galore", view) for _ in range(2)]
    hooks.Projected(pairs[0][1]).attach(pairs[0][0])
    for ddp, optimizer in pairs:
        train(rank, ddp, optimizer, 2)
        losses(rank, 7, ddp).backward()
        if how == "optimizer":
            optimizer.zero_grad()
        elif how == "model":
            ddp.zero_grad()
        else:
            for p in ddp.parameters():
                p.grad = None
        train(rank, ddp, optimizer, 2)
    return gap(pairs[0][0].parameters(), pairs[1][0].parameters())


def mixed_up(rank: int, size: int) -> list[str]:
    """Gradients added to projections, and optimizers that do not fit."""
    said = []

    def told(act: Any) -> None:
        try:
            act()
        except InputError as fault:
            said.append(str(fault))

    for again in (False, True):
        ddp, optimizer = built("galore")
        hooks.Projected(optimizer).attach(ddp)
        train(rank, ddp, optimizer, 1)
        optimizer.zero_grad()
        losses(rank, 2, ddp).backward()
        if again:
            with ddp.no_sync():
                told(lambda ddp=ddp: losses(rank, 3, ddp).backward())
        else:
            told(lambda ddp=ddp: losses(rank, 3, ddp).backward())
    ddp, _ = built("galore")
    told(lambda: hooks.Projected(torch.optim.AdamW(ddp.parameters())).attach(ddp))
    ddp, optimizer = built("galore", release=True)
    told(lambda: hooks.Projected(optimizer).attach(ddp))
    _, other = built("galore")
    told(lambda: hooks.Projected(other).attach(ddp))
    return said


def not_a_number(rank: int, size: int) -> tuple[bool, bool]:
    """A NaN on rank 1 in a step that sends projections: whether it is in the gradient on this rank, of that leaf alone."""
    ddp, optimizer = built("galore")
    hooks.Projected(optimizer).attach(ddp)
    train(rank, ddp, optimizer, 1)
    optimizer.zero_grad()
    up = ddp.module.up.weight
    handle = up.register_hook(lambda g: torch.full_like(g, torch.nan)) if rank == 1 else None
    losses(rank, 1, ddp).backward()
    if handle is not None:
        handle.remove()
    bad = {name for name, p in ddp.module.named_parameters() if not bool(p.grad.isfinite().all())}
    return "up.weight" in bad, bad == {"up.weight"}


# -- PowerSGD ----------------------------------------------------------------------------------------------------------


def matrices() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 3))


def powered(rank: int, size: int, start: int = 2, bucket: float = 0.002, **options: Any) -> tuple[Any, Any]:
    ddp = DistributedDataParallel(matrices(), bucket_cap_mb=bucket)
    return ddp, hooks.PowerSGD(rank=2, start=start, **options).attach(ddp)


def walk(rank: int, ddp: Any, first: int, last: int) -> list[Tensor]:
    for step in range(first, last):
        ddp.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * step + rank)
            x = torch.randn(16, 24)
        ddp(x).square().mean().backward()
        with torch.no_grad():
            for p in ddp.parameters():
                p.sub_(p.grad, alpha=0.1)
    return [p.detach().clone() for p in ddp.parameters()]


def as_torch(rank: int, size: int) -> tuple[bool, list[int]]:
    """Whether it is torch's own, bit for bit, and bytes that reach torch.distributed beside those counted."""
    ddp, hook = powered(rank, size)
    mine = walk(rank, ddp, 0, 6)
    sent: list[int] = []
    real = dist.all_reduce

    def call(tensor: Tensor, *args: Any, **keys: Any) -> Any:
        sent.append(tensor.nbytes)
        return real(tensor, *args, **keys)

    dist.all_reduce = call
    try:
        walk(rank, ddp, 6, 7)
    finally:
        dist.all_reduce = real
    other = DistributedDataParallel(matrices(), bucket_cap_mb=0.002)
    state = theirs.PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8
    )

    def one_by_one(state, bucket):  # type: ignore[no-untyped-def]  # on gloo, several buckets at once wait for each other
        found = theirs.powerSGD_hook(state, bucket)
        found.wait()
        return found

    other.register_comm_hook(state, one_by_one)
    wanted = walk(rank, other, 0, 6)
    same = all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    return same, [sum(sent), hook.last.sent, len(sent), hook.last.calls, hook.last.whole]


def restored(rank: int, size: int) -> dict[str, Any]:
    """Back to a saved state in the same process, bit for bit; and in a freshly wrapped model, with its errors, after one whole step."""
    ddp, hook = powered(rank, size)
    weights = walk(rank, ddp, 0, 4)
    file = io.BytesIO()
    torch.save(hook.state_dict(), file)
    first = walk(rank, ddp, 4, 7)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    put(ddp, weights)
    hook.load_state_dict(state)
    second = walk(rank, ddp, 4, 7)
    gathered = hook.gather_state()
    shapes = (
        None if gathered is None else {value.shape[0] for name, value in gathered.items() if name.startswith("error.")}
    )
    fresh, after = powered(rank, size)
    put(fresh, weights)
    after.load_state_dict(state)
    walk(rank, fresh, 4, 5)
    whole = after.last.sent == after.last.whole
    kept = all(
        torch.equal(after.state_dict()[name], value) for name, value in state.items() if name.startswith("error.")
    )
    walk(rank, fresh, 5, 6)
    small = after.last.sent < after.last.whole
    one, misfit = powered(rank, size, bucket=25)
    misfit.load_state_dict(state)
    said = ""
    try:
        walk(rank, one, 4, 6)
    except CheckpointError as fault:
        said = str(fault)
    return {"same": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "rows": shapes, "whole": whole, "kept": kept,
            "small": small, "said": said, "draws": len(state["rng"])}  # fmt: skip


def put(ddp: Any, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for p, w in zip(ddp.parameters(), weights, strict=True):
            p.copy_(w)
