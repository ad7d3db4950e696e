"""Zeroth-order Frank-Wolfe: the recorded traces, oracles against brute force, feasibility, schedules and limits."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Objective, load

from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.methods.mezo import MeZO
from tare.methods.zo_frank_wolfe import ZOFrankWolfe
from tare.testing.directions import RecordedDirections
from tare.zeroth.frank_wolfe import AVERAGE, DIMENSION, SETS, Ball, FrankWolfe, Schedule
from tare.zeroth.record import Record


@pytest.mark.parametrize("memory", ["auto", "forward", "in-place-exact"])
@pytest.mark.parametrize("name", ["zofw_kwsa_l1_f64", "zofw_rdsa_linf_f64", "zofw_irdsa_nuclear_f64"])
def test_trace(name: str, memory: str) -> None:
    trace = load(name)
    h, t, bounds = trace.hyper, trace.tensors, trace.meta["tolerance"]
    net = Objective(trace)
    records: list[Record] = []
    own: dict[str, Any] = {"directions": RecordedDirections(dict(enumerate(t["z"])))} if "z" in t else {}
    opt = ZOFrankWolfe(
        net, estimator=h["estimator"].lower(), m=h["m"], ball=h["ball"], radius=h["radius"], center="zero", least_c=0.0, memory=memory,
        on_step=records.append, **own,
    )  # fmt: skip
    schedule, rule, leaf = opt.probe.schedule, opt.recipe.entries[0][1].rule, opt.leaves[0]
    for step in range(trace.steps):
        before = net.weight.detach().clone()
        opt.step(lambda step=step: net(step))
        gamma, c, rho = t["schedule"][step].tolist()
        assert schedule.step(step) == pytest.approx(gamma, abs=1e-13)
        assert schedule.c(step, h["d"]) == pytest.approx(c, abs=1e-13)
        assert schedule.rho(step, h["d"]) == pytest.approx(rho, abs=1e-13)
        assert torch.tensor(records[-1].losses, dtype=torch.float64).sub(t["loss"][step]).abs().max() <= bounds["loss"]
        if "z" in t:
            g = (torch.tensor(records[-1].deltas, dtype=torch.float64)[:, None, None] * t["z"][step]).mean(0)
        else:
            g = torch.tensor(records[-1].deltas, dtype=torch.float64).view(before.shape)
        assert (g - t["g"][step]).abs().max() <= bounds["g"]
        average = opt.state[net.weight][AVERAGE]
        assert (average - t["d"][step]).abs().max() <= bounds["d"]
        assert (rule.ball.least(average, leaf) - t["v"][step]).abs().max() <= bounds["v"]
        assert (net.weight - t["W"][step]).abs().max() <= bounds["W"]
        assert rule.gap(average, before, torch.zeros_like(before), leaf) >= -1e-12


# -- oracles ---------------------------------------------------------------------------------------------------------------


LEAVES = {
    "tall": Leaf("w", (7, 3), torch.float64, "linear"), "wide": Leaf("w", (3, 7), torch.float64, "linear"),
    "vector": Leaf("b", (6,), torch.float64, "bias"), "scalar": Leaf("s", (), torch.float64, "scalar"),
    "conv": Leaf("c", (4, 2, 3, 3), torch.float64, "conv"), "experts": Leaf("e", (3, 4, 5), torch.float64, "expert"),
}  # fmt: skip


@pytest.mark.parametrize("shape", LEAVES)
@pytest.mark.parametrize("kind", SETS)
def test_oracles_are_least_over_the_set(kind: Any, shape: str) -> None:
    """No other point of the set is lower, in the set they lie themselves, and the value is the dual norm."""
    leaf, ball = LEAVES[shape], Ball(kind, 1.5)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64)

    for _ in range(5):
        d = draw()
        v = ball.least(d, leaf)
        assert v.shape == d.shape
        assert ball.norm(v, leaf) == pytest.approx(1.5)
        lowest = float((v * d).sum())
        for _ in range(30):
            other = draw()
            other = (
                other.abs() * (1.5 / float(other.abs().sum()))
                if kind == "simplex"
                else other * (1.5 / ball.norm(other, leaf))
            )
            assert float((other * d).sum()) >= lowest - 1e-12
    if kind != "simplex":
        assert not ball.least(torch.zeros(leaf.shape, dtype=torch.float64), leaf).any()


def test_values_of_oracles_are_dual_norms() -> None:
    d = torch.tensor([[3.0, -1.0], [0.0, 2.0]], dtype=torch.float64)
    leaf = Leaf("w", (2, 2), torch.float64, "linear")
    duals = {
        "l1": 3.0,
        "linf": 6.0,
        "l2": math.sqrt(14.0),
        "nuclear": float(torch.linalg.matrix_norm(d, 2)),
        "simplex": 1.0,
    }
    for kind, dual in duals.items():
        assert float((Ball(kind, 2.0).least(d, leaf) * d).sum()) == pytest.approx(-2.0 * dual)  # type: ignore[arg-type]


# -- iterates --------------------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """0.5 ||A w - b||^2 over a matrix, from the middle of any set."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.full((4, 3), start, dtype=torch.float64))
        self.a = torch.randn(15, 12, generator=generator, dtype=torch.float64)
        self.b = torch.randn(15, generator=generator, dtype=torch.float64)

    def forward(self) -> Tensor:
        return 0.5 * (self.a @ self.w.reshape(-1) - self.b).square().sum()

    @torch.no_grad()
    def gradient(self) -> Tensor:
        return (self.a.T @ (self.a @ self.w.reshape(-1) - self.b)).view(4, 3)


