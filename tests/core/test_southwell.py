"""Greedy orders: the four rules against brute force on a quadratic, and the choices of an optimizer against the rules."""

import math

import pytest
import torch
from torch import Tensor, nn

from tare.core.blocks import EachLeaf, Rotation
from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.core.orders import Turn
from tare.core.random import make_key, normal
from tare.core.recipe import Recipe
from tare.core.southwell import Greedy, gs, gsd, gsl, gsq
from tare.rules.adam import Adam
from tare.rules.rotating import Rotating
from tare.rules.stateless import Stateless

SIZES = (3, 5, 2, 4)


def quadratic(number: int = 0) -> tuple[Tensor, Tensor, list[slice]]:
    """A, b of f(x) = x^T A x / 2 - b^T x, A positive definite, and the blocks of x."""
    n = sum(SIZES)
    half = normal(make_key(1, "half", number), (n, n)).double()
    stretch = torch.diag(torch.linspace(0.7, 1.4, n, dtype=torch.float64))
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    blocks = [slice(a, a + size) for a, size in zip(starts, SIZES, strict=True)]
    return (
        stretch @ half @ half.T @ stretch + 0.1 * torch.eye(n),
        normal(make_key(1, "b", number), (n,)).double(),
        blocks,
    )


def f(a: Tensor, b: Tensor, x: Tensor) -> float:
    return float(x @ a @ x / 2 - b @ x)


@pytest.mark.parametrize("number", range(6))
def test_gsq_chooses_the_block_of_maximal_decrease(number: int) -> None:
    a, b, blocks = quadratic(number)
    x = normal(make_key(2, "x", number), (len(b),)).double()
    g = a @ x - b
    decrease = []
    for block in blocks:  # the exact minimum over the block, the rest as it is
        best = x.clone()
        best[block] -= torch.linalg.solve(a[block, block], g[block])
        decrease.append(f(a, b, x) - f(a, b, best))
    scores = [gsq(g[block], a[block, block]) for block in blocks]
    assert scores == pytest.approx([2 * d for d in decrease], rel=1e-9)
    assert max(range(4), key=scores.__getitem__) == max(range(4), key=decrease.__getitem__)


@pytest.mark.parametrize("number", range(3))
def test_gsl_promises_what_a_step_of_one_over_l_keeps(number: int) -> None:
    a, b, blocks = quadratic(number)
    x = normal(make_key(2, "x", number), (len(b),)).double()
    g = a @ x - b
    for block in blocks:
        lipschitz = float(torch.linalg.eigvalsh(a[block, block])[-1])
        step = x.clone()
        step[block] -= g[block] / lipschitz
        assert f(a, b, x) - f(a, b, step) >= 0.5 * gsl(g[block], lipschitz) * (1 - 1e-9)


def test_rules_meet_in_their_limits() -> None:
    _, b, blocks = quadratic()
    g = -b
    for block in blocks:
        part, n = g[block], len(g[block])
        for norm in (1, 2):
            assert gsl(part, 1.0, norm) == pytest.approx(gs(part, norm))
            assert gsd(part, torch.full((n,), 2.5, dtype=torch.float64), norm) == pytest.approx(gsl(part, 2.5, norm))
        assert gsq(part, 2.5 * torch.eye(n, dtype=torch.float64)) == pytest.approx(gsl(part, 2.5))
        diagonal = torch.linspace(1.0, 2.0, n, dtype=torch.float64)
        assert gsq(part, torch.diag(diagonal)) == pytest.approx(gsd(part, diagonal))
    order = [gs(g[block]) for block in blocks]
    equal = [gsl(g[block], 3.0) for block in blocks]
    assert sorted(range(4), key=order.__getitem__) == sorted(range(4), key=equal.__getitem__)
    assert gs(torch.tensor([3.0, -4.0]), norm=1) == 7.0
    assert gsl(torch.tensor([3.0, -4.0]), 4.0, norm=1) == 3.5


