"""DeepZero: the recorded traces, coordinates against exact gradients, masks, scores."""

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from deepzero_cases import loss_of, small
from torch import Tensor, nn
from zeroth_cases import Trace, load

from tare.core.errors import InputError
from tare.core.state import State
from tare.methods.deepzero import DeepZero
from tare.rules.momentum import Momentum
from tare.zeroth.coordinates import CoordinateWise, Mask
from tare.zeroth.directions import Draw
from tare.zeroth.grasp import Grasp, keep, score
from tare.zeroth.record import Record


@dataclass(frozen=True, eq=False)
class Recorded(Mask):
    """The masks of a trace."""

    trace: Trace

    def masks(self, leaf: Any) -> bool:
        return True

    def active(self, draw: Draw, state: State) -> Tensor | None:
        return self.trace.each("mask")[draw.leaf.name][draw.step].flatten().nonzero().flatten()


def net_of(trace: Trace) -> nn.Sequential:
    """tanh layers of the trace: fc1, tanh, fc2, tanh, fc3."""
    start = trace.each("W0")
    layers: dict[str, nn.Module] = {}
    for name in ("fc1", "fc2", "fc3"):
        weight = start[f"{name}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(start[f"{name}.bias"])
        layers[name] = layer
        if name != "fc3":
            layers[f"{name}_tanh"] = nn.Tanh()
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


WAYS = {
    "whole": {"reuse": False}, "reused": {"reuse": True}, "together": {"together": 7}, "in forward": {"memory": "forward"},
    "in place": {"memory": "in-place-exact", "reuse": False},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["deepzero_cge_dense_f64", "deepzero_cge_masked_f64"])
def test_trace(name: str, way: str) -> None:
    trace = load(name)
    h, t = trace.hyper, trace.tensors
    net = net_of(trace)
    records: list[Record] = []
    opt = DeepZero(
        net, h["lr"], h["mu"], ratios=Recorded(trace), momentum=h["momentum"], weight_decay=h["weight_decay"],
        on_step=records.append, **WAYS[way],
    )  # fmt: skip
    for step in range(trace.steps):

        def loss(members: Any = None, step: int = step) -> Tensor:
            if members is None:
                return nn.functional.cross_entropy(net(t["X"][step]), t["y"][step])
            out = net(members.repeat(t["X"][step]))
            rows = nn.functional.cross_entropy(out, members.repeat(t["y"][step]), reduction="none")
            return members.mean(rows)

        opt.step((lambda members: loss(members)) if way == "together" else (lambda: loss()))
        first = 0
        for key, p in net.named_parameters():
            found = torch.zeros(p.numel(), dtype=torch.float64)
            for term in records[-1].terms:
                if first <= term.member < first + p.numel():
                    found[term.member - first] = term.coefficient
            first += p.numel()
            slack = 50 if way == "together" else 1  # sums in another order, over mu
            assert (found.view_as(p) - trace.each("G")[key][step]).abs().max() <= slack * trace.tolerance("G", key)
            assert (p - trace.each("W")[key][step]).abs().max() <= slack * trace.tolerance("W", key)


@pytest.mark.parametrize("name", ["deepzero_zo_grasp_f64"])
def test_scores_of_the_trace(name: str) -> None:
    trace = load(name)
    h, t = trace.hyper, trace.tensors
    net = net_of(trace)
    weights = [net.fc1.weight.detach(), net.fc2.weight.detach(), net.fc3.weight.detach()]
    before = [w.clone() for w in weights]
    how = Grasp(h["q"], h["mu"], per_tensor=True)
    found = score(
        how, weights, lambda number, j: [t[f"u{number}.{i}"][j] for i in range(3)],
        lambda: nn.functional.cross_entropy(net(t["X"]), t["y"]).item(),
    )  # fmt: skip
    assert found is not None
    bounds = trace.meta["tolerance"]
    for i in range(3):
        assert (found.first[i] - t[f"g0.{i}"]).abs().max() <= bounds[f"g0.{i}"]
        assert (found.second[i] - t[f"g1.{i}"]).abs().max() <= bounds[f"g1.{i}"]
        assert (found.scores[i] - t[f"score.{i}"]).abs().max() <= bounds[f"score.{i}"]
        assert weights[i].equal(before[i])
    q = h["q"] + 1
    assert torch.tensor(found.losses[:q]).double().sub(t["loss0"]).abs().max() <= 1e-7
    assert torch.tensor(found.losses, dtype=torch.float64).sub(torch.cat([t["loss0"], t["loss1"]])).abs().max() <= 2e-13
    for i, mask in enumerate(keep(how, found.scores, h["prune_fraction"])):
        assert mask.equal(t[f"keep.{i}"].bool())
    signed = keep(Grasp(signed=True), found.scores, h["prune_fraction"])
    assert any(not mask.equal(t[f"keep.{i}"].bool()) for i, mask in enumerate(signed))


def test_the_released_scores_are_of_a_model_that_drifts() -> None:
    """The released procedure written out: no evaluation puts the weights back, so directions add up. Other weights are kept."""
    trace = load("deepzero_zo_grasp_released_f64")
    h, t, bounds = trace.hyper, trace.tensors, trace.meta["tolerance"]
    net = net_of(trace)
    weights = [net.fc1.weight.detach(), net.fc2.weight.detach(), net.fc3.weight.detach()]
    mu, q = h["mu"], h["q"]

    def loss() -> float:
        return nn.functional.cross_entropy(net(t["X"]), t["y"]).item()

    def estimate(number: int, drifts: bool) -> tuple[list[Tensor], list[float]]:
        start, losses = [w.clone() for w in weights], [loss()]
        total = [torch.zeros_like(w) for w in weights]
        for j in range(q):
            z = [(u := t[f"u{number}.{i}"][j]) / (u.norm() + 1e-8) for i in range(3)]
            for w, x, v in zip(weights, start, z, strict=True):
                w.copy_((w if drifts else x) + mu * v)
            losses.append(loss())
            for g, v in zip(total, z, strict=True):
                g.add_(v, alpha=(losses[-1] - losses[0]) / q)
        return total, losses

    first, losses = estimate(0, drifts=True)
    for w, g in zip(weights, first, strict=True):
        w.add_(g, alpha=mu)
    second, more = estimate(1, drifts=False)
    scores = [-w * (b - a) / mu for w, a, b in zip(weights, first, second, strict=True)]
    assert torch.tensor(losses).double().sub(t["loss0"]).abs().max() <= 1e-7
    assert (
        torch.tensor(losses + more, dtype=torch.float64).sub(torch.cat([t["loss0"], t["loss1"]])).abs().max() <= 2e-13
    )
    masks = keep(Grasp(), scores, h["prune_fraction"])
    for i in range(3):
        assert (first[i] - t[f"g0.{i}"]).abs().max() <= bounds[f"g0.{i}"]
        assert (second[i] - t[f"g1.{i}"]).abs().max() <= bounds[f"g1.{i}"]
        assert (scores[i] - t[f"score.{i}"]).abs().max() <= bounds[f"score.{i}"]
        assert masks[i].equal(t[f"keep.{i}"].bool())
    net = net_of(trace)
    ours = score(
        Grasp(q, mu, per_tensor=True), [net.fc1.weight, net.fc2.weight, net.fc3.weight],
        lambda number, j: [t[f"u{number}.{i}"][j] for i in range(3)], loss,
    )  # fmt: skip
    assert ours is not None
    moved = sum(
        int((a != b).sum()) for a, b in zip(keep(Grasp(), ours.scores, h["prune_fraction"]), masks, strict=True)
    )
    assert moved == 6, "of 70"


# -- coordinates ----------------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """0.5 w.H w - b.w over two leaves, one of them a transposed view."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64).t())
        root = torch.randn(14, 14, generator=generator, dtype=torch.float64)
        self.h, self.b = root @ root.T / 14, torch.randn(14, generator=generator, dtype=torch.float64)

    def flat(self) -> Tensor:
        return torch.cat([self.one.reshape(-1), self.two.reshape(-1)])

    def forward(self) -> Tensor:
        w = self.flat()
        return 0.5 * w @ self.h @ w - self.b @ w

    @torch.no_grad()
    def gradient(self) -> Tensor:
        return self.h @ self.flat() - self.b


@pytest.mark.parametrize("memory", ["auto", "forward", "in-place-exact"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_all_coordinates_of_a_quadratic(two_sided: bool, memory: str) -> None:
    """Two-sided: the gradient; one-sided: plus mu / 2 times the diagonal of H."""
    net, mu = Quadratic(), 1e-2
    expected = net.gradient() + (0.0 if two_sided else mu / 2) * net.h.diagonal()
    before = net.flat().detach().clone()
    opt = DeepZero(net, 0.1, mu, sparsity=0.0, two_sided=two_sided, weight_decay=0.0, rule="sgd", memory=memory)
    assert opt.probe.evaluations == (28 if two_sided else 15)
    opt.step(net)
    assert torch.allclose((before - net.flat()) / 0.1, expected, rtol=0, atol=1e-11)


def test_without_sparsity_and_with_a_small_mu_it_is_sgd() -> None:
    net, other = Quadratic(), Quadratic()
    opt = DeepZero(net, 0.05, 1e-6, sparsity=0.0, weight_decay=0.01)
    plain = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(20):
        opt.step(net)
        plain.zero_grad()
        other().backward()
        plain.step()
    assert torch.allclose(net.flat(), other.flat(), rtol=0, atol=1e-5)


def test_orthonormal_directions_are_coordinates_of_a_rotated_basis() -> None:
    """d one-sided directions of an orthonormal basis Q: Q^T coordinate estimates of f(Q .)."""
    from tare.methods.mezo import MeZO
    from tare.testing.directions import RecordedDirections

    net, mu, d = Quadratic(), 1e-3, 14
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    before = net.flat().detach().clone()
    one, two = q[:, :6].reshape(d, 3, 2), q[:, 6:].reshape(d, 2, 4)
    MeZO(
        net, 1.0, mu, n=d, mean=False, probe="one-sided", directions=RecordedDirections({0: {"one": one, "two": two}})
    ).step(net)
    random = before - net.flat().detach()

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(q @ before)

        def forward(self) -> Tensor:
            w = q.T @ self.v
            return 0.5 * w @ net.h @ w - net.b @ w

    turned = Rotated()
    start = turned.v.detach().clone()
    DeepZero(turned, 1.0, mu, sparsity=0.0, rule="sgd", weight_decay=0.0).step(turned)
    assert torch.allclose(random, q.T @ (start - turned.v.detach()), rtol=0, atol=1e-10)


class InTurn:
    """Workers in one process: each evaluates every second point."""

    def evaluate(self, points: list[Any], losses_at: Any) -> list[float]:
        found = [0.0] * len(points)
        for worker in range(2):
            found[worker::2] = losses_at(points[worker::2])
        return found


@pytest.mark.parametrize("reuse", [True, False])
def test_workers_change_no_bit(reuse: bool) -> None:
    nets = [small(), small()]
    for net, exchange in zip(nets, (None, InTurn()), strict=True):
        opt = DeepZero(net, 0.1, sparsity=0.5, q=3, exchange=exchange, reuse=reuse)
        for t in range(4):
            opt.step(lambda net=net, t=t: loss_of(net, t))
    assert all(p.equal(q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_decay_and_momentum_reach_what_the_mask_leaves_out() -> None:
    net = small()
    before = [p.detach().clone() for p in net.parameters()]
    opt = DeepZero(net, 0.1, ratios="uniform", weight_decay=0.1, momentum=0.5)
    for _ in range(2):
        opt.step(lambda: 1.0)
    for p, start in zip(net.parameters(), before, strict=True):
        w = start - 0.1 * 0.1 * start
        assert torch.allclose(p, w - 0.1 * (0.5 * 0.1 * start + 0.1 * w), rtol=0, atol=1e-12)


def test_mu_may_follow_the_learning_rate() -> None:
    one, other = Quadratic(), Quadratic()
    DeepZero(one, 0.02, "lr", sparsity=0.0).step(one)
    DeepZero(other, 0.02, 0.02, sparsity=0.0).step(other)
    assert one.flat().equal(other.flat())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_divided_by_what_they_went(dtype: torch.dtype) -> None:
    """Of a linear loss the derivatives are exact though mu is far below the gap between two numbers."""
    net = nn.Linear(5, 3, bias=False).to(dtype)
    slope = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.weight.copy_(torch.linspace(-8, 8, 15).view(3, 5))
    records: list[Record] = []
    opt = DeepZero(net, 1e-3, 1e-5, sparsity=0.0, on_step=records.append)
    opt.step(lambda: (net.weight.double() * slope).sum())
    assert torch.allclose(torch.tensor(records[0].deltas, dtype=torch.float64), slope.flatten(), rtol=1e-9, atol=1e-8)


# -- masks ------------------------------------------------------------------------------------------------------------------


def test_masks_hold_for_a_period_and_then_move() -> None:
    net = small()
    opt = DeepZero(net, 0.1, ratios={"0.weight": 0.5, "3.0.weight": 0.75}, mask_every=2)
    seen = []
    for t in range(6):
        opt.step(lambda t=t: loss_of(net, t))
        seen.append(opt.probe.active)
    assert len(seen[0]) == 13 + 3 + 18 + 6 + 24 + 4  # 27 -> 13, 72 -> 18, the others whole
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert len({seen[0], seen[2], seen[4]}) == 3
    assert opt.ratios()["4.weight"] == 0.0


def test_scores_share_out_what_is_left_once() -> None:
    net = small()
    before = [p.detach().clone() for p in net.parameters()]
    opt = DeepZero(net, 0.0, sparsity=0.9, q=20)
    assert opt.ratios() == {}
    opt.step(lambda: loss_of(net))
    assert opt.evaluated == 42 + opt.probe.evaluations + 2  # at two children what is run in part is compared, once
    assert all(p.equal(q) for p, q in zip(net.parameters(), before, strict=True))
    ratios = opt.ratios()
    kept = sum(round((1 - ratios[name]) * p.numel()) for name, p in net.named_parameters() if name in ratios)
    assert abs(kept - round(0.1 * 123)) <= 3  # 27 + 72 + 24, and one at least for each
    opt.step(lambda: loss_of(net))
    assert opt.ratios() == ratios
    scores = opt.score(lambda: loss_of(net, 5))
    assert {name: s.shape for name, s in scores.items()} == {
        n: p.shape for n, p in net.named_parameters() if p.ndim > 1
    }
    assert opt.ratios() != ratios


def test_a_loss_that_is_not_finite_leaves_the_ratios_open() -> None:
    net = small()
    before = [p.detach().clone() for p in net.parameters()]
    opt = DeepZero(net, 0.1, q=4)
    calls = itertools.count()
    assert math.isnan(opt.step(lambda: loss_of(net) * (math.nan if next(calls) == 3 else 1)))
    assert opt.ratios() == {}
    assert opt.skipped == 1
    assert all(p.equal(q) for p, q in zip(net.parameters(), before, strict=True))
    opt.step(lambda: loss_of(net))
    assert opt.ratios()


def test_plain_scores_are_of_the_hessian() -> None:
    """With d directions sqrt(d) e_j the estimates are exact but for a bias that a quadratic has at both points: scores are -w H g0."""
    net, d, mu = Quadratic(), 14, 1e-2
    weights = [p.detach() for p in net.parameters()]

    def directions(number: int, j: int) -> list[Tensor]:
        z = math.sqrt(d) * torch.eye(d, dtype=torch.float64)[j]
        return [z[:6].view(3, 2), z[6:].view(2, 4)]

    found = score(Grasp(d, mu), weights, directions, lambda: net().item())
    assert found is not None
    first = net.gradient() + mu * math.sqrt(d) / 2 * net.h.diagonal()
    assert torch.allclose(torch.cat([g.flatten() for g in found.first]), first, rtol=0, atol=1e-10)
    expected = -net.flat().detach() * (net.h @ first)
    assert torch.allclose(torch.cat([s.flatten() for s in found.scores]), expected, rtol=0, atol=1e-8)


def test_resume_keeps_ratios_and_masks() -> None:
    net = small()
    opt = DeepZero(net, 0.1, sparsity=0.8, q=4, mask_every=3)
    for t in range(4):
        opt.step(lambda t=t: loss_of(net, t))
    again = copy.deepcopy(net)
    resumed = DeepZero(again, 0.1, sparsity=0.8, q=4, mask_every=3)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    before = resumed.evaluated
    for t in range(4, 8):
        opt.step(lambda t=t: loss_of(net, t))
        resumed.step(lambda t=t: loss_of(again, t))
    assert resumed.evaluated - before == 4 * resumed.probe.evaluations + 2
    assert all(p.equal(q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


# -- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"sparsity": 1.0}, "sparsity"), ({"mu": 0.0}, "mu"), ({"ratios": "gras"}, "ratios"), ({"ratios": {"0.wight": 0.5}}, "0.weight"),
        ({"ratios": {"0.weight": 1.5}}, "0.weight"), ({"mask_every": 0}, "mask_every"), ({"q": 0}, "q"), ({"rule": "sdg"}, "rule"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(own: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DeepZero(small(), 0.1, **own)


def test_rules_of_the_library_take_the_place_of_momentum() -> None:
    one, other = small(), small()
    DeepZero(one, 0.1, ratios="uniform", rule="sgd").step(lambda: loss_of(one))
    DeepZero(other, 0.1, ratios="uniform", rule=Momentum(0.0)).step(lambda: loss_of(other))
    assert all(p.equal(q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_estimates_name_their_coordinates() -> None:
    probe = CoordinateWise(0.5, active=(3, 7))
    asking = probe.ask(0, {})
    points = next(asking)
    assert [p.members for p in points] == [{}, {3: 0.5}, {7: 0.5}]
    with pytest.raises(StopIteration) as done:
        asking.send([1.0, 2.0, 0.0])
    assert [(t.member, t.coefficient) for t in done.value.value.terms] == [(3, 2.0), (7, -2.0)]