@pytest.mark.parametrize("estimator", ["kwsa", "rdsa", "i-rdsa"])
@pytest.mark.parametrize("kind", SETS)
def test_iterates_never_leave_the_set(kind: Any, estimator: Any) -> None:
    net = Quadratic(0.7 / 12 if kind == "simplex" else 0.0)
    opt = ZOFrankWolfe(net, estimator=estimator, ball=kind, radius=0.7, center="zero")
    ball, values = Ball(kind, 0.7), [net().item()]
    for _ in range(40):
        opt.step(net)
        assert ball.norm(net.w.detach(), opt.leaves[0]) <= 0.7 * (1 + 1e-9)
        values.append(net().item())
    if estimator == "kwsa":
        assert values[-1] < values[0]


def test_around_the_start_nothing_goes_farther_than_the_radius() -> None:
    net = Quadratic(3.0)
    opt = ZOFrankWolfe(net, estimator="kwsa", ball="l2", radius=0.2)
    start = net.w.detach().clone()
    for _ in range(30):
        opt.step(net)
        assert (net.w - start).norm() <= 0.2 * (1 + 1e-12)
    assert (net.w - start).norm() > 0.15


def test_with_a_small_c_kwsa_is_frank_wolfe_with_gradients() -> None:
    net, other = Quadratic(), Quadratic()
    net.a = other.a = other.a / 5
    opt = ZOFrankWolfe(net, estimator="kwsa", ball="l2", radius=0.5, center="zero", least_c=0.0)
    opt.probe = type(opt.probe)(schedule=Tiny("kwsa"), active=opt.probe.active)
    ball, average = Ball("l2", 0.5), torch.zeros(4, 3, dtype=torch.float64)
    for t in range(25):
        opt.step(net)
        rho = 4 / (t + 8) ** (2 / 3)
        average = (1 - rho) * average + rho * other.gradient()
        with torch.no_grad():
            other.w += 2 / (t + 8) * (ball.least(average, opt.leaves[0]) - other.w)
    assert torch.allclose(net.w, other.w, rtol=0, atol=1e-6)


class Tiny(Schedule):
    def c(self, t: int, d: int) -> float:
        return 1e-6


def test_with_rho_one_the_cube_is_sign_descent() -> None:
    """To +-s itself where gamma is 1; and around the weights of each step it is the sign of MeZO's own estimate."""
    net = Quadratic()
    bias = Schedule("kwsa").c(0, 12) / 2 * net.a.square().sum(0).view(4, 3)  # of one-sided differences
    expected = -0.3 * (net.gradient() + bias).sign()
    ZOFrankWolfe(net, estimator="kwsa", ball="linf", radius=0.3, center="zero", rho=1.0, gamma=1.0).step(net)
    assert torch.allclose(net.w, expected, rtol=0, atol=1e-12)
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    one, other = Quadratic(), Quadratic()
    ZOFrankWolfe(
        one,
        estimator="rdsa",
        ball="linf",
        radius=0.01,
        center="here",
        rho=1.0,
        gamma=1.0,
        directions=RecordedDirections({0: z}),
    ).step(one)
    MeZO(other, 1.0, one_c(one), probe="one-sided", directions=RecordedDirections({0: z})).step(other)
    assert torch.allclose(one.w, 0.01 * other.w.sign(), rtol=0, atol=1e-15)
    third, fourth = Quadratic(), Quadratic()
    ZOFrankWolfe(
        third,
        estimator="rdsa",
        ball="l2",
        radius=0.01,
        center="here",
        rho=1.0,
        gamma=1.0,
        directions=RecordedDirections({0: z}),
    ).step(third)
    MeZO(fourth, 1.0, one_c(one), probe="one-sided", directions=RecordedDirections({0: z})).step(fourth)
    assert torch.allclose(third.w, 0.01 * fourth.w / fourth.w.norm(), rtol=0, atol=1e-14)


