"""GaLore, its Adafactor variant, Fira and APOLLO against slow float64 twins: tall, wide, square, uneven, over refreshes."""

from typing import Any

import pytest
import torch
from reference import twins
from reference.stepping import SHAPES, gradients, numbers, run, twin, worst
from torch import nn

from tare.methods import registry
from tare.testing import RecordedBasis

STEPS, PERIOD, RANK = 11, 4, 3
LRS = [0.01 * (1 + t % 4) for t in range(STEPS)]
TIGHT = 1e-10  # float64; SVDs and ratios of norms magnify 1e-16 by at most 1e4 here

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
decays = pytest.mark.parametrize("wd", [0.0, 0.1])


def library(key: str, shape: tuple[int, int], **hyper: Any) -> list[torch.Tensor]:
    p = nn.Parameter(numbers("w", shape))
    optimizer = registry.build(key, [{"params": [("w", p)], "role": "linear"}], LRS[0], **hyper)
    return run(optimizer, p, gradients(shape, STEPS), LRS)


def reference(step: Any, shape: tuple[int, int], **own: Any) -> list[torch.Tensor]:
    return twin(step, numbers("w", shape), gradients(shape, STEPS), LRS, **own)


def side_of(shape: tuple[int, int], side: str = "std") -> str:
    return side if side in ("left", "right") else twins.published_side(torch.zeros(shape), side)


@shapes
@decays
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_galore(shape: tuple[int, int], wd: float, side: str) -> None:
    got = library("galore", shape, rank=RANK, period=PERIOD, scale=0.25, side=side, weight_decay=wd, betas=(0.9, 0.99))
    own = {
        "rank": RANK,
        "period": PERIOD,
        "alpha": 0.25,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "wd": wd,
        "side": side_of(shape, side),
    }
    assert worst(got, reference(twins.galore, shape, **own)) < TIGHT


@shapes
def test_galore_on_both_sides(shape: tuple[int, int]) -> None:
    got = library("galore", shape, rank=RANK, period=PERIOD, scale=0.5, side="full", weight_decay=0.1)
    own = {"rank": RANK, "period": PERIOD, "alpha": 0.5, "betas": (0.9, 0.999), "eps": 1e-6, "wd": 0.1}
    assert worst(got, reference(twins.galore_both, shape, **own)) < TIGHT


@shapes
def test_the_gram_basis_is_the_svd_basis(shape: tuple[int, int]) -> None:
    """Up to the signs of columns, which cancel within a period."""
    paths = [library("galore", shape, rank=RANK, period=STEPS, basis=basis) for basis in ("svd", "gram")]
    assert worst(*paths) < 1e-9


@shapes
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_galore_adafactor(shape: tuple[int, int], beta1: float | None) -> None:
    got = library("galore-adafactor", shape, rank=RANK, period=PERIOD, scale=0.25, beta1=beta1, weight_decay=0.1)
    own = {"rank": RANK, "period": PERIOD, "alpha": 0.25, "wd": 0.1, "side": side_of(shape)}
    rule = {"beta1": beta1, "decay_rate": -0.8, "eps": 1e-30, "clip": 1.0}
    assert worst(got, reference(twins.galore_adafactor, shape, **own, **rule)) < TIGHT


@shapes
@decays
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("gamma", [1.01, None])
def test_fira(shape: tuple[int, int], wd: float, form: str, gamma: float | None) -> None:
    got = library("fira", shape, rank=RANK, period=PERIOD, scale=0.25, form=form, gamma=gamma, weight_decay=wd)
    own = {
        "rank": RANK,
        "period": PERIOD,
        "alpha": 0.25,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "wd": wd,
        "side": side_of(shape),
    }
    assert worst(got, reference(twins.fira, shape, **own, form=form, gamma=gamma)) < TIGHT


def test_the_two_forms_of_fira_differ() -> None:
    """As the card says, by more than rounding; else the switch would test nothing."""
    code, paper = (library("fira", (12, 5), rank=RANK, period=PERIOD, scale=0.25, form=f) for f in ("code", "paper"))
    assert worst(code, paper) > 1e-3


@shapes
@decays
@pytest.mark.parametrize("lift", ["channel", "tensor"])
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("gamma", [1.01, None])
def test_apollo(shape: tuple[int, int], wd: float, lift: str, front: bool, gamma: float | None) -> None:
    rank = RANK if lift == "channel" else 1
    short = min(shape)
    bases = {k: numbers("P", (short, rank), k) / rank**0.5 for k in range(0, STEPS, PERIOD)}
    common = {"period": PERIOD, "scale": 9.0, "scale_front": front, "gamma": gamma, "lift": lift}
    key = "apollo" if lift == "channel" else "apollo-mini"
    got = library(key, shape, rank=rank, basis=RecordedBasis(bases), weight_decay=wd, **common)
    own = {"rank": rank, "betas": (0.9, 0.999), "eps": 1e-6, "wd": wd, "side": side_of(shape), "recorded": bases}
    assert worst(got, reference(twins.apollo, shape, **common, **own)) < TIGHT


@shapes
def test_apollo_with_an_svd_basis(shape: tuple[int, int]) -> None:
    got = library("apollo", shape, rank=RANK, period=PERIOD, basis="svd")
    own = {
        "rank": RANK,
        "period": PERIOD,
        "scale": 1.0,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "wd": 0.0,
        "side": side_of(shape),
    }
    wanted = reference(twins.apollo, shape, **own, lift="channel", scale_front=False, gamma=1.01, recorded=None)
    assert worst(got, wanted) < TIGHT


@pytest.mark.parametrize("key", ["fira", "apollo", "apollo-mini"])
def test_the_limiter_after_a_zero_gradient(key: str) -> None:
    """`legacy` restarts the norm from 1e-8, `skip` keeps it; both as their twins say, and far apart."""
    shape, quiet = (12, 5), 5
    grads = gradients(shape, STEPS)
    grads[quiet] = torch.zeros_like(grads[quiet])
    moves = {}
    for zero in ("skip", "legacy"):
        p = nn.Parameter(numbers("w", shape))
        rank = 1 if key == "apollo-mini" else RANK
        bases = {0: numbers("P", (5, rank))}
        common = {"rank": rank, "period": 99, "scale": 0.25, "weight_decay": 0.0}
        opt = registry.build(
            key,
            [{"params": [("w", p)], "role": "linear"}],
            0.01,
            limiter_zero=zero,
            basis=RecordedBasis(bases),
            **common,
        )
        got = run(opt, p, grads, [0.01] * STEPS)
        own = {
            "rank": rank,
            "period": 99,
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "wd": 0.0,
            "side": "right",
            "gamma": 1.01,
            "zero": zero,
        }
        if key == "fira":
            step, extra = twins.fira, {"alpha": 0.25, "form": "code"}
        else:
            lift = "tensor" if key == "apollo-mini" else "channel"
            step, extra = twins.apollo, {"scale": 0.25, "lift": lift, "scale_front": False}
        wanted = twin(step, numbers("w", shape), grads, [0.01] * STEPS, **own, **extra, recorded=bases)
        assert worst(got, wanted) < TIGHT, zero
        moves[zero] = (got[quiet + 1] - got[quiet]).norm().item()
    assert moves["legacy"] < (1e-6 if key != "fira" else 0.99 * moves["skip"])
    assert moves["skip"] > 1e-3
