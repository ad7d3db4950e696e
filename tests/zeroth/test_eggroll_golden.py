"""EGGROLL steps as its authors' code did: the recorded traces, one member at a time and side by side."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Trace, load

from tare.methods.eggroll import Eggroll
from tare.testing.factors import RecordedFactors
from tare.zeroth.members import Members
from tare.zeroth.record import Record

NAMES = ["first.weight", "first.bias", "second.weight"]


class Net(nn.Module):
    """tanh(x W1^T + b1) W2^T with a trace's weights."""

    def __init__(self, trace: Trace):
        super().__init__()
        starts = [trace.tensors[f"W0.{i}"] for i in range(3)]
        self.first = nn.Linear(*starts[0].shape[::-1], dtype=torch.float64)
        self.second = nn.Linear(*starts[2].shape[::-1], bias=False, dtype=torch.float64)
        with torch.no_grad():
            for p, start in zip(self.parameters(), starts, strict=True):
                p.copy_(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def law(trace: Trace) -> RecordedFactors:
    """Of the trace's pairs; the pair of the unperturbed members, which has no noise, included."""
    t = trace.tensors
    pairs = {NAMES[i]: (t[f"A.{i}"], t[f"B.{i}"]) for i in (0, 2)}
    return RecordedFactors(trace.hyper["rank"], pairs=pairs, singles={NAMES[1]: t["E.1"]} if "E.1" in t else {})


def options(trace: Trace) -> dict[str, Any]:
    h = trace.hyper
    own: dict[str, Any] = {"members": h["members"], "sigma": h["sigma"], "directions": law(trace)}
    own["vectors"] = "frozen" if h.get("freeze_nonlora") else "gaussian"
    if "alpha" in h:
        return {**own, "scaling": "paper", "lr": h["alpha"]}
    if "prompts" in h:
        own |= {"shaping": "baseline", "prompts": h["prompts"], "clip": h["trust_region_norm"]}
    elif h["group_size"]:
        own["group"] = h["group_size"]
    return {**own, "lr": h["lr"]}


@pytest.mark.parametrize("together", [1, 3, None])
@pytest.mark.parametrize(
    "name", ["eggroll_rank1_f64", "eggroll_rank3_groups_f64", "eggroll_paper_scaling_f64", "eggroll_baseline_f64"]
)
def test_trace(name: str, together: int | None) -> None:
    trace = load(name)
    net = Net(trace)
    records: list[Record] = []
    opt = Eggroll(net, together=together, on_step=records.append, **options(trace))
    for t in range(trace.steps):
        x, y = trace.tensors["X"][t], trace.tensors["Y"][t]

        def closure(members: Members, x: Tensor = x, y: Tensor = y) -> Tensor:
            return members.mean(0.5 * (net(members.pick(x)) - members.pick(y)).square().sum(1))

        opt.step(closure)
        raw = -torch.tensor(records[t].losses, dtype=torch.float64)
        close(raw, trace.tensors["raw"][t].flatten(), trace.meta["tolerance"]["raw"])
        close(
            torch.tensor(records[t].deltas, dtype=torch.float64),
            trace.tensors["fitness"][t],
            trace.meta["tolerance"]["fitness"],
        )
        for i, p in enumerate(net.parameters()):
            close(p.detach(), trace.tensors[f"W.{i}"][t], trace.meta["tolerance"][f"W.{i}"])


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert (found.double() - expected.double()).abs().max().item() <= bound


def test_the_two_scalings_are_one() -> None:
    trace = load("eggroll_paper_scaling_f64")
    h = trace.hyper
    assert h["equivalent_code_lr"] == pytest.approx(h["alpha"] / (h["sigma"] * h["members"] ** 0.5))
    one, other = Net(trace), Net(trace)
    x, y = trace.tensors["X"][0, 0], trace.tensors["Y"][0, 0]
    for net, own in ((one, {"scaling": "paper", "lr": h["alpha"]}), (other, {"lr": h["equivalent_code_lr"]})):
        opt = Eggroll(net, **{**options(trace), "scaling": "code", **own})
        opt.step(lambda net=net: (net(x) - y).square().sum())
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-14)
