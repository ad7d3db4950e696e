"""Federated rounds for `test_forward`: one process with all clients, or a process for each."""

import copy
import math
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import tare
from tare.train.session import threads
from tare.zeroth.federated import ASKED, QUERIES, VALUES

SMALL: dict[str, Any] = {"local_steps": 3, "near": 8, "active": 2, "components": 120, "local_lr": 0.03, "capacity": 40}
GOALS = (1.0, -0.4, 0.3)


class Row(nn.Module):
    """Two leaves; the squared distance to a goal, bent a little."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.a = nn.Parameter(torch.full((1,), 0.1, dtype=dtype))

    def forward(self, goal: float) -> Tensor:
        bend = torch.arange(1.0, 8.0, dtype=torch.float64)
        x = torch.cat([self.b.flatten(), self.a]).double()
        return (bend * (x - goal).square()).sum() + torch.sin(3.0 * x).sum()


def flat(net: nn.Module) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()]).tolist()


@threads(1)  # as the ranks have it: sums of linear algebra depend on the number of threads
def alone(size: int, rounds: int, dtype: torch.dtype = torch.float64, **own: Any) -> dict[str, Any]:
    """All clients in this process."""
    net = Row(dtype)
    opt = tare.FZooS(net, clients=size, **{**SMALL, **own})
    losses = [opt.step([lambda goal=goal: net(goal) for goal in GOALS[:size]]) for _ in range(rounds)]
    state = opt.state[net.b]
    return {
        "weights": flat(net),
        "losses": losses,
        "queries": state[QUERIES],
        "values": state[VALUES],
        "asked": state[ASKED],
    }


def together(
    rank: int, size: int, rounds: int, dtype: torch.dtype = torch.float64, cut: int = 0, **own: Any
) -> dict[str, Any]:
    """This process's client only. cut: saved and loaded after as many rounds."""
    net, clients = Row(dtype), tare.Clients()
    built = {"clients": size, "exchange": clients, **SMALL, **own}
    opt, losses = tare.FZooS(net, **built), []
    for number in range(rounds):
        if cut and number == cut:
            saved = copy.deepcopy((opt.state_dict(), net.state_dict()))
            net = Row(dtype)
            net.load_state_dict(saved[1])
            opt = tare.FZooS(net, **built)
            opt.load_state_dict(saved[0])
        losses.append(opt.step(lambda net=net: net(GOALS[rank])))
    state = opt.state[net.b]
    return {
        "weights": flat(net), "losses": losses, "queries": state[QUERIES], "values": state[VALUES], "asked": state[ASKED],
        "sent": clients.sent, "rounds": clients.rounds, "messages": clients.questions, "evaluated": opt.evaluated,
        "evaluations": opt.probe.evaluations, "shown": opt.explain(), "bytes": opt.state_bytes().total,
    }  # fmt: skip


@threads(1)  # as the ranks have it: sums of linear algebra depend on the number of threads
def example(alone: int, rounds: int) -> list[Any]:
    """What `examples/federated_prompt.py` finds: losses, and the prompt."""
    path = Path(__file__).parents[2] / "examples" / "federated_prompt.py"
    return list(runpy.run_path(str(path))["main"](alone, rounds))


def example_here(rank: int, size: int, rounds: int) -> list[Any]:
    return example(0, rounds)


def said(action: Any) -> list[str]:
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def faults(rank: int, size: int) -> dict[str, Any]:
    """What one client does wrong, in the middle of a round; and that the next round is well."""
    found: dict[str, Any] = {}
    for name, when in (("first", 2), ("later", 12)):  # before features are exchanged, and in the local steps
        net, calls = Row(), [0]
        opt = tare.FZooS(net, clients=size, exchange=tare.Clients(), **SMALL)

        def broken(net: nn.Module = net, calls: list[int] = calls, when: int = when) -> Tensor:
            calls[0] += 1
            if rank == 1 and calls[0] == when:
                raise KeyError("no such column")
            return net(GOALS[rank])

        def undefined(net: nn.Module = net, calls: list[int] = calls, when: int = when) -> Tensor:
            calls[0] += 1
            return net(GOALS[rank]) * (math.nan if rank == 1 and calls[0] == when else 1.0)

        before = flat(net)
        found[f"raised {name}"] = [*said(lambda: opt.step(broken)), flat(net) == before, opt.steps]  # noqa: B023
        calls[0] = 0
        loss = opt.step(undefined)
        found[f"nan {name}"] = [math.isnan(loss), flat(net) == before, opt.skipped, opt.steps]
        opt.step(lambda net=net: net(GOALS[rank]))
        found[f"after {name}"] = flat(net)
    net = Row()
    opt = tare.FZooS(net, clients=size, exchange=tare.Clients(), **SMALL)
    found["closure"] = said(lambda: opt.step([lambda: 1.0] * size if rank == 1 else lambda: net(GOALS[rank])))
    other = Row()
    with torch.no_grad():
        other.a.add_(rank * 1e-6)
    clients = tare.Clients()
    opt = tare.FZooS(other, clients=size, exchange=clients, **SMALL)
    found["weights"] = said(lambda: opt.step(lambda: other(GOALS[rank])))
    clients.share_(other)
    found["mended"] = said(lambda: opt.step(lambda: other(GOALS[rank])))
    unlike = Row()
    own = {**SMALL, "components": 100 + rank}
    opt = tare.FZooS(unlike, clients=size, exchange=tare.Clients(), **own)
    found["settings"] = said(lambda: opt.step(lambda: unlike(GOALS[rank])))
    found["clients"] = said(lambda: tare.FZooS(Row(), clients=size + 1, exchange=tare.Clients(), **SMALL))
    dist.barrier()
    return found
