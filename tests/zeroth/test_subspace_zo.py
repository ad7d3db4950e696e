"""Subspace-ZO: the recorded traces, its limits to plain estimates, what is taken out, single rows, state."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import load

from tare.core.errors import InputError
from tare.methods.mezo import MeZO
from tare.methods.subspace_zo import SubspaceZO
from tare.rules.adam import Adam
from tare.testing.directions import RecordedDirections
from tare.zeroth.history import REMOVED, STILL, Moving, TokenRows, still_directions, train_rows_, without
from tare.zeroth.quantized import quantize_linear_
from tare.zeroth.recall import Recall
from tare.zeroth.record import Record


class Token(nn.Module):
    def __init__(self, start: Tensor):
        super().__init__()
        self.theta = nn.Parameter(start.clone())


@pytest.mark.parametrize("memory", ["auto", "in-place-exact"])
@pytest.mark.parametrize("name", ["zoodip_f64", "zoodip_n1_f64"])
def test_trace(name: str, memory: str) -> None:
    trace = load(name)
    h, t, bounds = trace.hyper, trace.tensors, trace.meta["tolerance"]
    net = Token(t["theta0"])
    records: list[Record] = []
    opt = SubspaceZO(
        net, h["lr"], h["mu"], n=h["n"], tau=h["tau"], nu=h["nu"], betas=(h["beta1"], h["beta2"]), adam_eps=h["adam_eps"],
        directions=RecordedDirections(dict(enumerate(t["z"]))), memory=memory, on_step=records.append,
    )  # fmt: skip
    seen = dict(zip(t["projector_step"].tolist(), range(len(t["projector"])), strict=True))
    for step in range(trace.steps):
        opt.step(lambda step=step: ((net.theta @ t["W1"].T + t["C"][step]).tanh() - t["Y"][step]).square().mean())
        assert (torch.tensor(records[-1].losses, dtype=torch.float64) - t["loss"][step]).abs().max() <= bounds["loss"]
        assert (net.theta - t["theta"][step]).abs().max() <= bounds["theta"]
        if step in seen:  # the history of the first `step` updates is looked at by the next one
            state = opt.state[net.theta]
            assert state[REMOVED] == t["removed"][seen[step]]
            projector = state[STILL].T @ state[STILL]
            assert (projector - t["projector"][seen[step]]).abs().max() <= bounds["projector"]


# -- limits ----------------------------------------------------------------------------------------------------------------


def _run(made, steps: int = 30, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    net = Token(torch.linspace(-1, 1, 24, dtype=dtype).view(4, 6))
    opt = made(net)
    for _ in range(steps):
        opt.step(lambda: (net.theta.double().sin() - 0.3).square().mean())
    return net.theta.detach().clone(), opt


def test_with_nothing_taken_out_it_is_zeroth_order_adam_and_mezo() -> None:
    """An empty projector: bit for bit the plain estimator under the same rule."""
    plain = {"eps": 1e-3, "n": 3, "probe": "one-sided"}
    adam, _ = _run(lambda net: MeZO(net, 1e-2, rule=Adam(eps=1e-3), **plain))
    ours, opt = _run(lambda net: SubspaceZO(net, 1e-2, n=3, tau=8, nu=0.0, normalize=False))
    assert torch.equal(adam, ours)
    assert not any(state[REMOVED] for state in opt.state.values())
    sgd, _ = _run(lambda net: MeZO(net, 1e-2, **plain))
    ours, _ = _run(lambda net: SubspaceZO(net, 1e-2, n=3, tau=8, nu=0.0, normalize=False, rule="sgd"))
    assert torch.allclose(sgd, ours, rtol=0, atol=1e-14)  # MeZO's step is one pass, rounded once
    taken, _ = _run(lambda net: SubspaceZO(net, 1e-2, n=3, tau=8, nu=0.5, normalize=False, rule="sgd"))
    assert (sgd - taken).abs().max() > 1e-6
    before, _ = _run(lambda net: SubspaceZO(net, 1e-2, n=3, tau=8, nu=0.5, normalize=False, rule="sgd"), steps=8)
    first, _ = _run(lambda net: MeZO(net, 1e-2, **plain), steps=8)
    assert torch.allclose(before, first, rtol=0, atol=1e-14), "the history is read from update tau + 1 on"


def test_normalising_divides_by_the_length_of_such_estimates() -> None:
    plain, _ = _run(lambda net: SubspaceZO(net, 1e-2, n=3, nu=0.0, normalize=False, rule="sgd"), steps=1)
    short, _ = _run(lambda net: SubspaceZO(net, 1e-2, n=3, nu=0.0, rule="sgd"), steps=1)
    start = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    assert torch.allclose((plain - start) / math.sqrt((24 + 3 - 1) / 3), short - start, rtol=1e-9, atol=0)


# -- what is taken out -----------------------------------------------------------------------------------------------------


def _walk(tau: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(tau, d, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -3, d, dtype=torch.float64
    )
    return moves.cumsum(0)


@pytest.mark.parametrize(("tau", "d"), [(6, 20), (20, 6), (7, 7), (128, 30)])
@pytest.mark.parametrize("nu", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("standardize", [True, False])
def test_projection(tau: int, d: int, nu: float, standardize: bool) -> None:
    """Orthonormal rows; what is left is orthogonal to them, no longer, and the same when it is done again."""
    still = still_directions(_walk(tau, d), nu, standardize)
    assert torch.allclose(still @ still.T, torch.eye(len(still), dtype=torch.float64), atol=1e-12)
    assert len(still) <= min(tau - 1, d) - 1 == Moving(Adam(), tau).most_of(d)
    g = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once = without(g, still)
    assert (still @ once).abs().max() < 1e-13 if len(still) else torch.equal(once, g)
    assert torch.allclose(without(once, still), once, atol=1e-13)
    assert once.norm() <= g.norm() + 1e-13


def test_shares_of_variance() -> None:
    """nu to 0 takes out nothing, nu to 1 leaves one direction of the span; in between, what is left out explains at most nu."""
    places = _walk(10, 15)
    assert len(still_directions(places, 0.0)) == 0
    assert len(still_directions(places, 1e-12)) == 0
    assert len(still_directions(places, 1.0)) == 9 - 1
    x = places - places.mean(0)
    x = x / x.square().mean(0).sqrt()
    counts = []
    for nu in (1e-3, 1e-2, 0.1, 0.3, 0.9):
        still = still_directions(places, nu)
        counts.append(len(still))
        assert float((x @ still.T).square().sum()) <= nu * float(x.square().sum()) * (1 + 1e-9)
        outside = torch.linalg.svd(x)[2][9:]  # what the history does not span stays
        assert (still @ outside.T).abs().max() < 1e-9 if len(still) else True
    assert counts == sorted(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("standardize", [True, False])
def test_coordinates_that_rest_give_no_nan(dtype: torch.dtype, standardize: bool) -> None:
    places = _walk(8, 12).to(dtype)
    places[:, 3] = 0.1
    places[:, 7] = 0.0
    still = still_directions(places, 0.1, standardize)
    assert len(still) > 0
    assert bool(still.isfinite().all())
    assert still[:, [3, 7]].abs().max() < 1e-9
    for nothing in (torch.full((8, 12), 0.1, dtype=dtype), torch.zeros(8, 12, dtype=dtype)):
        assert len(still_directions(nothing, 0.5, standardize)) == 0


def test_a_constant_loss_gives_no_nan() -> None:
    net = Token(torch.full((5,), 0.1))
    opt = SubspaceZO(net, tau=3, nu=0.5)
    for _ in range(10):
        opt.step(lambda: 1.0)
    assert torch.equal(net.theta, torch.full((5,), 0.1))


def test_estimates_get_better() -> None:
    """Where all the gradient lies in few directions, what is left of the estimate points closer to it."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 3, generator=generator, dtype=torch.float64))[0]
    places = (torch.randn(30, 3, generator=generator, dtype=torch.float64) @ basis.T).cumsum(0)
    places = places + 1e-3 * torch.randn(30, 40, generator=generator, dtype=torch.float64)
    gradient = basis @ torch.ones(3, dtype=torch.float64)
    still = still_directions(places, 1e-3, standardize=False)
    z = torch.randn(400, 40, generator=generator, dtype=torch.float64)
    estimates = (z @ gradient)[:, None] * z
    cosine = torch.nn.functional.cosine_similarity
    before = cosine(estimates, gradient[None]).mean()
    after = cosine(estimates - (estimates @ still.T) @ still, gradient[None]).mean()
    assert len(still) == 26
    assert after > 1.3 * before


