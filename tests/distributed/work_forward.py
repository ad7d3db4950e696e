"""Forward-only methods on a model that ranks share, for `test_forward`: one process, DDP, and rows cut by `fully_shard`."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tare
from tare.core.errors import InputError
from tare.rules.muon import Muon
from tare.testing.forward import ForwardSubject
from tare.train.session import threads

STEPS = 2


class Uneven(nn.Module):
    """Leaves of 7, 5, 3 and 1 rows: ranks have uneven pieces, and some none. The head's weight is read past its module."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.mid = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.tail = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.gain = nn.Parameter(torch.ones(5))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tail(self.norm(torch.tanh(self.mid(self.embed(tokens)))) * self.gain)


def loss_of(net: nn.Module, number: int) -> Tensor:
    tokens = torch.randint(7, (6,), generator=torch.Generator().manual_seed(number))
    return (net(tokens).double() - tokens.double().sin().unsqueeze(1)).square().mean()


def cut(net: nn.Module, mesh: Any = None) -> nn.Module:
    """Each module with weights, and the model itself, whose own ones stay gathered after a forward."""
    for module in list(net.modules())[1:]:
        own = list(module.parameters(recurse=False))
        if own and not any(hasattr(p, "to_local") for p in own):  # tied to what is cut already
            fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel, "fsdp": cut,
    "hsdp": lambda net: cut(net, init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("copies", "rows"))),
    "hsdp2": lambda net: cut(net, init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("copies", "rows"))),
}  # fmt: skip


def whole(p: Tensor) -> list[float]:
    p = p.detach()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).double().flatten().tolist()


def result(opt: Any, net: nn.Module, losses: list[float], evaluate: Callable[[], float]) -> dict[str, Any]:
    weights = {name.removeprefix("module."): whole(p) for name, p in net.named_parameters()}
    return {"losses": losses, "weights": weights, "after": evaluate(), "evaluated": opt.evaluated}


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def start(
    key: str, form: dict[str, Any] | None, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[int], Any], dict[str, Any]]:
    """(net, its loss at a number, options): a method's own trial problem in fp64, or a form of it on the uneven net."""
    if form is not None:
        net = Uneven(dtype)
        return net, lambda number: loss_of(net, number), form
    subject = ForwardSubject(key)
    problem = subject.problem(torch.float64)
    assert problem.module is not None
    return problem.module, problem.loss, {"lr": subject.trial.lr, **subject.trial.hyper}


def build(key: str, params: Any, own: dict[str, Any]) -> Any:
    from tare.methods import registry

    return registry.build(key, params, **own)


@threads(1)  # as the ranks have it: sums of linear algebra depend on the number of threads
def alone(
    size: int, key: str, form: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Steps on the mean of all ranks' losses, in this process."""
    net, loss, own = start(key, form, dtype)
    opt = build(key, net, {"memory": "in-place-exact", **own})
    losses = [
        opt.step(lambda number=number: mean([float(loss(size * number + r)) for r in range(size)]))
        for number in range(STEPS)
    ]
    with torch.no_grad():
        return result(opt, net, losses, lambda: float(loss(99)))


def together(
    rank: int,
    size: int,
    key: str,
    wrap: str,
    form: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    stop: int = 0,
) -> dict[str, Any]:
    """Each rank on its own batch. stop: saved and loaded after as many steps. What is refused comes back as `refused`."""
    net, loss, own = start(key, form, dtype)
    net = WRAPS[wrap](net)
    try:
        opt = build(key, net, own)
    except InputError as error:
        return {"refused": str(error)}
    losses = []
    for number in range(STEPS):
        if stop and number == stop:
            saved = copy.deepcopy(opt.state_dict())
            opt = build(key, net, own)
            opt.load_state_dict(saved)
        losses.append(opt.step(lambda number=number: loss(size * number + rank)))
    with torch.no_grad():  # another forward sees the step, also of what stayed gathered
        found = result(opt, net, losses, lambda: float(loss(99)))
    return {
        **found,
        "explained": opt.explain(),
        "state": {k: type(v).__name__ for s in opt.state.values() for k, v in s.items()},
    }


def logged(rank: int, size: int, folder: str) -> dict[str, list[float]]:
    """A run under fully_shard that every rank logs; its weights at the end."""
    net = cut(Uneven())
    with tare.SeedLog(f"{folder}/{rank}.seeds") as log:
        opt = tare.MeZO(net, 1e-2, n=2, on_step=log)
        for number in range(STEPS):
            opt.step(lambda number=number: loss_of(net, size * number + rank))
    return {name: whole(p) for name, p in net.named_parameters()}


def faults(rank: int, size: int) -> dict[str, str]:
    """One line for each thing that cannot be."""
    found = {}

    def said(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
            found[name] = ""
        except InputError as error:
            found[name] = str(error)

    net = cut(Uneven())
    said("points", lambda: tare.MeZO(net, 1e-2, exchange=tare.Workers()))
    said("forward", lambda: tare.MeZO(net, 1e-2, memory="forward"))
    said("in-place", lambda: tare.MeZO(net, 1e-2, memory="in-place"))
    said("no model", lambda: tare.MeZO(net.parameters(), 1e-2))
    said("with model", lambda: tare.MeZO(net.named_parameters(), 1e-2, model=net))
    said("mask", lambda: tare.SparseMeZO(net, 1e-2))
    said("rule", lambda: tare.MeZO(net, 1e-2, rule=Muon()))
    said("tangent", lambda: tare.MeZO(net, 1e-2, probe="forward-gradient"))
    said("together", lambda: tare.Eggroll(net, 1e-2, together=4))
    said("zo2", lambda: tare.ZO2(net, 1e-2, device="cpu"))
    said("ddp zo2", lambda: tare.ZO2(DistributedDataParallel(Uneven()), 1e-2, device="cpu"))
    said("share", lambda: tare.Workers(data=2).share_(net))
    other = cut(Uneven())
    opt = tare.MeZO(other, 1e-2 * (1 + rank))
    said("rates", lambda: opt.step(lambda: loss_of(other, rank)))
    return found
