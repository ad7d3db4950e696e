"""DeepZero's evaluations: features reused from the perturbed layer on, and coordinates side by side."""

import itertools
from typing import Any

import pytest
import torch
from deepzero_cases import batch, loss_of, small
from torch import Tensor, nn

from tare.methods.deepzero import DeepZero
from tare.zeroth.record import Record


def test_features_reused_change_no_bit() -> None:
    nets, runs = [small(), small()], []
    for net, reuse in zip(nets, (True, False), strict=True):
        opt = DeepZero(net, 0.1, sparsity=0.5, q=3, reuse=reuse)
        count = [0]
        for module in net.modules():
            if not isinstance(module, nn.Sequential):
                module.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        for t in range(4):
            opt.step(lambda net=net, t=t: loss_of(net, t))
        runs.append(count[0])
        if reuse:
            assert opt.memory.chain is not None
            assert not opt.memory.chain.why
            assert "features reused" in opt.explain()
    assert all(p.equal(q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert runs[0] < 0.8 * runs[1]


def test_micro_batches_have_features_of_their_own() -> None:
    nets = [small(), small()]
    for net, reuse in zip(nets, (True, False), strict=True):
        opt = DeepZero(net, 0.1, ratios="uniform", reuse=reuse)
        for t in range(3):
            opt.step(lambda net=net, t=t: loss_of(net, 2 * t) + loss_of(net, 2 * t + 1))
    assert all(p.equal(q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


class Wrapped(nn.Module):
    """A chain inside of a model with a scale before and a head after it, tied in the middle."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            shared = nn.Linear(3, 3, dtype=torch.float64)
            self.body = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), shared, nn.Tanh(), shared)
            self.head = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x * self.scale))


@pytest.mark.parametrize("together", [1, 4])
def test_weights_around_and_twice_in_a_chain(together: int) -> None:
    nets = [Wrapped(), Wrapped()]
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for net, own in zip(nets, ({"together": together}, {"reuse": False}), strict=True):
        opt = DeepZero(net, 0.1, ratios="uniform", sparsity=0.3, **own)
        for _ in range(3):
            opt.step(lambda net=net: net(x).square().mean(1)) if own.get("together") == 4 else opt.step(
                lambda net=net: net(x).square().mean()
            )
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=0 if together == 1 else 1e-9)


@pytest.mark.parametrize(
    ("spoiler", "says"),
    [
        (nn.Dropout(0.5), "random"), ("input", ""), ("writes", "writes"), ("state", "another one"),
    ],
)  # fmt: skip
def test_what_cannot_be_reused_is_run_whole(spoiler: Any, says: str) -> None:
    """Random numbers, another input at each evaluation, work in place, a module with a memory: the numbers of the whole model."""

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(0.5)

    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1.0 + 0.01 * (self.calls % 7))

    def built() -> nn.Sequential:
        middle = (
            {"input": nn.Identity(), "writes": Writes(), "state": Counts()}.get(spoiler, spoiler)
            if isinstance(spoiler, str)
            else spoiler
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), middle, nn.Linear(4, 2, dtype=torch.float64))

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nets, chains = [built(), built()], []
    for net, reuse in zip(nets, (True, False), strict=True):
        opt = DeepZero(net, 0.1, ratios="uniform", sparsity=0.3, reuse=reuse)
        torch.manual_seed(7)
        calls = itertools.count()

        def closure(net: nn.Module = net, calls: Any = calls) -> Tensor:
            noisy = x + 0.1 * next(calls) if spoiler == "input" else x
            return net(noisy).square().mean()

        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                opt.step(closure)
        chains.append(opt.memory.chain)
    assert says in chains[0].why
    assert bool(chains[0].why) == bool(says)
    if spoiler != "state":  # whose loss depends on how often it ran
        assert all(p.equal(q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize("together", [None, 5])
@pytest.mark.parametrize("chained", [True, False])
def test_coordinates_side_by_side(chained: bool, together: int | None) -> None:
    """One forward for many coordinates of a leaf: the losses of one at a time, but for the order of sums."""
    records: list[list[Record]] = []
    for told in (True, False):
        net = small()
        if not chained:
            net = nn.ModuleDict({"x": net})  # type: ignore[assignment]
            inner = net["x"]  # type: ignore[index]
            net.forward = inner.forward  # type: ignore[method-assign]
        own: list[Record] = []
        opt = DeepZero(
            net,
            0.1,
            ratios="uniform",
            sparsity=0.5,
            together=together if told else None,
            reuse=chained,
            on_step=own.append,
        )
        for t in range(2):
            x, y = batch(t)

            def members(members: Any) -> Tensor:
                out = net(members.repeat(x))  # noqa: B023
                return members.mean(nn.functional.cross_entropy(out, members.repeat(y), reduction="none"))  # noqa: B023

            opt.step(members if told else (lambda: nn.functional.cross_entropy(net(x), y)))  # noqa: B023
        assert opt.together == (together if told else None), "side by side was given up"
        records.append(own)
    for one, other in zip(*records, strict=True):
        assert torch.allclose(torch.tensor(one.deltas), torch.tensor(other.deltas), rtol=0, atol=1e-9)
