"""Rotating blocks against slow float64 twins to 1e-10, and the limiting cases of FRUGAL and BAdam."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import twins_blocks
from reference.stepping import numbers, worst
from torch import Tensor, nn

from tare.core.blocks import Layers, Rotation
from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.core.orders import Ascending, Descending, Recorded
from tare.core.recipe import Recipe
from tare.core.storage import MASTER, Storage
from tare.methods import registry
from tare.rules.adam import Adam
from tare.rules.maps import Sign
from tare.rules.momentum import Momentum
from tare.rules.rotating import Rotating, make_order, rotating_tensors
from tare.rules.stateless import Stateless

NAMES = (
    "embed.weight",
    "layers.0.a.weight",
    "layers.0.a.bias",
    "layers.1.a.weight",
    "layers.2.a.weight",
    "norm.weight",
)
SHAPES = ((7, 4), (6, 5), (6,), (5, 9), (4, 4), (6,))
LAYER = {0: (1, 2), 1: (3,), 2: (4,)}
LR, STEPS = 0.02, 14


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(f"w{i}", shape, 0, dtype)) for i, shape in enumerate(SHAPES)]


def gradients(t: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [numbers(f"g{i}", shape, t, dtype) for i, shape in enumerate(SHAPES)]


def path(optimizer: Optimizer, weights: Sequence[nn.Parameter], steps: int = STEPS) -> list[Tensor]:
    """All weights after every step, flat."""
    out = []
    for t in range(steps):
        for p, g in zip(weights, gradients(t), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
        out.append(torch.cat([p.detach().double().flatten() for p in weights]))
    return out


def twin_path(twin: twins_blocks.Blocks, steps: int = STEPS) -> list[Tensor]:
    return [torch.cat([w.flatten() for w in twin.step(gradients(t), LR)]) for t in range(steps)]


def named(weights: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(NAMES, weights, strict=True))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("density", "count"), [(0.5, 3), (0.3, 2), (1.0, 6), (0.0, 0)])
def test_frugal_tensors_against_the_twin(density: float, count: int, scale: float) -> None:
    weights = start()
    rule = rotating_tensors(Adam(), Stateless(Sign(), 0.1), density, 4, "ascending", scale)
    optimizer = Optimizer(named(weights), Recipe((("*", rule),)), LR, weight_decay=0.1)
    twin = twins_blocks.Blocks(
        [p.detach().clone() for p in weights], lambda t: [(t // 4 * count + i) % 6 for i in range(count)],
        lambda t: t % 4 == 0, 0.1, decay=0.1, scale=scale,
    )  # fmt: skip
    assert worst(path(optimizer, weights), twin_path(twin)) < 1e-10


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_badam_against_the_twin(form: str, order: str) -> None:
    weights = start()
    optimizer = registry.build(
        "badam", named(weights), LR, period=4, order=order, active_modules=["norm"], weight_decay=0.1, form=form
    )

    def turn(t: int) -> int:
        return t // 4 if form == "paper" else (t + 1) // 4

    def chosen(t: int) -> tuple[int, ...]:
        return LAYER[turn(t) % 3 if order == "ascending" else -(turn(t) + 1) % 3]

    twin = twins_blocks.Blocks(
        [p.detach().clone() for p in weights], chosen, lambda t: t == 0 or turn(t) != turn(t - 1), None, [5],
        form == "paper", decay=0.1,
    )  # fmt: skip
    assert worst(path(optimizer, weights), twin_path(twin)) < 1e-10


def adamw(weights: Sequence[nn.Parameter], **own: Any) -> Optimizer:
    return Optimizer(named(weights), Recipe((("*", Adam()),)), LR, **own)


def test_all_tensors_and_no_refresh_are_adamw() -> None:
    a, b = start(), start()
    everything = rotating_tensors(Adam(), Stateless(Sign()), 1.0, 10**6)
    one = Optimizer(named(a), Recipe((("*", everything),)), LR, weight_decay=0.1)
    assert worst(path(one, a), path(adamw(b, weight_decay=0.1), b)) == 0.0


def test_no_tensors_are_sign_sgd() -> None:
    a, b = start(), start()
    nothing = Optimizer(named(a), Recipe((("*", rotating_tensors(Adam(), Stateless(Sign()), 0.0, 3)),)), LR)
    sign = Optimizer(named(b), Recipe((("*", Stateless(Sign())),)), LR)
    assert worst(path(nothing, a), path(sign, b)) == 0.0
    assert nothing.state_bytes().total == 0


def test_all_tensors_restart_adam_at_every_turn() -> None:
    a, b = start(), start()
    everything = Optimizer(named(a), Recipe((("*", rotating_tensors(Adam(), None, 1.0, 5)),)), LR)
    restarted = []
    for first in range(0, 10, 5):
        fresh = adamw(b)
        for t in range(first, first + 5):
            for p, g in zip(b, gradients(t), strict=True):
                p.grad = g
            fresh.step()
            restarted.append(torch.cat([p.detach().flatten() for p in b]))
    assert worst(path(everything, a, 10), restarted) == 0.0


def test_badam_with_everything_always_on_is_adamw() -> None:
    a, b = start(), start()
    one = registry.build("badam", named(a), LR, period=3, active_modules=["*"])
    assert worst(path(one, a), path(adamw(b), b)) == 0.0


def test_other_rules_take_turns() -> None:
    """Momentum starts from the first gradient of its turn: the count begins anew with it."""
    weights = start()
    rule = rotating_tensors(Momentum(0.9, dampening=0.5), None, 0.5, 2, Recorded({0: (1, 3, 4)}))
    optimizer = Optimizer(named(weights), Recipe((("*", rule),)), LR)
    before = weights[1].detach().clone()
    path(optimizer, weights, 4)
    g = [gradients(t)[1] for t in range(4)]
    moved = sum(2 * [g[0], 0.9 * g[0] + 0.5 * g[1], g[2], 0.9 * g[2] + 0.5 * g[3]][t] for t in range(4)) / 2
    assert (before - LR * moved - weights[1].detach()).abs().max() < 1e-12


def test_only_the_layer_that_is_on_has_gradients_state_and_master() -> None:
    weights = start(torch.bfloat16)
    optimizer = registry.build("badam", named(weights), LR, period=2, order="ascending")
    for layer in (0, 1, 2, 0):
        on = [i for i, p in enumerate(weights) if p.requires_grad]
        assert tuple(on) == LAYER[layer]
        held = [i for i, p in enumerate(weights) if "exp_avg" in optimizer.state[p]]
        assert tuple(held) == LAYER[layer]
        assert all(optimizer.state[weights[i]][MASTER].dtype == torch.float32 for i in held)
        path(optimizer, weights, 2)
    largest = max(sum(weights[i].numel() for i in members) for members in LAYER.values())
    assert optimizer.state_bytes().total == (8 + 4) * largest
    optimizer.close()
    assert all(p.requires_grad for p in weights)


def test_a_master_adds_up_small_steps_and_follows_changes_from_outside() -> None:
    weight, exact = nn.Parameter(torch.ones(300, 7, dtype=torch.bfloat16)), nn.Parameter(torch.ones(300, 7))
    one = Optimizer([("w", weight)], Recipe((("*", Adam()),)), 1e-4, weight_decay=0.1, storage=Storage(weight="master"))
    two = Optimizer([("w", exact)], Recipe((("*", Adam()),)), 1e-4, weight_decay=0.1)
    for t in range(30):
        weight.grad = numbers("g", (300, 7), t, torch.bfloat16)
        exact.grad = weight.grad.float()
        one.step()
        two.step()
        if t == 20:
            with torch.no_grad():
                weight[0] = exact[0] = 0.5
    assert (one.state[weight][MASTER] - exact.detach()).abs().max() < 1e-6
    assert torch.equal(weight.detach(), one.state[weight][MASTER].to(torch.bfloat16))
    assert float(exact[0].detach().mean()) < 0.6, "the change from outside was overwritten"


def test_what_cannot_be_is_refused() -> None:
    weights = start()
    for hyper, word in (
        ({"active_modules": ["nrm"]}, "nrm"), ({"order": "radnom"}, "random"), ({"form": "cod"}, "code"), ({"period": 0}, "period"),
        ({"order": Recorded({0: (9,)})}, "blocks"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            registry.build("badam", named(weights), LR, **hyper)
    with pytest.raises(InputError, match="include_embedding"):
        registry.build("badam", nn.Embedding(3, 4), LR)
    assert all(p.requires_grad for p in weights)


def test_two_rotations_keep_their_own_time() -> None:
    weights = start()
    recipe = Recipe((
        ("layers.*", Rotating(Adam(), None, Rotation(Layers(), Ascending(), 2))),
        ("*", Rotating(Adam(), Stateless(Sign()), Rotation(Layers(True, True), Descending(), 3))),
    ))  # fmt: skip
    optimizer = Optimizer(named(weights), recipe, LR)
    seen = []
    for _ in range(6):
        assert optimizer._turns is not None
        seen.append([wheel.on for wheel in optimizer._turns.wheels])
        path(optimizer, weights, 1)
    others, layers = ([on[i][0] for on in seen] for i in (0, 1))
    assert layers == [f"layers.{n}" for n in (0, 0, 1, 1, 2, 2)]
    assert others == ["norm"] * 3 + ["embedding"] * 3
    assert make_order("ascending") == Ascending()
