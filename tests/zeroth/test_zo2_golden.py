"""ZO2 steps as its published code did: the recorded traces, where the pending update takes the learning rate of the next step."""

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Trace, load

from tare.methods.zo2 import ZO2
from tare.zeroth.record import Record


class Gain(nn.Module):
    """A product with a weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    def __init__(self, gain: Tensor, weight: Tensor, bias: Tensor):
        super().__init__()
        self.ln, self.fc = Gain(gain), linear(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.ln(x)))


class Net(nn.Module):
    """The network of the traces, its parameters under their recorded names and in their order."""

    def __init__(self, start: dict[str, Tensor]):
        super().__init__()
        self.stem = linear(start["stem.weight"], start["stem.bias"])
        count = sum(name.endswith("fc.bias") for name in start)
        names = ("ln.weight", "fc.weight", "fc.bias")
        self.blocks = nn.ModuleList(Block(*(start[f"blocks.{i}.{name}"] for name in names)) for i in range(count))
        self.norm = Gain(start["norm.weight"])
        self.head = linear(start["head.weight"], None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.weight.data = weight.clone()
    if bias is not None:
        made.bias.data = bias.clone()
    return made


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    gap = (got.double() - wanted.double()).abs().max().item()
    assert gap <= tolerance, f"{what}: off by {gap:.3g} > {tolerance:.3g}"


def weights_are(net: Net, trace: Trace, key: str, step: int | None) -> None:
    state = net.state_dict()
    for name, wanted in trace.each(key).items():
        close(
            state[name], wanted if step is None else wanted[step], trace.tolerance(key, name), f"{name}, {key} {step}"
        )


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", ["zo2_constant_lr_f32", "zo2_constant_lr_f64", "zo2_varying_lr_f64"])
def test_trace(name: str, together: int) -> None:
    """The code takes update t with the rate of step t + 1, ours with that of t: it is given the rates one step earlier."""
    trace = load(name)
    net = Net(trace.each("W0"))
    records: list[Record] = []
    opt = ZO2(
        net, trace.lr(0), trace.hyper["eps"], directions=trace.directions, weight_decay=trace.hyper["weight_decay"],
        undecayed=("bias", "ln", "norm"), device="cpu", together=together, on_step=records.append,
    )  # fmt: skip
    blocks = trace.hyper["blocks"]
    for t in range(trace.steps):
        weights_are(net, trace, "W_seen", t)
        opt.param_groups[0]["lr"] = trace.lr(min(t + 1, trace.steps - 1))
        opt.step(lambda t=t: nn.functional.cross_entropy(net(trace.tensors["X"][t]), trace.tensors["y"][t]))
        losses = torch.tensor(records[t].losses, dtype=torch.float64)
        close(losses, trace.tensors["loss"][t].flatten(), trace.tolerance("loss", ""), f"losses of step {t}")
        delta = torch.tensor(records[t].deltas, dtype=torch.float64)
        close(delta, trace.tensors["delta"][t].flatten(), trace.tolerance("delta", ""), f"delta of step {t}")
        if t:
            assert opt.stream_report().moves == blocks * (2 if together == 1 else 1)
    weights_are(net, trace, "W_flushed", None)


@pytest.mark.parametrize("key", ["W_seen"])
def test_rates_of_their_own_steps_are_another_run(key: str) -> None:
    """With varying rates the published off-by-one is visible: given the rates as they are, ours leaves the trace."""
    trace = load("zo2_varying_lr_f64")
    net = Net(trace.each("W0"))
    opt = ZO2(net, trace.lr(0), trace.hyper["eps"], directions=trace.directions, weight_decay=0.1,
              undecayed=("bias", "ln", "norm"), device="cpu")  # fmt: skip
    for t in range(2):
        opt.param_groups[0]["lr"] = trace.lr(t)
        opt.step(lambda t=t: nn.functional.cross_entropy(net(trace.tensors["X"][t]), trace.tensors["y"][t]))
    opt.flush()
    gap = (net.head.weight - trace.each(key)["head.weight"][2]).abs().max().item()
    assert gap > 1e-6