def turns_on_the_quadratic(greedy: Greedy, steps: int = 30) -> list[tuple[str, list[Tensor]]]:
    """(block that is on after each update, gradients of that update) of Adam on one block at a time."""
    a, b, blocks = quadratic()
    parts = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in SIZES]
    names = [f"b{i}" for i in range(4)]
    rule = Rotating(Adam(), Stateless(None, 0.0), Rotation(EachLeaf(), greedy, period=1))
    optimizer = Optimizer(list(zip(names, parts, strict=True)), Recipe((("*", rule),)), 0.3)
    seen = []
    for _ in range(steps):
        g = a @ torch.cat([p.detach() for p in parts]) - b
        for p, block in zip(parts, blocks, strict=True):
            p.grad = g[block].clone()
        optimizer.step()
        assert optimizer._turns is not None
        (on,) = optimizer._turns.wheels[0].on
        seen.append((on, [g[block] for block in blocks]))
    return seen


@pytest.mark.parametrize("norm", [1, 2])
def test_an_optimizer_chooses_as_the_rules_say(norm: int) -> None:
    a, _, blocks = quadratic()
    bounds = [float(torch.linalg.eigvalsh(a[block, block])[-1]) for block in blocks]
    curvature = {f"b{i}": bound for i, bound in enumerate(bounds)}
    for rule in ("gs", "gsl"):
        greedy = Greedy(rule, norm, epsilon=0.0, beta=0.0, curvature=curvature if rule == "gsl" else {})  # type: ignore[arg-type]
        chosen = set()
        for on, g in turns_on_the_quadratic(greedy):
            scores = [gs(p, norm) if rule == "gs" else gsl(p, bound, norm) for p, bound in zip(g, bounds, strict=True)]
            assert on == f"b{scores.index(max(scores))}"
            chosen.add(on)
        assert len(chosen) > 1, "one block only: nothing was compared"


def test_equal_curvature_chooses_as_gauss_southwell() -> None:
    equal = Greedy("gsl", epsilon=0.0, beta=0.0, curvature={f"b{i}": 7.0 for i in range(4)})
    plain = Greedy("gs", epsilon=0.0, beta=0.0)
    assert [on for on, _ in turns_on_the_quadratic(equal)] == [on for on, _ in turns_on_the_quadratic(plain)]


def test_estimated_curvature_is_the_root_of_the_second_moment() -> None:
    """score = sum g^2 / (sum g^4)^(1/4): n^(3/4) s for n equal entries of size s."""
    greedy = Greedy(beta=0.0)
    state = {name: torch.tensor(spec.init) for name, spec in greedy.spec().items()}
    assert greedy.score("b", [state]) is None
    greedy.observe(torch.full((3, 27), -2.0), state)
    assert greedy.score("b", [state]) == pytest.approx(81**0.75 * 2.0, rel=1e-6)
    greedy.observe(torch.full((3, 27), math.nan), state)
    assert greedy.score("b", [state]) == pytest.approx(81**0.75 * 2.0, rel=1e-6), "a NaN was taken note of"


def test_unknown_blocks_come_first_and_epsilon_starves_nobody() -> None:
    names = tuple(f"layer {i}" for i in range(6))
    known = Turn(names, 1, scores=(3.0, None, 5.0, 1.0, 2.0, 0.0))
    assert Greedy(epsilon=0.0).select(known) == [1]
    best = [Greedy(epsilon=0.0).select(Turn(names, 2, n, scores=(3.0, 4.0, 5.0, 1.0, 2.0, 0.0))) for n in range(5)]
    assert best == [[2, 1]] * 5
    scores = (9.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    drawn = [Greedy(epsilon=0.5).select(Turn(names, 1, n, scores=scores))[0] for n in range(200)]
    assert set(drawn) == set(range(6))
    assert 80 <= drawn.count(0) <= 150  # 0.5 + 0.5 / 6 of 200 = 117, three standard deviations of 7 and some


@pytest.mark.parametrize(
    "bad", [{"rule": "gss"}, {"norm": 3}, {"epsilon": -0.1}, {"beta": 1.0}, {"curvature": {"a": 0.0}}]
)
def test_bad_values_are_refused(bad: dict) -> None:
    with pytest.raises(InputError):
        Greedy(**bad)
