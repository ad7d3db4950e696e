"""Adan, diffGrad and GradNormLoRP against slow float64 twins, and in the limits that their cards name."""

import copy
import itertools
from typing import Any

import pytest
import torch
from reference import twins, twins_moments
from reference.stepping import SHAPES, gradients, numbers, run, twin, worst
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.methods import registry
from tare.testing import RecordedBasis

STEPS, PERIOD, RANK = 11, 4, 3
LRS = [0.01 * (1 + t % 4) for t in range(STEPS)]
TIGHT = 1e-10  # float64; SVDs magnify 1e-16 by at most 1e4 here

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
decays = pytest.mark.parametrize("wd", [0.0, 0.1])


def library(
    key: str, w: Tensor, grads: list[Tensor] | None = None, lrs: list[float] | None = None, **hyper: Any
) -> list[Tensor]:
    """The weight after each step of the method, on the given gradients or on `gradients`."""
    p = nn.Parameter(w.clone())
    grads = gradients(tuple(w.shape), STEPS) if grads is None else grads
    lrs = LRS[: len(grads)] if lrs is None else lrs
    return run(registry.build(key, [{"params": [("w", p)], "role": "linear"}], lrs[0], **hyper), p, grads, lrs)


def reference(step: Any, shape: tuple[int, ...], **own: Any) -> list[Tensor]:
    return twin(step, numbers("w", shape), gradients(shape, STEPS), LRS, **own)


# -- Adan --------------------------------------------------------------------------------------------------------------


@shapes
@decays
@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 3.0])
def test_adan(shape: tuple[int, int], wd: float, no_prox: bool, max_norm: float) -> None:
    own = {"betas": (0.9, 0.8, 0.95), "eps": 1e-3, "no_prox": no_prox}
    got = library("adan", numbers("w", shape), weight_decay=wd, max_grad_norm=max_norm, **own)
    assert worst(got, reference(twins_moments.adan, shape, wd=wd, max_norm=max_norm, **own)) < TIGHT


@decays
def test_adan_without_difference_is_adam(wd: float) -> None:
    """b2 = 0: z = G and the term of v vanishes, which leaves Adam with (b1, b3)."""
    w = numbers("w", (7, 5))
    got = library("adan", w, betas=(0.9, 0.0, 0.99), eps=1e-3, no_prox=True, weight_decay=wd)
    wanted = library("adamw", w, betas=(0.9, 0.99), eps=1e-3, weight_decay=wd)
    assert worst(got, wanted) < 1e-13


def test_adan_on_a_constant_gradient() -> None:
    """d = 0 from the second step on; U = G / |G| at once, since every corrected average of a constant is the constant."""
    w, g = numbers("w", (6, 4)), numbers("g", (6, 4))
    path = [w, *library("adan", w, [g] * 30, [0.01] * 30, eps=1e-12)]
    for before, after in itertools.pairwise(path):
        assert ((before - after) / 0.01 - g.sign()).abs().max() < 1e-9


def test_adan_clips_by_the_norm_over_all_leaves() -> None:
    """Two leaves in two groups: both are seen times max_norm / (|all| + eps), and p.grad stays."""
    weights = [nn.Parameter(numbers(n, s)) for n, s in (("a", (4, 3)), ("b", (5,)))]
    others = [nn.Parameter(p.detach().clone()) for p in weights]
    clipped = registry.build("adan", [{"params": [p]} for p in weights], 0.01, max_grad_norm=1.0, eps=1e-3)
    plain = registry.build("adan", [{"params": [p]} for p in others], 0.01, eps=1e-3)
    for t in range(4):
        grads = [numbers(f"g{k}", tuple(p.shape), t) for k, p in enumerate(weights)]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > 1.0
        for p, q, g in zip(weights, others, grads, strict=True):
            p.grad, q.grad = g.clone(), g / (norm + 1e-3)
        clipped.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(weights, grads, strict=True)), "clipping wrote to p.grad"
    assert worst(weights, others) < 1e-14


def test_a_bad_norm_clips_nothing() -> None:
    """A NaN in one leaf does not reach the other through the norm."""
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = registry.build("adan", [a, b], 0.01, max_grad_norm=0.1)
    a.grad, b.grad = torch.full((3,), float("nan")), torch.ones(3)
    optimizer.step()
    assert a.isnan().all()
    assert torch.isfinite(b).all()


