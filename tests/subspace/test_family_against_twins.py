"""FRUGAL, Online Subspace Descent, DCT-AdamW, Trion and GaLore+ against slow float64 twins, and the limits that their cards name."""

import math
from typing import Any

import pytest
import torch
from reference import twins
from reference import twins_subspace as slow
from reference.stepping import SHAPES, gradients, numbers, run, twin, worst
from torch import Tensor, nn

import tare
from tare.rules.maps import Orthogonal
from tare.subspace.coordinates import CoordinateBasis, EntryBasis, shuffled, top
from tare.subspace.dct import DCTBasis, dct_matrix, makhoul
from tare.subspace.online import OnlineBasis, pca_gradient, projector_error
from tare.subspace.refresh import AdaptiveRefresh
from tare.testing import RecordedBasis

STEPS, PERIOD, RANK = 11, 4, 3
LRS = [0.01 * (1 + t % 4) for t in range(STEPS)]
TIGHT = 1e-10  # float64
KINKED = 1e-7  # Adam's eps 1e-8 after a division by tiny roots, as in the twins of dense Adam

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Shape = tuple[int, int]


def library(key: str, shape: Shape, steps: int = STEPS, **hyper: Any) -> list[Tensor]:
    p = nn.Parameter(numbers("w", shape))
    optimizer = tare.create(key, [{"params": [("w", p)], "role": "linear"}], lr=LRS[0], **hyper)
    return run(optimizer, p, gradients(shape, steps), LRS[:steps])


def reference(step: Any, shape: Shape, steps: int = STEPS, **own: Any) -> list[Tensor]:
    return twin(step, numbers("w", shape), gradients(shape, steps), LRS[:steps], **own)


@shapes
@pytest.mark.parametrize("selection", ["columns", "rows", "randk"])
@pytest.mark.parametrize("outside", ["sign", "sgd", "none"])
def test_frugal_on_coordinates(shape: Shape, selection: str, outside: str) -> None:
    m, n = shape
    picks = {}
    for k in range(0, STEPS, PERIOD):
        length = {"columns": n, "rows": m, "randk": m * n}[selection]
        count = max(1, int(0.4 * length))
        picks[k] = shuffled(k + 1, (), length, count, torch.device("cpu"))

    def mask(k: int, _: Tensor) -> Tensor:
        out = torch.zeros(shape, dtype=torch.float64)
        index = picks[k].long()
        target = out.view(-1) if selection == "randk" else out if selection == "rows" else out.T
        target[index] = 1
        return out

    hyper = {"density": 0.4, "period": PERIOD, "selection": selection, "outside": outside, "outside_scale": 0.5}
    got = library("frugal", shape, weight_decay=0.1, basis=RecordedBasis(picks), **hyper)
    own = {"period": PERIOD, "kappa": 0.5, "eps": 1e-8, "wd": 0.1, "chosen": mask, "outside": outside}
    assert worst(got, reference(slow.frugal, shape, **own)) < TIGHT


@shapes
@pytest.mark.parametrize("outside", ["sign", "none"])
def test_frugal_with_svd(shape: Shape, outside: str) -> None:
    side, rank = twins.published_side(torch.zeros(shape)), round(0.4 * min(shape))
    # eps well above rounding: right after a refresh Adam divides entries of R that should be zero by their own size.
    got = library("frugal", shape, density=0.4, period=PERIOD, selection="svd", outside=outside, eps=1e-3)
    own = {"period": PERIOD, "kappa": 1.0, "eps": 1e-3, "wd": 0.0, "outside": outside}
    wanted = reference(slow.frugal, shape, chosen=lambda _, g: (side, twins.basis(g, rank, side)), **own)
    assert worst(got, wanted) < KINKED


@shapes
def test_frugal_at_the_ends_of_density(shape: Shape) -> None:
    """Everything inside and no refresh is AdamW; nothing inside is signSGD; a density of one restarts Adam every period."""
    adam = library("adamw", shape, eps=1e-8, weight_decay=0.0)
    assert worst(library("frugal", shape, density=1.0, period=1000, selection="columns"), adam) < TIGHT
    sign = library("frugal", shape, density=0.0)
    w = numbers("w", shape)
    for got, g, lr in zip(sign, gradients(shape, STEPS), LRS, strict=True):
        w = w - lr * torch.sign(g)
        assert (got - w).abs().max() < TIGHT


@shapes
def test_online_subspace(shape: Shape) -> None:
    got = library("online-subspace", shape, rank=RANK, gap=20, scale=0.25, weight_decay=0.1)
    own = {"first_lr": LRS[0], "rank": RANK, "gap": 20, "alpha": 0.25, "wd": 0.1}
    assert worst(got, reference(slow.online_subspace, shape, **own)) < KINKED


