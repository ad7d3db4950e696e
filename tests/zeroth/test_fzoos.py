"""FZooS: the recorded gradients, the surrogate and its features against closed forms, rounds, clients, what is kept."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import load

from tare.core.errors import InputError
from tare.methods.fzoos import FZooS
from tare.zeroth.federated import ASKED, QUERIES, VALUES
from tare.zeroth.record import Record
from tare.zeroth.surrogate import Features, Kernel, Posterior, around, best_lengthscale, features, nearest, scaled

F64 = torch.float64
SMALL: dict[str, Any] = {"local_steps": 3, "near": 10, "active": 2, "components": 300, "local_lr": 0.03}


@pytest.mark.parametrize("name", ["fzoos_gp_d5_f64", "fzoos_gp_d8_f64"])
def test_trace(name: str) -> None:
    trace = load(name)
    t, h, bounds = trace.tensors, trace.hyper, trace.meta["tolerance"]
    for i, x in enumerate(t["x"]):
        near = nearest(x, t["X"], h["max_queries"])
        assert torch.equal(near, t["nearest"][i])
        kernel = Kernel("matern-5/2", float(t["lengthscale"][i]))
        posterior = Posterior(kernel, t["X"][near], t["y"][near], h["noise"])
        assert (posterior.gradient(x) - t["grad_gp"][i]).abs().max() <= bounds["grad_gp"]
        assert (posterior.gradient(x) - t["grad_gp_numeric"][i]).norm() < 1e-4 * t["grad_gp"][i].norm()
        made = Features(t["rff_W"], t["rff_b"])
        found = made.gradient(x, t["rff_nu"][i]) * scaled(t["y"][near])[1]
        assert (found - t["grad_rff"][i]).abs().max() <= bounds["grad_rff"]


def test_the_likeliest_lengthscale_is_the_recorded_one() -> None:
    """The traces' were refitted by the published code, by another search: the same to 2 %."""
    for name in ("fzoos_gp_d5_f64", "fzoos_gp_d8_f64"):
        trace = load(name)
        t = trace.tensors
        for i, x in enumerate(t["x"]):
            near = nearest(x, t["X"], trace.hyper["max_queries"])
            found = best_lengthscale("matern-5/2", t["X"][near], t["y"][near])
            assert found == pytest.approx(float(t["lengthscale"][i]), rel=0.02)


# -- the surrogate ---------------------------------------------------------------------------------------------------------