def test_adan_refuses_a_global_norm_in_release_mode() -> None:
    with pytest.raises(InputError, match=r"max_grad_norm.*release"):
        registry.build("adan", nn.Linear(3, 2), 0.01, max_grad_norm=1.0, release=True)
    registry.build("adan", nn.Linear(3, 2), 0.01, release=True)


def test_adan_wants_three_betas() -> None:
    with pytest.raises(InputError, match=r"betas.*3 numbers"):
        registry.build("adan", nn.Linear(3, 2), 0.01, betas=(0.9, 0.99))
    with pytest.raises(InputError, match=r"betas.*3 numbers"):
        registry.build("adan", [{"params": [nn.Parameter(torch.ones(2))], "betas": (0.9, 0.99)}], 0.01)


# -- diffGrad ----------------------------------------------------------------------------------------------------------


@shapes
@decays
@pytest.mark.parametrize("alias", [False, True])
def test_diffgrad(shape: tuple[int, int], wd: float, alias: bool) -> None:
    own = {"betas": (0.9, 0.99), "eps": 1e-3}
    got = library("diffgrad", numbers("w", shape), weight_decay=wd, reference_alias=alias, **own)
    assert worst(got, reference(twins_moments.diffgrad, shape, wd=wd, alias=alias, **own)) < TIGHT


def test_diffgrad_of_tiny_gradients_is_half_of_adam() -> None:
    """G -> 1e-6 G: sigmoid(d) = 1/2 + d/4, and |d| stays below 8e-6 here: each step is half of Adam's to 4e-6 of it."""
    w, g = numbers("w", (6, 4)), [1e-6 * x for x in gradients((6, 4), STEPS)]
    assert max((x - y).abs().max() for x, y in itertools.pairwise(g)) < 8e-6
    got = [w, *library("diffgrad", w, g, eps=1e-30)]
    adam = [w, *library("adamw", w, g, eps=1e-30, weight_decay=0.0)]
    for t in range(STEPS):
        step, wanted = got[t + 1] - got[t], 0.5 * (adam[t + 1] - adam[t])
        assert ((step - wanted).abs() <= 4e-6 * wanted.abs() + 1e-15).all()


def test_diffgrad_with_the_published_alias_is_adam_at_half_its_rate() -> None:
    w = numbers("w", (6, 4))
    got = library("diffgrad", w, reference_alias=True, eps=1e-30)
    wanted = library("adamw", w, lrs=[x / 2 for x in LRS], eps=1e-30, weight_decay=0.0)
    assert worst(got, wanted) < 1e-14
    alias = registry.build("diffgrad", nn.Linear(4, 3, bias=False), 0.01, reference_alias=True)
    assert alias.state_bytes().total == 8 * 12


# -- GradNormLoRP ------------------------------------------------------------------------------------------------------


@shapes
@decays
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_gradnorm_lorp(shape: tuple[int, int], wd: float, axis: str, form: str) -> None:
    common = {"rank": RANK, "period": PERIOD, "betas": (0.9, 0.99), "eps": 1e-6, "axis": axis, "form": form}
    got = library("gradnorm-lorp", numbers("w", shape), weight_decay=wd, scale=0.25, **common)
    side = twins.published_side(torch.zeros(shape))
    wanted = reference(twins_moments.gradnorm_lorp, shape, wd=wd, alpha=0.25, side=side, **common)
    assert worst(got, wanted) < TIGHT


