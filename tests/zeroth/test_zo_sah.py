"""ZO-SAH: the recorded traces of our rule, exact fits, Newton steps, limits, values reused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Trace, load

from tare.core.errors import InputError
from tare.methods.deepzero import DeepZero
from tare.methods.zo_sah import ZOSAH
from tare.testing.directions import RecordedDirections
from tare.zeroth.planes import fit, floored, gram, newton, orthonormal
from tare.zeroth.record import Record


class Recorded(nn.Module):
    """The objective of a trace."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.x = nn.Parameter(trace.tensors["x0"].clone())
        self.a, self.b, self.logistic = trace.tensors["A"], trace.tensors["b"], "logistic" in trace.name

    def forward(self) -> Tensor:
        if self.logistic:
            return nn.functional.softplus(-self.b * (self.a @ self.x)).mean() + 0.05 * self.x.square().sum()
        return 0.5 * (self.a @ self.x - self.b).square().sum()


@pytest.mark.parametrize("memory", ["forward", "in-place-exact"])
@pytest.mark.parametrize("name", ["zosah_logistic_planes_f64", "zosah_quad_newton_f64"])
def test_trace(name: str, memory: str) -> None:
    trace = load(name)
    h, t, bounds = trace.hyper, trace.tensors, trace.meta["tolerance"]
    net = Recorded(trace)
    drawn = {i: planes.flatten(0, 1) for i, planes in enumerate(t["planes"])}
    records: list[Record] = []
    opt = ZOSAH(
        net, h["eta"], planes=h["planes"], eps=h["eps"], period=h["period"], ridge=h["ridge"], eigen_floor=h["eigen_floor"], cap=None,
        extra={i: u.tolist() for i, u in enumerate(t["u_extra"])}, directions=RecordedDirections(drawn), memory=memory,
        on_step=records.append,
    )  # fmt: skip
    for step in range(len(t["x"])):
        opt.step(net)
        assert (torch.tensor(records[-1].deltas, dtype=torch.float64) - t["g"][step].flatten()).abs().max() <= bounds[
            "g"
        ]
        assert min(abs(records[-1].losses[0] - t["loss"][step]), abs(net().item() - t["loss"][step])) <= bounds["loss"]
        losses = records[-1].losses
        for j in range(h["planes"]):
            points = [(0.0, 0.0), (h["eps"], 0.0), (0.0, h["eps"]), *map(tuple, t["u_extra"][step, j].tolist())]
            values = [0.0, *(loss - losses[0] for loss in losses[1 + 5 * j : 6 + 5 * j])]
            found = fit(points, values, h["ridge"])
            expected = t["H"][step, j]
            assert (torch.tensor(found, dtype=torch.float64) - expected.flatten()[[0, 1, 3]]).abs().max() <= bounds["H"]
            f1, f2, (n1, n2) = floored(found, h["eigen_floor"])
            way = torch.tensor([[n1, n2], [n2, -n1]], dtype=torch.float64)
            whole = (f1 + f2) / 2 * torch.eye(2, dtype=torch.float64) + (f1 - f2) / 2 * way
            assert (whole - t["H_floored"][step, j]).abs().max() <= bounds["H_floored"]
        assert (net.x - t["x"][step]).abs().max() <= bounds["x"]


# -- one plane ---------------------------------------------------------------------------------------------------------------


def test_six_values_of_a_quadratic_give_its_curvature() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b, c, p, q, r = torch.randn(6, generator=generator, dtype=torch.float64).tolist()
        points = torch.randn(6, 2, generator=generator, dtype=torch.float64).mul(0.01).tolist()
        values = [a * u * u / 2 + b * u * v + c * v * v / 2 + p * u + q * v + r for u, v in points]
        found = fit([(u, v) for u, v in points], values, 0.0)
        spread = torch.tensor(points, dtype=torch.float64)
        features = (
            torch.stack([torch.ones(6), *spread.T, spread[:, 0] ** 2, spread.prod(1), spread[:, 1] ** 2], 1) / 0.01
        )
        assert torch.allclose(
            torch.tensor(found), torch.tensor([a, b, c]), rtol=0, atol=1e-9 * float(torch.linalg.cond(features))
        )