def one_c(net: Quadratic) -> float:
    return Schedule("rdsa", least=1e-3).c(0, net.w.numel())


def test_one_direction_of_i_rdsa_has_the_schedule_of_rdsa_but_for_its_d() -> None:
    """c is the same; rho has (1 + d / m) where rdsa has d, so they agree for d large."""
    one, other = Schedule("i-rdsa", m=1), Schedule("rdsa")
    for t in (0, 3, 100):
        assert one.c(t, 50) == other.c(t, 50)
        assert one.rho(t, 10**9) == pytest.approx(other.rho(t, 10**9), rel=1e-9)
        assert one.rho(t, 50) == pytest.approx(other.rho(t, 51))
    nets = [Quadratic(), Quadratic()]
    for net, name in zip(nets, ("i-rdsa", "rdsa"), strict=True):
        opt = ZOFrankWolfe(net, estimator=name, m=1, rho=0.5)  # type: ignore[arg-type]
        for _ in range(3):
            opt.step(net)
    assert nets[0].w.equal(nets[1].w)


def test_first_average_of_kwsa_is_the_first_gradient() -> None:
    assert Schedule("kwsa").rho(0, 10) == 1.0
    assert Schedule("kwsa").step(0) == 0.25


def test_dimension_counts_trained_scalars() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    opt = ZOFrankWolfe(net)
    assert opt.param_groups[0][DIMENSION] == opt.probe.dimension == 4 + 8 + 2
    net[0].weight.requires_grad_(True)
    opt.step(lambda: net(torch.ones(1, 3)).square().mean())
    assert opt.probe.dimension == 26


@pytest.mark.parametrize("weight", ["stochastic", "split24", "master"])
def test_sixteen_bit_weights_stay_inside_but_for_their_rounding(weight: str) -> None:
    net = nn.Linear(6, 5, bias=False).bfloat16()
    start = net.weight.detach().float().clone()
    opt = ZOFrankWolfe(net, ball="linf", radius=0.1, storage={"weight": weight})
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    for _ in range(30):
        opt.step(lambda: net(x).float().square().mean())
    moved = (net.weight.float() - start).abs()
    assert 0.01 < moved.max() <= 0.1 + 0.01


def test_resume_keeps_average_and_center() -> None:
    net = Quadratic(1.0)
    opt = ZOFrankWolfe(net, ball="nuclear", radius=0.4, seed=3)
    for _ in range(3):
        opt.step(net)
    again = copy.deepcopy(net)
    resumed = ZOFrankWolfe(again, ball="nuclear", radius=0.4)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        opt.step(net)
        resumed.step(again)
    assert net.w.equal(again.w)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"ball": "l3"}, "l1"), ({"radius": 0.0}, "radius"), ({"estimator": "spsa"}, "kwsa"), ({"m": 0}, "m"), ({"rho": 2.0}, "rho"),
        ({"gamma": 1.5}, "gamma"), ({"least_c": -1.0}, "least_c"), ({"center": "middle"}, "start"), ({"ball": "simplex"}, "zero"),
        ({"center": "zero", "radius": 0.5}, "outside"), ({"ball": "simplex", "center": "zero"}, "outside"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(own: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ZOFrankWolfe(Quadratic(2.0), **own)


def test_rule_may_be_used_with_other_probes() -> None:
    net = Quadratic()
    opt = MeZO(net, 1.0, rule=FrankWolfe(Ball("l1", 0.2), Schedule("kwsa"), "zero"))
    opt.step(net)
    assert int((net.w != 0).sum()) == 1
