"""Sparse-MeZO: the recorded traces, and the limits and oracles of its card."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zeroth_cases import Objective, load

import tare
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.methods.sparse_mezo import SparseMeZO
from tare.plan.measure import StepMeter
from tare.plan.models import build_model
from tare.zeroth.directions import Draw, Gaussian
from tare.zeroth.laws import Rademacher
from tare.zeroth.masks import Masked, Reader, magnitude, threshold
from tare.zeroth.memory import ExactInPlace

X = torch.linspace(-1.0, 1.0, 60).view(5, 12)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 9), nn.LayerNorm(9), nn.Linear(9, 7)).to(dtype)


def train(model: nn.Module, optimizer: tare.MeZO, steps: int = 5) -> list[float]:
    x = X.to(next(model.parameters()).dtype)
    return [optimizer.step(lambda: model(x).float().square().mean()) for _ in range(steps)]


def bits_of(model: nn.Module) -> list[Tensor]:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [p.detach().clone().view(words[p.element_size()]) for p in model.parameters()]


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["forward", "in-place-exact"])
@pytest.mark.parametrize("name", ["sparse_mezo_quad_f64", "sparse_mezo_mlp_f64"])
def test_trace(name: str, memory: str) -> None:
    trace = load(name)
    model = Objective(trace)
    records: list[tare.zeroth.record.Record] = []
    h = dict(zip(trace.parameters, trace.tensors["h"].tolist(), strict=True))
    optimizer = SparseMeZO(
        model, trace.lr(0), trace.hyper["eps"], sparsity=trace.hyper["sparsity"], thresholds=h, directions=trace.directions,
        memory=memory, on_step=records.append,
    )  # fmt: skip
    law = Masked(trace.directions, trace.hyper["sparsity"])
    for t in range(trace.steps):
        kept = {}
        for leaf in optimizer._moved():
            weight = leaf.parameter.detach()
            leaf.directed.law.prepare(leaf.draw(0), leaf.state, weight)
            kept[leaf.name] = law.member(leaf.draw(0), leaf.state, weight, 0, weight.numel()).view(weight.shape)
        for key, mask in trace.each("mask").items():
            assert torch.equal(kept[key], mask[t].bool())
        optimizer.step(lambda t=t: model(t))
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), trace.each("W")[key][t], rtol=0, atol=trace.tolerance("W", key))
        losses = torch.tensor(records[t].losses, dtype=torch.float64)
        torch.testing.assert_close(losses, trace.tensors["loss"][t], rtol=0, atol=trace.tolerance("loss", ""))
        assert records[t].deltas[0] == pytest.approx(trace.tensors["delta"][t].item(), abs=trace.tolerance("delta", ""))


@pytest.mark.parametrize("name", ["sparse_mezo_quad_f64", "sparse_mezo_mlp_f64"])
def test_thresholds_are_those_of_the_trace(name: str) -> None:
    trace = load(name)
    for number, (leaf, weight) in enumerate(trace.each("W0").items()):
        kept = Masked(Gaussian(), trace.hyper["sparsity"]).kept(Leaf(leaf, tuple(weight.shape), weight.dtype, "linear"))
        found = threshold(Reader(weight), kept)
        assert found == pytest.approx(trace.tensors["h"][number].item(), rel=1e-15)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["forward", "in-place-exact", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["dynamic", "constant", "random"])
def test_nothing_left_out_is_mezo_bit_for_bit(mask: str, dtype: torch.dtype, memory: str) -> None:
    weights, losses = [], []
    for key, own in (("mezo", {}), ("sparse-mezo", {"sparsity": 0.0, "mask": mask})):
        model = net(dtype)
        optimizer = tare.create(key, model, lr=0.05, eps=1e-2, n=2, seed=3, memory=memory, **own)
        losses.append(train(model, optimizer))
        weights.append(bits_of(model))
        assert optimizer.state_bytes().total == 0
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("weight", ["plain", "stochastic", "split24", "master"])
@pytest.mark.parametrize("mask", ["dynamic", "constant", "random"])
def test_what_is_left_out_keeps_its_bits(mask: str, weight: str) -> None:
    """In 16 bits too: there is no noise where there is no update."""
    model = net(torch.bfloat16)
    optimizer = SparseMeZO(model, 0.05, 1e-2, sparsity=0.6, mask=mask, storage={"weight": weight})
    before = bits_of(model)
    train(model, optimizer, 1)
    leaves = optimizer._moved()
    old = [b.view(torch.bfloat16) for b in before]
    kept = [
        leaf.directed.law.member(leaf.draw(0), leaf.state, w, 0, w.numel()).view(w.shape)
        for leaf, w in zip(leaves, old, strict=True)
    ]
    train(model, optimizer, 20)
    for own, was, now in zip(kept, before, bits_of(model), strict=True):
        assert torch.equal(was[~own], now[~own])
    moved = sum(int((was != now)[own].sum()) for own, was, now in zip(kept, before, bits_of(model), strict=True))
    assert moved > 0.7 * sum(int(own.sum()) for own in kept)
    if weight == "split24":
        state = [optimizer.state[p]["weight_low"] for p in model.parameters()]
        assert not any(low[~own].any() for low, own in zip(state, kept, strict=True))


@pytest.mark.parametrize("mask", ["dynamic", "constant", "random"])
def test_in_forward_equals_in_place(mask: str) -> None:
    """The mask is that of the unperturbed weights at every point, wherever they stand."""
    weights, losses = [], []
    for memory in ("forward", "in-place-exact"):
        model = net(torch.float64)
        optimizer = SparseMeZO(model, 0.05, 0.3, n=2, mask=mask, memory=memory)
        losses.append(train(model, optimizer, 8))
        weights.append(bits_of(model))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_perturbed_points_differ_from_theta_where_the_mask_says() -> None:
    model = net()
    optimizer = SparseMeZO(model, 0.05, memory="in-place-exact")
    optimizer.step(lambda: model(X).square().mean())
    leaves = optimizer._moved()
    before = [p.detach().clone() for p in model.parameters()]
    assert isinstance(optimizer.memory, ExactInPlace)
    with optimizer.memory.at(leaves, tare.zeroth.probes.away(0, 0.5)):
        for leaf, old in zip(leaves, before, strict=True):
            kept = leaf.directed.law.member(leaf.draw(0), leaf.state, old, 0, old.numel()).view(old.shape)
            assert torch.equal(leaf.parameter.detach() != old, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- the law -----------------------------------------------------------------------------------------------------------


def drawn(law: Masked, weight: Tensor, step: int = 0, seed: int = 0) -> tuple[Draw, State]:
    leaf = Leaf("w", tuple(weight.shape), weight.dtype, "linear")
    slots = tare.Storage().slots(leaf, law.spec(leaf))
    raw = {"step": 0}
    for slot in slots.values():
        raw.update({slot.name: 0} if slot.form == "count" else {n: torch.zeros(s, dtype=d) for n, s, d in slot.parts()})
    state, draw = State(raw, slots), Draw(leaf, "w", seed, step)
    law.prepare(draw, state, weight)
    return draw, state


@pytest.mark.parametrize(("inner", "second"), [(Gaussian(), 2.0), (Rademacher(), 0.0)])
@pytest.mark.parametrize("mask", ["dynamic", "constant", "random"])
def test_mean_and_second_moment(mask: str, inner: Gaussian, second: float) -> None:
    """E[(z . g) z] = m g and E||(z . g) z||^2 = (d' + 2) ||m g||^2, d' elements kept; 3000 draws, five standard errors."""
    torch.manual_seed(0)
    weight, g = torch.randn(4, 5), torch.randn(20, dtype=torch.float64)
    law = Masked(inner, 0.7, mask)
    draw, state = drawn(law, weight)
    m = law.member(draw, state, weight, 0, 20).double()
    draws = 3000
    z = torch.stack([law.draw(Draw(draw.leaf, "w", 0, step), state, weight) for step in range(draws)]).double()
    assert not z[:, m == 0].any()
    estimate = (z @ g).unsqueeze(1) * z
    error = (estimate.mean(0) - m * g).norm() / (m * g).norm()
    assert error < 5 * math.sqrt((m.sum() + 1) / draws)
    squares = estimate.square().sum(1)
    wanted = (m.sum() + second) * (m * g).square().sum()
    assert abs(squares.mean() - wanted) < 5 * squares.std() / math.sqrt(draws)
    if mask != "random":
        assert law.factor(draw.leaf) == m.sum() + second


def test_dynamic_membership_follows_the_weights_and_a_constant_mask_does_not() -> None:
    weight = torch.arange(1.0, 9.0)
    for mask, after in (("dynamic", [True] * 3 + [False, True] + [False] * 3), ("constant", [True] * 4 + [False] * 4)):
        law = Masked(Gaussian(), 0.5, mask)
        draw, state = drawn(law, weight)
        assert law.member(draw, state, weight, 0, 8).tolist() == [True] * 4 + [False] * 4
        moved = weight.clone()
        moved[3], moved[4] = -9.0, 0.5
        law.prepare(draw, state, moved)  # the next step: the threshold stays
        assert law.member(draw, state, moved, 0, 8).tolist() == after


def test_a_random_mask_is_of_seed_and_element_alone() -> None:
    law = Masked(Gaussian(), 0.8, "random")
    weight = torch.randn(300, 1000)
    draw, state = drawn(law, weight)
    kept = law.member(draw, state, weight, 0, 300_000)
    assert kept.double().mean() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 300_000))
    assert torch.equal(kept[7:300], law.member(Draw(draw.leaf, "w", 0, 5), state, -weight, 7, 300))
    assert not torch.equal(kept, law.member(Draw(draw.leaf, "w", 1, 0), state, weight, 0, 300_000))
    assert not law.spec(draw.leaf)
    assert not law.reads_weight


@pytest.mark.parametrize("mask", ["dynamic", "constant", "random"])
def test_pieces_are_parts_of_the_whole(mask: str) -> None:
    law = Masked(Gaussian(), 0.6, mask)
    weight = torch.randn(700_000)
    draw, state = drawn(law, weight)
    z = law.draw(draw, state, weight)
    for start, stop in ((0, 5), (3, 17), (262_100, 262_200), (699_999, 700_000)):
        assert torch.equal(z[start:stop], law.draw(draw, state, weight, start, stop))
        part = weight[start:stop].clone()
        law.add_(part, draw, state, weight, 0.1, start)
        whole = weight.clone()
        law.add_(whole, draw, state, weight, 0.1)
        assert torch.equal(part, whole[start:stop])


# -- thresholds --------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 400), st.integers(0, 2**16), st.booleans(), st.data(),
)  # fmt: skip
def test_order_statistics_are_exact(dtype: torch.dtype, n: int, seed: int, coarse: bool, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
        -6, 4, (n,), generator=generator
    )
    weight = (weight.round() if coarse else weight).to(dtype)
    k = data.draw(st.integers(1, n))
    ordered = weight.double().abs().sort().values
    assert magnitude(Reader(weight), k) == ordered[k - 1].item()
    h = threshold(Reader(weight), k)
    assert int((weight.double().abs() <= h).sum()) == int((ordered <= ordered[k - 1]).sum())


def test_thresholds_of_int8_weights_are_of_what_they_stand_for() -> None:
    torch.manual_seed(0)
    dense = torch.randn(30, 20)
    weight = tare.Int8Weight.encode(dense, group=7)
    assert threshold(Reader(weight), 150) == threshold(Reader(weight.dense()), 150)
    law = Masked(Gaussian(), 0.75)
    draw, state = drawn(law, weight)
    kept = law.member(draw, state, weight, 11, 333)
    assert torch.equal(kept, (weight.dense().abs() <= state["mask_threshold"]).view(-1)[11:333])


# -- the method --------------------------------------------------------------------------------------------------------


def test_leaves_without_a_mask_are_trained_whole() -> None:
    model = net()
    before = bits_of(model)
    optimizer = SparseMeZO(model, 0.05, masked="linear", sparsity=0.9)
    train(model, optimizer, 3)
    for (name, p), was, now in zip(model.named_parameters(), before, bits_of(model), strict=True):
        share = (was != now).double().mean().item()
        assert share == pytest.approx(0.1, abs=0.01) if p.ndim == 2 else share == 1.0, name
    assert optimizer.state_bytes().total == 2 * 4
    assert "on the 10% smallest" in optimizer.explain()


@pytest.mark.parametrize("mask", ["dynamic", "constant", "random"])
def test_resumed_steps_are_those_of_one_run(mask: str) -> None:
    """The threshold is state: found anew from trained weights it would be another one."""
    model = net(torch.bfloat16)
    optimizer = SparseMeZO(model, 0.1, 1e-2, mask=mask)
    train(model, optimizer, 6)
    twin = copy.deepcopy(model)
    resumed = SparseMeZO(twin, 0.1, 1e-2, mask=mask)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 4) == train(twin, resumed, 4)
    assert all(torch.equal(a, b) for a, b in zip(bits_of(model), bits_of(twin), strict=True))


def test_memory_is_that_of_mezo() -> None:
    model = build_model("llama-9m", dtype="bf16").eval()
    tokens = torch.arange(256).view(2, 128)

    def run() -> Tensor:
        found = model(input_ids=tokens, labels=tokens).loss
        return found.float()

    with torch.no_grad(), StepMeter(model, extra=[tokens]) as inference:
        run()
    optimizer = SparseMeZO(model)
    with StepMeter(model, optimizer, extra=[tokens]) as first:
        optimizer.step(run)
    with StepMeter(model, optimizer, extra=[tokens]) as step:
        optimizer.step(run)
    leaf = max(p.numel() * p.element_size() for p in model.parameters())
    assert first.peak <= 1.05 * (inference.peak + leaf)
    assert step.peak <= 1.05 * (inference.peak + leaf)


def test_it_learns_what_small_weights_can() -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 7)
    goal = model.weight.detach() + 0.1 * torch.randn(7, 12) * (model.weight.detach().abs() < 0.1)
    optimizer = SparseMeZO(model, 0.01, sparsity=0.5, n=4)
    losses = [optimizer.step(lambda: (model.weight - goal).square().sum()) for _ in range(400)]
    assert losses[-1] < 0.2 * losses[0]


def test_bad_values() -> None:
    with pytest.raises(InputError, match=r"sparsity: 1\.0; expected a finite number >= 0 and < 1"):
        SparseMeZO(net(), sparsity=1.0)
    with pytest.raises(InputError, match="mask: 'dynamc'; expected one of dynamic, constant, random"):
        SparseMeZO(net(), mask="dynamc")
    with pytest.raises(InputError, match=r"memory: 'in-place' would change the weight of 0.weight"):
        SparseMeZO(net(), memory="in-place")
    with pytest.raises(InputError, match=r"threshold of 0.weight"):
        SparseMeZO(net(), thresholds={"0.weight": math.nan})