@pytest.mark.parametrize(
    "h", [(2.0, 0.5, 1.0), (-2.0, 0.5, 1.0), (1.0, 3.0, 1.0), (4.0, 0.0, 0.0), (3.0, 0.0, 3.0), (-1.0, 0.2, -5.0)]
)
def test_floored_magnitudes_of_eigenvalues(h: Any) -> None:
    matrix = torch.tensor([[h[0], h[1]], [h[1], h[2]]], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    expected = vectors @ torch.diag(values.abs().clamp(min=0.1 * float(values.abs().max()))) @ vectors.T
    g = torch.tensor([0.3, -1.7], dtype=torch.float64)
    found = torch.tensor(newton((0.3, -1.7), h, 0.1), dtype=torch.float64)
    assert torch.allclose(found, torch.linalg.solve(expected, g), rtol=1e-12, atol=1e-12)
    mirrored = newton((-0.3, 1.7), (-h[0], -h[1], -h[2]), 0.1)
    assert mirrored == (-found[0].item(), -found[1].item())


def test_without_curvature_in_the_values_it_is_the_slope() -> None:
    assert newton((0.3, -1.7), (0.0, 0.0, 0.0), 0.1) == (0.3, -1.7)


# -- all of them -------------------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """0.5 w.H w - b.w over two leaves, d scalars in all."""

    def __init__(self, d: int = 8, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one = nn.Parameter(torch.randn(d // 2, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(d - d // 2, generator=generator, dtype=torch.float64))
        root = torch.randn(d, d, generator=generator, dtype=torch.float64)
        self.h = root @ root.T / d + 0.2 * torch.eye(d, dtype=torch.float64)
        self.b = torch.randn(d, generator=generator, dtype=torch.float64)

    def flat(self) -> Tensor:
        return torch.cat([self.one, self.two])

    def forward(self) -> Tensor:
        w = self.flat()
        return 0.5 * w @ self.h @ w - self.b @ w


def test_one_plane_of_two_dimensions_is_one_newton_step() -> None:
    """Up to what forward differences add to the gradient: eps / 2 times the diagonal of H in the plane's basis."""
    net, eps = Quadratic(2), 1e-6
    ZOSAH(net, planes=1, eps=eps, cap=None, eigen_floor=1e-9, ridge=0.0).step(net)
    exact = torch.linalg.solve(net.h, net.b)
    assert (net.flat() - exact).norm() < 1e-2  # of a fit over 1e-6, with its rounding
    net = Quadratic(2)
    ZOSAH(net, planes=1, eps=1e-3, cap=None, eigen_floor=1e-9, ridge=1e-14).step(net)
    assert (net.flat() - exact).norm() < 2e-3


@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
def test_planes_are_orthonormal(directions: str) -> None:
    net = Quadratic(8)
    opt = ZOSAH(net, 0.1, planes=3, directions=directions)
    opt.step(net)
    products = gram(opt._moved(), 6)
    rows = torch.tensor(orthonormal(products), dtype=torch.float64)
    z = torch.stack(
        [
            torch.cat(
                [leaf.directed.law.draw(leaf.draw(i), leaf.state, leaf.parameter.detach()) for leaf in opt._moved()]
            )
            for i in range(6)
        ]
    )
    assert torch.allclose(z @ z.T, products, rtol=1e-12, atol=1e-12)
    assert torch.allclose((rows @ z) @ (rows @ z).T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-11)


def test_without_curvature_all_planes_are_coordinates_of_a_rotated_basis() -> None:
    """d / 2 planes and H = 1: the whole gradient, up to eps / 2 times the curvature."""
    net, eps = Quadratic(8), 1e-6
    before = net.flat().detach().clone()
    gradient = net.h @ before - net.b
    opt = ZOSAH(net, 0.1, planes=4, eps=eps, curvature=False, cap=None)
    assert opt.probe.evaluations == 9
    opt.step(net)
    assert torch.allclose((before - net.flat()) / 0.1, gradient, rtol=0, atol=1e-4)


def test_planes_of_coordinates_without_curvature_are_deepzero() -> None:
    """d / 2 planes along the axes, H = 1: the same losses and the same step as all coordinates by finite differences."""
    net, other, seen = Quadratic(8), Quadratic(8), list[Record]()
    axes = torch.eye(8, dtype=torch.float64)
    drawn = RecordedDirections({0: {"one": axes[:, :4], "two": axes[:, 4:]}})
    ZOSAH(net, 0.1, planes=4, eps=1e-2, curvature=False, cap=None, directions=drawn, on_step=seen.append).step(net)
    DeepZero(other, 0.1, 1e-2, sparsity=0.0, rule="sgd", weight_decay=0.0, on_step=seen.append).step(other)
    assert seen[0].losses == seen[1].losses
    assert seen[0].deltas == seen[1].deltas
    assert torch.allclose(net.flat(), other.flat(), rtol=0, atol=1e-15)


def test_without_curvature_it_is_descent_in_the_span() -> None:
    net = Quadratic(8)
    before = net.flat().detach().clone()
    gradient = net.h @ before - net.b
    opt = ZOSAH(net, 0.1, planes=2, eps=1e-6, curvature=False, cap=None)
    leaves = opt._moved()
    z = torch.stack(
        [
            torch.cat([leaf.directed.law.draw(leaf.draw(i), leaf.state, leaf.parameter.detach()) for leaf in leaves])
            for i in range(4)
        ]
    )
    e = torch.tensor(orthonormal(gram(leaves, 4)), dtype=torch.float64) @ z
    opt.step(net)
    assert torch.allclose((before - net.flat()) / 0.1, e.T @ (e @ gradient), rtol=0, atol=1e-4)


def test_values_reused_take_the_steps_of_fresh_ones_on_a_quadratic() -> None:
    nets, counts = [Quadratic(6), Quadratic(6)], []
    for net, reuse in zip(nets, (True, False), strict=True):
        opt = ZOSAH(net, 0.5, planes=1, eps=1e-2, period=4, reuse=reuse, cap=None)
        for _ in range(8):
            opt.step(net)
        counts.append(opt.evaluated)
        assert opt.evaluated == 8 * opt.probe.evaluations
    assert counts == [30, 48]
    assert torch.allclose(nets[0].flat(), nets[1].flat(), rtol=0, atol=1e-6)


def test_values_reused_survive_a_resume() -> None:
    net = Quadratic(6)
    opt = ZOSAH(net, 0.5, planes=1, period=5, reuse=True)
    for _ in range(3):
        opt.step(net)
    again = copy.deepcopy(net)
    resumed = ZOSAH(again, 0.5, planes=1, period=5, reuse=True)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        opt.step(net)
        resumed.step(again)
    assert net.flat().equal(again.flat())
    assert resumed.evaluated == 3 + 3 + 6


def test_a_cap_bounds_the_step_of_each_plane() -> None:
    net = Quadratic(8)
    before = net.flat().detach().clone()
    ZOSAH(net, 1.0, planes=1, cap=1e-3).step(net)
    assert (net.flat() - before).norm().item() == pytest.approx(1e-3, rel=1e-9)


def test_newton_steps_beat_plain_ones_where_curvatures_differ() -> None:
    """Curvatures from 1 to 1000: planes with curvature get within a hundredth while plain descent at its best rate has not."""
    finals = []
    for curvature, lr in ((True, 1.0), (False, 1e-3), (False, 3e-3)):
        net = Quadratic(8)
        net.h = torch.diag(torch.logspace(0, 3, 8, dtype=torch.float64))
        opt = ZOSAH(net, lr, planes=1, eps=1e-4, curvature=curvature, cap=None)
        for _ in range(150):
            opt.step(net)
        least = -0.5 * net.b @ torch.linalg.solve(net.h, net.b)
        finals.append(net().item() - least.item())
    assert finals[0] < 0.1 * min(finals[1:])


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"planes": 0}, "planes"), ({"eps": 0.0}, "eps"), ({"eigen_floor": 0.0}, "eigen_floor"), ({"cap": 0.0}, "cap"),
        ({"ridge": -1.0}, "ridge"), ({"period": -1}, "period"), ({"reuse": True}, "planes=1"),
        ({"reuse": True, "planes": 1, "curvature": False}, "curvature"), ({"reuse": True, "planes": 1, "weight_decay": 0.1}, "decay"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(own: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ZOSAH(Quadratic(), **own)


def test_more_directions_than_weights_are_refused() -> None:
    net = Quadratic(4)
    before = net.flat().detach().clone()
    with pytest.raises(InputError, match="fewer planes"):
        ZOSAH(net, planes=3).step(net)
    assert net.flat().equal(before)
