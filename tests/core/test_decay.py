"""Weight decay in its four places: before, after, proximal, or in the gradient; by chunks, in every write, with every kind of rule."""

import itertools
from typing import Any

import pytest
import torch
from reference.stepping import gradients, numbers, optimizer_for, run, worst
from torch import Tensor

from tare.core import write
from tare.core.recipe import Recipe
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum

LR, WD, SHAPE, STEPS = 0.05, 0.4, (7, 5), 6

LAWS = {
    "before": lambda w, u: (1 - LR * WD) * w - LR * u,
    "after": lambda w, u: (1 - LR * WD) * (w - LR * u),
    "prox": lambda w, u: (w - LR * u) / (1 + LR * WD),
}
decays = pytest.mark.parametrize("decay", LAWS)


@decays
def test_the_laws_with_plain_gradients(decay: str) -> None:
    """Momentum 0: U = G."""
    w, grads = numbers("w", SHAPE), gradients(SHAPE, STEPS)
    opt, p = optimizer_for(Momentum(0.0), w, LR, decay=decay, weight_decay=WD)
    wanted = []
    for g in grads:
        w = LAWS[decay](w, g)
        wanted.append(w)
    assert worst(run(opt, p, grads), wanted) < 1e-14


@decays
def test_the_laws_with_the_fused_kernel(decay: str) -> None:
    """Adam's whole step in one kernel, against the direction of a run without decay: gradients do not depend on W."""
    w, grads = numbers("w", SHAPE), gradients(SHAPE, STEPS)
    plain, p = optimizer_for(Adam(), w, LR)
    path = [w, *run(plain, p, grads)]
    directions = [(a - b) / LR for a, b in itertools.pairwise(path)]
    opt, q = optimizer_for(Adam(), w, LR, decay=decay, weight_decay=WD)
    wanted = []
    for u in directions:
        w = LAWS[decay](w, u)
        wanted.append(w)
    assert worst(run(opt, q, grads), wanted) < 1e-13


@decays
def test_the_laws_with_the_rate_inside_the_direction(decay: str) -> None:
    """Adafactor multiplies by lr itself: decay must not do so again, nor leave out its own factor."""
    rule = Adafactor(None, -0.8, (1e-30, 1e-3), 1.0, scale_parameter=False)
    w, grads = numbers("w", SHAPE), gradients(SHAPE, 3)
    plain, p = optimizer_for(rule, w, LR)
    path = [w, *run(plain, p, grads)]
    opt, q = optimizer_for(rule, w, LR, decay=decay, weight_decay=WD)
    wanted = []
    for a, b in itertools.pairwise(path):
        w = LAWS[decay](w, (a - b) / LR)
        wanted.append(w)
    assert worst(run(opt, q, grads), wanted) < 1e-13


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rule", [Adam(), Momentum(0.9)])
def test_l2_is_torchs(rule: Any, maximize: bool) -> None:
    """Coupled decay: torch.optim.Adam and SGD add wd W to the gradient, after its sign was turned."""
    w, grads = numbers("w", SHAPE), gradients(SHAPE, STEPS)
    mine, p = optimizer_for(rule, w, LR, decay="l2", weight_decay=WD, maximize=maximize)
    q = torch.nn.Parameter(w.clone())
    kind = torch.optim.Adam if isinstance(rule, Adam) else torch.optim.SGD
    own = {} if isinstance(rule, Adam) else {"momentum": 0.9}
    theirs = kind([q], lr=LR, weight_decay=WD, maximize=maximize, **own)
    assert worst(run(mine, p, grads), run(theirs, q, grads)) < 1e-13


def test_l2_in_chunks_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk adds its own part of W, in fp32 whatever the weight's dtype; p.grad stays."""
    shape = (37, 50)
    for dtype in (torch.float32, torch.bfloat16):
        w, g = numbers("w", shape, dtype=dtype), gradients(shape, 3, dtype)
        paths: list[list[Tensor]] = []
        for chunk in (1 << 19, 256):
            monkeypatch.setattr(write, "CHUNK", chunk)
            opt, p = optimizer_for(Momentum(0.9), w, LR, decay="l2", weight_decay=WD)
            paths.append(run(opt, p, g))
            assert torch.equal(p.grad, g[-1])
        for x, y in zip(*paths, strict=True):
            assert torch.equal(x, y)


def test_without_decay_all_are_one() -> None:
    w, grads = numbers("w", SHAPE), gradients(SHAPE, STEPS)
    paths = []
    for decay in (*LAWS, "l2"):
        opt, p = optimizer_for(Adam(), w, LR, decay=decay, weight_decay=0.0)
        paths.append(run(opt, p, grads))
    for path in paths[1:]:
        assert all(torch.equal(x, y) for x, y in zip(path, paths[0], strict=True))


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe\.decay: expected one of before, after, prox, l2, got 'during'"):
        Recipe((("*", Adam()),), decay="during")  # type: ignore[arg-type]
