"""What one of two workers does for test_exchange.py: all scenarios in one process, one after another; results as JSON.

Run alone (no RANK in the environment) it does the same without others, which is what the results are compared with.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F

import tare
from tare.methods import registry
from tare.testing.forward import ForwardSubject
from tare.testing.subject import Net, loss_of
from tare.zeroth.digest import combined, digests
from tare.zeroth.exchange import Workers

ALONE = "RANK" not in os.environ
RANK = int(os.environ.get("RANK", "0"))
STEPS = 3


def workers(**own: Any) -> Workers | None:
    return None if ALONE else Workers(**own)


def digest(opt: Any) -> str:
    return combined(digests(opt)).hex()


def said(action: Callable[[], Any]) -> list[str]:
    """[kind, message] of what an action raises."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def run(opt: Any, loss: Callable[[int], Any], steps: int = STEPS) -> list[Any]:
    """[losses, digest of the weights, evaluations here]."""
    losses = [opt.step(lambda number=number: loss(number)) for number in range(steps)]
    return [losses, digest(opt), opt.evaluated]


def methods() -> dict[str, Any]:
    """Every forward-only method that can share points, on its own trial problem."""
    found = {}
    for key in registry.keys("forward"):
        if "exchange" in registry.options(key):
            subject = ForwardSubject(key)
            more = {"n": 2} if "n" in registry.options(key) and "n" not in subject.trial.hyper else {}
            problem, opt = subject.start(exchange=workers(), **more)
            found[key] = run(opt, problem.loss)
    return found


def points() -> dict[str, Any]:
    forms: dict[str, dict[str, Any]] = {
        "plus and minus": {}, "n=3": {"n": 3}, "adam": {"n": 2, "rule": "adam"}, "one-sided": {"probe": "one-sided", "n": 2},
        "forward gradient": {"probe": "forward-gradient", "n": 2}, "in place": {"memory": "in-place-exact", "n": 3},
    }  # fmt: skip
    found = {}
    for name, own in forms.items():
        net = Net()
        found[name] = run(tare.MeZO(net, 1e-2, exchange=workers(), **own), lambda number, net=net: loss_of(net, number))
    return found


def dropout() -> list[Any]:
    torch.manual_seed(7)
    net = Net()
    opt = tare.MeZO(net, 1e-2, n=3, exchange=workers())
    drop = nn.Dropout(0.5)
    return run(opt, lambda number: loss_of(net, number) + drop(torch.ones(32)).mean())


def data() -> list[Any]:
    """Two parts: each worker has one; alone, the mean of both."""
    torch.manual_seed(3)
    x, y = torch.randn(12, 5), torch.randn(12, 2)
    net = nn.Linear(5, 2)
    exchange = workers(data=2)
    opt = tare.MeZO(net, 0.05, n=2, exchange=exchange)

    def part(number: int, of: int) -> torch.Tensor:
        rows = slice(6 * of, 6 * of + 6)
        return F.mse_loss(net(x[rows]), y[rows])

    def loss(number: int) -> Any:
        if exchange is None:
            return math.fsum((float(part(number, 0)), float(part(number, 1)))) / 2
        return part(number, exchange.part)

    return run(opt, loss)


def faults() -> dict[str, Any]:
    """With two workers only."""
    found: dict[str, Any] = {}
    net = Net()
    exchange = Workers()
    opt = tare.MeZO(net, 1e-2, n=2, exchange=exchange)
    before = digest(opt)

    def broken() -> Any:
        if RANK == 1:
            raise KeyError("no such column")
        return loss_of(net)

    found["raised"] = [*said(lambda: opt.step(broken)), digest(opt) == before, opt.steps]
    skipped = opt.step(lambda: loss_of(net) * (math.nan if RANK == 1 else 1.0))
    found["nan"] = [math.isnan(skipped), digest(opt) == before, opt.skipped]
    opt.step(lambda: loss_of(net))
    found["after"] = [digest(opt) != before, digest(opt)]
    sent, asked = exchange.sent, exchange.questions
    opt.step(lambda: loss_of(net))
    found["bytes"] = [exchange.sent - sent, exchange.questions - asked, opt.explain()]
    found["too many"] = said(lambda: tare.MeZO(Net(), 1e-2, probe="one-point", exchange=Workers()).step(lambda: 1.0))
    found["divisor"] = said(lambda: tare.MeZO(Net(), 1e-2, exchange=Workers(data=3)).step(lambda: 1.0))
    other = Net()
    with torch.no_grad():
        other.head.weight.add_(RANK * 1e-6)
    fixed = Workers()
    opt = tare.MeZO(other, 1e-2, exchange=fixed)
    found["weights"] = said(lambda: opt.step(lambda: loss_of(other)))
    fixed.share_(other)
    found["mended"] = [*said(lambda: opt.step(lambda: loss_of(other))), digest(opt)]
    unlike = Net()
    found["rates"] = said(
        lambda: tare.MeZO(unlike, 1e-2 * (1 + RANK), exchange=Workers()).step(lambda: loss_of(unlike))
    )
    drifted = Net()
    opt = tare.MeZO(drifted, 1e-2, exchange=Workers(check_every=2))
    opt.step(lambda: loss_of(drifted))
    with torch.no_grad():
        drifted.head.weight.mul_(1 + RANK * 1e-5)
    opt.step(lambda: loss_of(drifted))
    found["drift"] = said(lambda: opt.step(lambda: loss_of(drifted)))
    return found


def killed() -> list[str]:
    """Worker 1 dies in its second step."""
    net = Net()
    opt = tare.MeZO(net, 1e-2, exchange=Workers())
    opt.step(lambda: loss_of(net))
    if RANK == 1:
        os.kill(os.getpid(), 9)
    return said(lambda: opt.step(lambda: loss_of(net)))


def main(out: str, only: str = "") -> None:
    torch.set_num_threads(1)
    if not ALONE:
        distributed.init_process_group("gloo")
    if only == "killed":
        results: dict[str, Any] = {"killed": killed()}
    else:
        results = {"methods": methods(), "points": points(), "dropout": dropout(), "data": data()}
        if not ALONE:
            results["faults"] = faults()
    with open(f"{out}/{'alone' if ALONE else RANK}.json", "w") as file:
        json.dump(results, file)
    if not ALONE and only != "killed":
        distributed.destroy_process_group()
    sys.stdout.flush()
    if only == "killed":
        os._exit(0)  # the group cannot be taken down with one of it gone


if __name__ == "__main__":
    main(*sys.argv[1:])