# -- single rows, quantised models -----------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, 8)
            self.up = nn.Linear(8, 16)
            self.out = nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.up(self.embed(tokens)).tanh()).mean(1)


def test_a_token_of_a_quantised_model_is_personalised() -> None:
    net = Words()
    tokens = torch.tensor([[1, 7, 3], [7, 2, 7]])
    with torch.no_grad():
        before = net(tokens)
    plain = copy.deepcopy(net)
    rows = train_rows_(net, "embed", [7])
    assert isinstance(net.embed, TokenRows)
    with torch.no_grad():
        assert torch.equal(net(tokens), before), "nothing has changed yet"
    quantize_linear_(net, bits=8, group=8)
    for p in net.parameters():
        p.requires_grad_(p is rows.rows)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        other = copy.deepcopy(plain)
        other.embed.weight[7] += 1.0
        target = other(tokens)
    opt = SubspaceZO(net, 5e-2, n=2, tau=16, nu=1e-2)
    losses = [opt.step(lambda: (net(tokens) - target).square().mean()) for _ in range(150)]
    assert losses[-1] < 0.3 * losses[0]
    for name, value in net.state_dict().items():
        assert torch.equal(value, start[name]) == (name != "embed.rows"), name
    assert opt.state_bytes().total == 4 * 8 * (16 + 2 + Moving(Adam(), 16).most_of(8))