@shapes
def test_a_basis_that_does_not_move_is_galore_without_refresh(shape: Shape) -> None:
    still = library("online-subspace", shape, rank=RANK, gap=10**15, basis_weight_decay=0.0)
    assert worst(still, library("galore", shape, rank=RANK, period=10**9)) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_of_the_pca_loss(side: Any) -> None:
    """Against finite differences of the loss as written, for a P that is not orthonormal."""
    g, p = numbers("g", (7, 9)), numbers("p", (7 if side == "left" else 9, 3))
    h = (g if side == "left" else g.T) / g.norm()

    def loss(q: Tensor) -> float:
        return float(((q @ q.T @ h - h) ** 2).sum())

    r = p.T @ g if side == "left" else g @ p
    found = pca_gradient(g, p, r, side)
    for i, j in ((0, 0), (3, 1), (6, 2)):
        step = torch.zeros_like(p)
        step[i, j] = 1e-6
        assert math.isclose((loss(p + step) - loss(p - step)) / 2e-6, float(found[i, j]), rel_tol=1e-6)


def test_online_basis_finds_a_stationary_subspace() -> None:
    """Card 8's oracle: from a random start the projector error falls below 0.05."""
    u, v = torch.linalg.qr(numbers("u", (24, 4))).Q, torch.linalg.qr(numbers("v", (40, 4))).Q
    p = nn.Parameter(torch.zeros(24, 40, dtype=torch.float64))
    start = OnlineBasis(4, gap=1, start=RecordedStart(4))
    group = [{"params": [("w", p)], "role": "linear"}]
    opt = tare.create("online-subspace", group, lr=1e-2, rank=4, basis=start, basis_weight_decay=0.0)
    # Every draw has the same top directions, with weights that change their order.
    grads = [u @ torch.diag(1 + numbers("s", (4,), t).abs()) @ v.T for t in range(900)]
    errors = []
    for t, g in enumerate(grads):
        opt.param_groups[0]["lr"] = 1e-2 * 0.05 * 0.995**t
        p.grad = g.clone()
        opt.step()
        errors.append(projector_error(opt.state[p]["basis"], g, "left"))
    assert errors[0] > 0.5
    assert errors[-1] < 0.05, errors[-1]


class RecordedStart(OnlineBasis):
    def compute(self, grad: Tensor, side: Any, previous: Any, key: int, index: int = 0) -> Tensor:
        return torch.linalg.qr(numbers("start", (24, 4))).Q