@pytest.mark.parametrize("axis", ["row", "column"])
def test_long_matrices_in_blocks_equal_one_piece(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows are a matter of speed: sums along columns run over them."""
    from tare.rules import weight_norm

    hyper, w = {"rank": RANK, "period": PERIOD, "axis": axis}, numbers("w", (23, 9))
    whole = library("gradnorm-lorp", w, **hyper)
    monkeypatch.setattr(weight_norm, "_BLOCK", 30)
    assert worst(library("gradnorm-lorp", w, **hyper), whole) < 1e-12


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_identity_basis_is_adam_under_torchs_weight_norm(axis: str, shape: tuple[int, int]) -> None:
    """With P = I and scale 1: torch.optim.Adam on g and v of `parametrizations.weight_norm`, through autograd."""
    from torch.nn.utils.parametrizations import weight_norm

    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    layer.weight.data = numbers("w", shape)
    mine = copy.deepcopy(layer)
    identity = RecordedBasis({0: torch.eye(min(shape), dtype=torch.float64)})
    optimizer = registry.build(
        "gradnorm-lorp", mine, 0.03, rank=min(shape), basis=identity, scale=1.0, axis=axis, eps=1e-30
    )
    theirs = weight_norm(layer, dim=0 if axis == "row" else 1)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.03, eps=1e-30)
    x, y = numbers("x", (9, shape[1])), numbers("y", (9, shape[0]))
    for _ in range(12):
        for net, opt in ((mine, optimizer), (theirs, adam)):
            opt.zero_grad()
            (net(x) - y).square().mean().backward()
            opt.step()
        assert (mine.weight - theirs.weight).abs().max() < 1e-9


def test_the_magnitude_is_kept_or_forgotten() -> None:
    """One step with a gradient along W only: paper keeps the new magnitude, the code starts from |v| again."""
    w = numbers("w", (6, 5))
    for form in ("paper", "code"):
        p = nn.Parameter(w.clone())
        opt = registry.build("gradnorm-lorp", [("w.weight", p)], 0.1, rank=2, form=form, scale=0.0)
        p.grad = w.clone()
        opt.step()
        first = p.detach().norm(dim=1)
        assert (first - (w.norm(dim=1) - 0.1)).abs().max() < 1e-5  # Adam's first step is lr
        opt.param_groups[0]["lr"] = 0.0
        opt.step()
        after = p.detach().norm(dim=1)
        assert (after - (first if form == "paper" else w.norm(dim=1))).abs().max() < 1e-5


def test_zero_rows_learn() -> None:
    """torch's weight_norm turns a zero row into NaN; here it is stepped, and has a magnitude afterwards."""
    p = nn.Parameter(torch.cat([torch.zeros(2, 5), torch.ones(4, 5)]))
    opt = registry.build("gradnorm-lorp", [("w.weight", p)], 0.1, rank=2)
    for t in range(3):
        p.grad = numbers("g", (6, 5), t, torch.float32)
        opt.step()
        norms = p.detach().norm(dim=1)
        assert torch.isfinite(p).all()
        assert (norms > 1e-4).all()
        assert torch.allclose(opt.state[p]["magnitude"].abs(), norms, rtol=1e-5)


def test_a_magnitude_may_change_its_sign() -> None:
    """g is a number, not a length: a row that is pushed through zero comes out on the other side, as under autograd."""
    shape = (3, 4)
    w = numbers("w", shape) * 0.02
    g = [numbers("w", shape) + 0.3 * numbers("g", shape)] * 8
    own = {"rank": 3, "period": 99, "betas": (0.9, 0.99), "eps": 1e-6, "axis": "row", "form": "paper"}
    got = library("gradnorm-lorp", w, g, [0.013] * 8, scale=0.25, **own)
    wanted = twin(twins_moments.gradnorm_lorp, w, g, [0.013] * 8, wd=0.0, alpha=0.25, side="left", **own)
    assert worst(got, wanted) < TIGHT
    assert ((got[-1] * w).sum(1) < 0).any(), "no row was pushed through zero"


def test_no_second_copy_of_the_weight() -> None:
    """State beside GaLore's is four numbers a row."""
    layer = nn.Linear(64, 48, bias=False)
    mine = registry.build("gradnorm-lorp", layer, 0.01, rank=4).state_bytes().total
    assert mine == registry.build("galore", layer, 0.01, rank=4).state_bytes().total + 4 * 4 * 48


@pytest.mark.parametrize("axis", ["row", "column"])
def test_experts_are_stepped_one_by_one(axis: str) -> None:
    """A batch of matrices [E, m, n] steps as each does alone."""
    p = nn.Parameter(numbers("e", (3, 6, 5)))
    alone = [nn.Parameter(p.detach()[k].clone()) for k in range(3)]
    hyper = {"rank": 2, "period": PERIOD, "axis": axis}
    together = registry.build("gradnorm-lorp", [{"params": [("e", p)], "role": "expert"}], 0.01, targets="*", **hyper)
    apart = [registry.build("gradnorm-lorp", [("w", q)], 0.01, **hyper) for q in alone]
    for t in range(6):
        p.grad = numbers("g", (3, 6, 5), t)
        together.step()
        for k, (q, optimizer) in enumerate(zip(alone, apart, strict=True)):
            q.grad = p.grad[k].clone()
            optimizer.step()
    assert worst([*p.detach()], alone) < 1e-9