def test_rows_in_other_forms() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, dtype=torch.bfloat16))
    rows = train_rows_(model, "0", [2, 5], torch.ones(2, 4, dtype=torch.bfloat16))
    out = model(torch.tensor([[2, 1], [5, 5]]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[1], torch.ones(2, 4, dtype=torch.bfloat16))
    assert torch.equal(out[0, 1], rows.table.weight[1])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.rows"]
    for table, tokens, start, word in (
        ("1", [2], None, "embeddings here: 0"), ("0", [], None, "tokens"), ("0", [2, 2], None, "tokens"),
        ("0", [2], torch.ones(3, 4), "start"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            train_rows_(nn.Sequential(nn.Embedding(9, 4)), table, tokens, start)


# -- state and errors ------------------------------------------------------------------------------------------------------


def test_a_run_can_be_cut_anywhere() -> None:
    """The history is part of the saved state, as plain tensors; halves of a run are the run, also between two looks."""
    whole, _ = _run(lambda net: SubspaceZO(net, 1e-2, tau=4, nu=0.1), 13)
    for cut in (1, 4, 5, 10):
        net = Token(torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6))
        first = SubspaceZO(net, 1e-2, tau=4, nu=0.1)
        for _ in range(cut):
            first.step(lambda net=net: (net.theta.sin() - 0.3).square().mean())
        second = SubspaceZO(net, 1e-2, tau=4, nu=0.1)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(13 - cut):
            second.step(lambda net=net: (net.theta.sin() - 0.3).square().mean())
        assert torch.equal(net.theta, whole)


def test_values_out_of_range() -> None:
    for bad in (
        {"tau": 1},
        {"nu": -0.1},
        {"nu": 1.5},
        {"n": 0},
        {"probe": "three-sided"},
        {"rule": "sdg"},
        {"eps": 0.0},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            SubspaceZO(nn.Linear(2, 2), **bad)
    with pytest.raises(InputError, match="keep the moments"):
        SubspaceZO(nn.Linear(2, 2), rule=Recall(Adam(), 4))