@shapes
@pytest.mark.parametrize("transform", ["matmul", "makhoul"])
@pytest.mark.parametrize("feedback", ["none", "moment"])
@pytest.mark.parametrize("norm", [1, 2])
def test_dct_adamw(shape: Shape, transform: str, feedback: str, norm: int) -> None:
    hyper = {"rank": RANK, "period": PERIOD, "transform": transform, "norm": norm, "weight_decay": 0.1}
    got = library("dct-adamw", shape, feedback=feedback, **hyper)
    own = {
        "rank": RANK,
        "period": PERIOD,
        "wd": 0.1,
        "norm": norm,
        "transform": transform,
        "feedback": feedback != "none",
    }
    assert worst(got, reference(slow.dct_adamw, shape, **own)) < KINKED


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_cosine_matrix(size: int) -> None:
    d = dct_matrix(size, torch.float64, "cpu")
    assert (d - slow.cosines(size)).abs().max() < 1e-12
    assert (d.T @ d - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12
    x = numbers("x", (4, size))
    assert (makhoul(x) - x @ d.T).abs().max() < 1e-12
    low = makhoul(x.float()) - x.float() @ d.T.float()
    assert low.abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_chosen_cosines_keep_their_share_of_energy(shape: Shape) -> None:
    """Scored by L2, r of s columns hold at least r / s of |A|^2."""
    for t in range(20):
        g = numbers("flat", shape, t)
        basis = DCTBasis(2, norm=2)
        side: Any = "right" if shape[0] > shape[1] else "left"
        kept = basis.compute(g, side, None, 0)
        assert kept is not None
        r = basis.at(kept, g, side, torch.float64).project(g)
        assert float(r.square().sum()) >= 2 / 5 * float(g.square().sum()) - 1e-12


@pytest.mark.parametrize("form", ["moment", "int8", "int4"])
def test_error_feedback_round_trips(form: Any) -> None:
    """What is fed back is what the subspace missed, to the width of its storage (the published 4-bit form is off by 1.39)."""
    p = nn.Parameter(torch.zeros(64, 48))
    opt = tare.create("dct-adamw", [{"params": [("w", p)], "role": "linear"}], lr=1e-3, rank=8, feedback=form)
    g = numbers("g", (64, 48)).float()
    p.grad = g.clone()
    opt.step()
    entry = opt._entries[p]
    from tare.core.state import State

    state = State(opt.state[p], entry.slots)
    at = entry.transform.basis.at(state["basis"], g, "right", torch.float32)  # type: ignore[attr-defined]
    missed = g - at.project(g) @ at.p.T  # type: ignore[attr-defined]
    error = float((state["feedback"] - missed).norm() / missed.norm())
    assert error < {"moment": 1e-6, "int8": 0.01, "int4": 0.12}[form], error


@shapes
def test_trion(shape: Shape) -> None:
    exact = Orthogonal(dtype="fp32")
    got = library("trion", shape, rank=RANK, weight_decay=0.1)
    wanted = reference(slow.trion, shape, rank=RANK, mu=0.95, wd=0.1)
    # bf16 Newton-Schulz: 0.4 % of unit singular values at each of 11 steps of at most 0.04
    assert worst(got, wanted) < 0.02
    assert exact.dtype == "fp32"


def test_trion_keeps_what_it_leaves_out() -> None:
    """One step from zero: the momentum is G - (1 - mu) b Q^T, so nothing of the gradient is lost."""
    p = nn.Parameter(torch.zeros(12, 5))
    opt = tare.create("trion", [{"params": [("w", p)], "role": "linear"}], lr=0.02, rank=2)
    g = numbers("g", (12, 5)).float()
    p.grad = g.clone()
    opt.step()
    q = slow.cosines(5).float()[:, opt.state[p]["basis"].long()]
    assert (opt.state[p]["feedback"] - (g - 0.05 * g @ q @ q.T)).abs().max() < 1e-6


@shapes
def test_galore_plus(shape: Shape) -> None:
    got = library("galore-plus", shape, rank=RANK, period=1000, density=0.2, basis="svd")
    own = {"rank": RANK, "period": 1000, "alpha": 0.25, "density": 0.2}
    assert worst(got, reference(slow.galore_plus, shape, **own)) < KINKED


@shapes
def test_galore_plus_without_residual_is_galore(shape: Shape) -> None:
    plain = library("galore", shape, rank=RANK, period=PERIOD)
    assert worst(library("galore-plus", shape, rank=RANK, period=PERIOD, density=0.0, basis="svd"), plain) < TIGHT


def test_one_head_for_all() -> None:
    """Every head is projected on the same basis, which one of them gave; with a single head it is the ordinary projection."""
    p = nn.Parameter(torch.zeros(12, 10))
    named = [("layers.0.self_attn.q_proj.weight", p)]
    opt = tare.create("galore-plus", named, lr=1e-2, rank=2, density=0.0, head_dim=4, scale=1.0)
    assert opt.state[p]["basis"].shape == (4, 2)
    assert opt.state[p]["exp_avg"].shape == (6, 10)
    g = numbers("g", (12, 10)).float()
    p.grad = g.clone()
    opt.step()
    basis = opt.state[p]["basis"]
    for h in range(3):
        move = p.detach()[4 * h : 4 * h + 4]
        assert (move - basis @ basis.T @ move).abs().max() < 1e-6, "the update leaves the shared basis"
    top_of = [torch.linalg.svd(g[4 * h : 4 * h + 4])[0][:, :2] for h in range(3)]
    assert any((u @ u.T - basis @ basis.T).abs().max() < 1e-3 for u in top_of), "the basis is no head's own"
    one = [nn.Parameter(torch.zeros(12, 10)) for _ in range(2)]
    for q, dim in zip(one, (12, None), strict=True):
        single = tare.create("galore-plus", [(named[0][0], q)], lr=1e-2, rank=2, head_dim=dim, side="left", density=0.0)
        q.grad = g.clone()
        single.step()
    assert (one[0] - one[1]).abs().max() < 1e-6


def test_subspace_iteration_finds_the_singular_directions() -> None:
    """Card 3's oracle: with a gap of two between sigma_r and sigma_r+1, four rounds leave an angle below 1e-3."""
    from tare.subspace.bases import RandomizedBasis, SVDBasis

    u, v = torch.linalg.qr(numbers("u", (20, 20))).Q, torch.linalg.qr(numbers("v", (30, 20))).Q
    s = torch.cat((torch.linspace(4, 2.1, 5), torch.linspace(1, 0.1, 15))).double()
    g = u @ torch.diag(s) @ v.T
    found = RandomizedBasis(5, power=4, warm=False, oversample=8).compute(g, "left", None, 3)
    exact = SVDBasis(5).compute(g, "left", None, 0)
    assert found is not None
    assert exact is not None
    angle = torch.linalg.svdvals(exact.T @ found).clamp(max=1).acos().max()
    assert float(angle) < 1e-3
    assert ((exact.T @ found).abs() - torch.eye(5)).abs().max() < 1e-3, "not in the order of singular values"


def test_a_settled_leaf_waits_twice_as_long() -> None:
    """Q-GaLore's oracle: with a constant subspace the period doubles at the sixth refresh and at every one after."""
    p = nn.Parameter(torch.zeros(12, 8))
    group = [{"params": [("w", p)], "role": "linear"}]
    opt = tare.create("q-galore", group, lr=1e-3, rank=2, period=2, storage={})
    g, gaps = numbers("g", (12, 8)).float(), []
    for _ in range(40):
        before = opt.state[p]["refreshed"]
        p.grad = g.clone()
        opt.step()
        if opt.state[p]["refreshed"] > before:
            gaps.append(opt.state[p]["gap"])
    assert gaps[:5] == [2] * 5
    assert gaps[5:] == [4 * 2**k for k in range(len(gaps) - 5)]
    assert AdaptiveRefresh().threshold == 0.4


def test_q_galore_at_full_width_is_8_bit_galore() -> None:
    """Without int4 and with a period that never doubles it is the same optimizer."""
    paths = []
    for key, own in (("q-galore", {"threshold": 10.0}), ("galore-8bit", {})):
        p = nn.Parameter(numbers("w", (48, 40)).float())
        storage = tare.Storage("int8", "bf16", min_quantized=1)
        opt = tare.create(
            key,
            [{"params": [("w", p)], "role": "linear"}],
            lr=1e-2,
            rank=8,
            period=3,
            betas=(0.9, 0.999),
            storage=storage,
            **own,
        )
        paths.append(run(opt, p, gradients((48, 40), 8, torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


def test_selections_are_what_they_say() -> None:
    chosen = [shuffled(key, (), 50, 20, torch.device("cpu")) for key in range(200)]
    assert all(len(set(c.tolist())) == 20 and c.tolist() == sorted(c.tolist()) for c in chosen)
    share = torch.bincount(torch.cat(chosen).long(), minlength=50) / 200
    assert (share - 0.4).abs().max() < 5 * math.sqrt(0.24 / 200), "some numbers are drawn too often"
    assert top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
    g = torch.zeros(4, 6)
    g[:, 4], g[:, 1] = 3.0, 2.0
    assert CoordinateBasis(2, "columns", "greedy").compute(g, "right", None, 0).tolist() == [1, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "basis", [CoordinateBasis(0.5, "columns"), EntryBasis(0.5), DCTBasis(3)], ids=["columns", "entries", "dct"]
)
def test_kept_coordinates_keep_their_moments(basis: Any) -> None:
    """Rotation is an exact gather: kept numbers keep their values bit for bit, new ones start at zero."""
    old, fresh = torch.tensor([1, 4, 6], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)
    turn = basis.turn(old, fresh)
    if isinstance(basis, EntryBasis):
        assert turn(torch.tensor([0.1, 0.2, 0.3]), "right", True).tolist() == pytest.approx([0.0, 0.2, 0.3])
        return
    x = numbers("x", (5, 3)).float()
    for side, value in (("right", x), ("left", x.T)):
        got = turn(value, side, True)
        got = got if side == "right" else got.T
        assert torch.equal(got[:, 1:], x[:, 1:])
        assert not got[:, 0].any()


def test_experts_are_stepped_as_matrices_of_their_own() -> None:
    """A batch of experts takes the very steps that its matrices take alone; an expert without tokens stays where it was."""
    for key, own in (
        ("galore", {"rank": 3}), ("fira", {"rank": 3}), ("apollo", {"rank": 3, "basis": "svd"}), ("dct-adamw", {"rank": 3}),
        ("online-subspace", {"rank": 3}), ("frugal", {"selection": "svd", "density": 0.4}), ("trion", {"rank": 3}),
    ):  # fmt: skip
        w = torch.stack([numbers("w", (6, 8), e) for e in range(3)]).double()
        batch = nn.Parameter(w.clone())
        opt = tare.create(key, [{"params": [("experts", batch)], "role": "expert"}], lr=0.01, **own)
        alone = [nn.Parameter(w[e].clone()) for e in range(3)]
        singles = [tare.create(key, [{"params": [("experts", a)], "role": "linear"}], lr=0.01, **own) for a in alone]
        for t in range(5):
            grads = [numbers("g", (6, 8), 10 * t + e) * (e != 1) for e in range(3)]
            batch.grad = torch.stack(grads)
            opt.step()
            for a, single, g in zip(alone, singles, grads, strict=True):
                a.grad = g.clone()
                single.step()
        tolerance = 0.05 if key == "trion" else 1e-9  # bf16 products of a batch are grouped otherwise
        for e in range(3):
            gap = float((batch[e] - alone[e]).detach().abs().max())
            assert gap < tolerance, f"{key}, expert {e}: {gap}"
        if key != "trion":
            assert torch.equal(batch[1].detach(), w[1]), f"{key}: an expert without tokens moved"