def _points(count: int, d: int, seed: int = 0) -> Tensor:
    return torch.rand(count, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("kind", ["matern-5/2", "rbf"])
def test_gradients_and_their_variance_are_those_of_autograd(kind: Any) -> None:
    """The posterior mean differentiated; and k'' - k' K^-1 k' summed over the diagonal."""
    kernel, places = Kernel(kind, 0.7), _points(9, 3)
    values = places.square().sum(1) * 5 + 2
    posterior = Posterior(kernel, places, values, 1e-6)
    x = _points(1, 3, 1)[0].requires_grad_()

    def k(a: Tensor, b: Tensor) -> Tensor:
        return kernel.value((a - b + 1e-18).square().sum(-1).sqrt())

    y, spread = scaled(values)
    inverse = torch.linalg.inv(k(places[:, None], places[None]) + 1e-6 * torch.eye(9, dtype=F64))
    mean = (k(x, places) @ inverse @ y) * spread
    assert torch.allclose(posterior.gradient(x.detach()), torch.autograd.grad(mean, x)[0], atol=1e-8)
    slopes = torch.autograd.functional.jacobian(lambda x: k(x, places), x.detach())  # [9, 3]
    wanted = 3 * kernel.prior - (slopes.T @ inverse @ slopes).trace()
    assert posterior.uncertainty(x.detach()[None])[0] == pytest.approx(float(wanted), abs=1e-6)
    at = torch.full((), 1e-4, dtype=F64)  # the prior is the curvature of the kernel at no distance
    assert kernel.prior == pytest.approx(float(2 * (1 - kernel.value(at)) / at**2), rel=1e-3)


def test_quadratic_functions_are_learned() -> None:
    """Enough queries, RBF kernel: the surrogate's gradient becomes the function's."""
    d = 4
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=F64)
    x, errors = torch.full((d,), 0.5, dtype=F64), []
    exact = a.T @ (a @ x - 1.0)
    for count in (6, 20, 80):
        places = _points(count, d, 2)
        values = 0.5 * (places @ a.T - 1.0).square().sum(1)
        posterior = Posterior(Kernel("rbf", best_lengthscale("rbf", places, values, 1e-9)), places, values, 1e-9)
        errors.append(float((posterior.gradient(x) - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_features_become_the_kernel() -> None:
    """Gradients of the kernel from M features are wrong by about M^(-1/2)."""
    d, places, x = 3, _points(12, 3), _points(1, 3, 1)[0]
    alpha = torch.linspace(-1, 1, 12, dtype=F64)
    kernel = Kernel("rbf", 0.8)
    way = x - places
    exact = -(kernel.pull(way.norm(dim=1)) * alpha) @ way
    errors = {}
    for m in (400, 40_000):
        found = []
        for seed in range(8):
            made = features(seed, d, m, 0.8)
            found.append(float((made.gradient(x, made(places).T @ alpha) - exact).square().sum()))
        errors[m] = math.sqrt(sum(found) / len(found))
    assert errors[400] / errors[40_000] == pytest.approx(10.0, rel=0.5)
    assert errors[40_000] < 0.08 * float(exact.norm())


@pytest.mark.parametrize("components", [10, 400])
def test_features_go_through_the_values(components: int) -> None:
    """With more features than places and with fewer; the gradient is that of the fit."""
    places = _points(30, 2)
    values = 3 * places.sum(1) - 1
    made = features(0, 2, components, 1.0)
    nu = made.fit(places, values, 1e-8)
    assert ((made(places) @ nu) - (values - values.min())).abs().max() < (0.2 if components == 10 else 1e-3)
    x = torch.tensor([0.4, 0.6], dtype=F64, requires_grad=True)
    wanted = torch.autograd.grad(made(x[None])[0] @ nu, x)[0]
    assert torch.allclose(made.gradient(x.detach(), nu), wanted, atol=1e-9 * float(nu.norm()))


def test_nothing_to_learn() -> None:
    places = _points(5, 2)
    flat = torch.full((5,), 3.0, dtype=F64)
    assert not Posterior(Kernel(), places, flat).gradient(places[0]).any()
    assert best_lengthscale("rbf", places, flat) == 1.0
    same = places[:1].repeat(5, 1)
    assert best_lengthscale("rbf", same, torch.arange(5.0, dtype=F64)) == 1.0
    assert bool(Posterior(Kernel(), same, torch.arange(5.0, dtype=F64)).gradient(places[1]).isfinite().all())
    points = around(places[0], 0.1, 1000, 7)
    assert (points - places[0]).abs().max() <= 0.1
    assert (points - places[0]).mean(0).abs().max() < 0.01


# -- rounds ----------------------------------------------------------------------------------------------------------------


class Row(nn.Module):
    def __init__(self, d: int = 4, dtype: torch.dtype = F64):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(2, d // 2, dtype=dtype))
        self.a = nn.Parameter(torch.zeros(d - d // 2 * 2 + 1, dtype=dtype))

    def forward(self, goal: float) -> Tensor:
        return sum((p.double() - goal).square().sum() for p in self.parameters())  # type: ignore[return-value]


def _run(
    steps: int = 3, goals: tuple[float, ...] = (1.0,), net: nn.Module | None = None, **own: Any
) -> tuple[nn.Module, FZooS]:
    net = Row() if net is None else net
    opt = FZooS(net, clients=len(goals), **{**SMALL, **own})
    for _ in range(steps):
        opt.step([lambda goal=goal: net(goal) for goal in goals])
    return net, opt


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def test_clients_alike_are_one_client() -> None:
    """Where all have the same function and the same queries, the correction is nothing."""
    one, _ = _run(goals=(1.0,))
    opt = FZooS(Row(), clients=3, **SMALL)
    opt._prepare_laws(opt._moved())
    probe = opt.probe
    probe.table.known = [(_points(10, 5), _points(10, 1)[:, 0])] * 3
    assert all(not drift(torch.zeros(5, dtype=F64)).any() for drift in probe._drift(torch.zeros(5, dtype=F64)))
    probe.table.known[0] = (_points(10, 5), _points(10, 1, 4)[:, 0])
    drifts = [drift(torch.zeros(5, dtype=F64)) for drift in probe._drift(torch.zeros(5, dtype=F64))]
    assert drifts[0].abs().max() > 1e-3
    assert torch.allclose(sum(drifts), torch.zeros(5, dtype=F64), atol=1e-9 * float(drifts[0].norm())), "they cancel"  # type: ignore[call-overload]
    probe.table.clear()
    assert _flat(one).min() > 0.1


def test_without_correction_it_is_federated_averaging() -> None:
    """correction=0: the mean of what each client does alone, with the queries that it makes; written out here."""
    goals = (1.0, -0.4)
    net, opt = _run(1, goals, correction=0.0, weights=(3.0, 1.0))
    ends = []
    table, probe = opt.probe.table, opt.probe
    for client, goal in enumerate(goals):
        other = Row()
        again = FZooS(other, clients=2, **{**SMALL, "correction": 0.0, "weights": (1.0 - client, float(client))})
        again.step([lambda other=other: other(goals[0]), lambda other=other: other(goals[1])])
        ends.append(_flat(other))
        assert (goal - ends[-1]).abs().mean() < abs(goal)
    assert torch.allclose(_flat(net), 0.75 * ends[0] + 0.25 * ends[1], atol=1e-12)
    assert table.x is None
    assert probe.shares == [0.75, 0.25]
    corrected, _ = _run(1, goals, weights=(3.0, 1.0))
    assert not torch.allclose(_flat(net), _flat(corrected), atol=1e-4)


def test_the_correction_takes_clients_to_the_common_goal() -> None:
    """Two clients that pull apart by steps of one length end in the middle between them; corrected, at the minimum of the sum."""
    found = {}
    for correction in (0.0, 1.0):
        net, opt = _run(5, (1.0, -0.6), correction=correction, local_steps=5)
        found[correction] = float((_flat(net) - 0.2).abs().max()), opt.param_groups[0]["forward_kept"]["radius"]
    assert found[0.0][0] > 0.15
    assert found[1.0][0] < 0.05
    assert found[1.0][1] < found[0.0][1], "and they stay closer together"


def test_it_descends_and_asks_as_often_as_it_says() -> None:
    records: list[Record] = []
    net, opt = _run(6, (1.0,), on_step=records.append, local_lr=0.06)
    assert (_flat(net) - 1.0).abs().max() < 0.2
    assert opt.probe.evaluations == 10 + 3 + 2 * 2
    assert opt.evaluated == 6 * 17
    assert all(len(record.losses) == 17 for record in records)


def test_queries_are_where_the_loss_was_evaluated() -> None:
    """Also for weights of 16 bits, which round."""
    for dtype in (F64, torch.float32, torch.bfloat16):
        net = Row(4, dtype)
        seen: list[tuple[Tensor, float]] = []

        def closure(net: nn.Module = net, seen: list[tuple[Tensor, float]] = seen) -> Tensor:
            value = net(1.0)
            seen.append((_flat(net).double(), float(value)))
            return value

        opt = FZooS(net, memory="in-place-exact", **SMALL)
        for _ in range(2):
            opt.step(closure)
        found = torch.cat([opt.state[p][QUERIES][0, : len(seen)] for p in net.parameters()], 1)
        assert torch.equal(found, torch.stack([place for place, _ in seen]))
        values = opt.state[net.a][VALUES][0, : len(seen)]
        assert torch.equal(values, torch.tensor([value for _, value in seen], dtype=F64))


def test_the_oldest_queries_make_room() -> None:
    straight, opt = _run(3, capacity=500)
    assert opt.state[straight.a][ASKED] == 51
    small, other = _run(3, capacity=20)
    assert other.state[small.a][ASKED] == 51
    assert other.state[small.a][QUERIES].shape == (1, 20, 1)
    kept = opt.state[straight.a][VALUES][0]
    first = other.state[small.a][VALUES][0]
    one, last = _run(1, capacity=20)[1], _run(1, capacity=500)[1]
    assert torch.equal(
        one.state[one._moved()[0].parameter][VALUES][0, :17], last.state[last._moved()[0].parameter][VALUES][0, :17]
    )
    assert kept.shape[0] == 500
    assert bool(first.all())


def test_a_run_can_be_cut_anywhere() -> None:
    goals = (1.0, -0.4)
    whole, _ = _run(4, goals, capacity=30)
    net, first = _run(2, goals, capacity=30)
    second = FZooS(net, 0.5, clients=2, seed=9, **{**SMALL, "capacity": 30})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.step([lambda goal=goal: net(goal) for goal in goals])
    assert torch.equal(_flat(net), _flat(whole))


def test_values_out_of_range() -> None:
    for bad, word in (
        ({"clients": 0}, "clients"), ({"near": 1}, "near"), ({"local_lr": 0.0}, "local_lr"), ({"kernel": "cubic"}, "kernel"),
        ({"capacity": 1}, "capacity"), ({"weights": (1.0, 2.0)}, "weights"), ({"noise": 0.0}, "noise"),
        ({"lengthscale": -1.0}, "lengthscale"), ({"betas": (1.0, 0.9)}, "beta"),
        ({"correction": -1.0}, "correction"), ({"rule": "sdg"}, "rule"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            FZooS(Row(), **bad)
    with pytest.raises(InputError, match="1,001 scalars are trained"):
        FZooS([("x", nn.Parameter(torch.zeros(1001)))])
    FZooS(nn.Linear(100, 11), targets="bias")
    opt = FZooS(Row(), clients=2, **SMALL)
    for closure in (lambda: 1.0, [lambda: 1.0], [lambda: 1.0, 3.0]):
        with pytest.raises(InputError, match="one for each of 2 clients"):
            opt.step(closure)  # type: ignore[arg-type]
