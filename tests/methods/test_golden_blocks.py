"""BAdam, and FRUGAL's whole tensors, step as their authors' code did."""

from typing import Any

import golden_cases
import pytest
from torch import Tensor, nn

from tare.core.optimizer import Optimizer
from tare.core.orders import Order, Recorded
from tare.core.recipe import Recipe
from tare.core.transform import Transform
from tare.methods import registry
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.maps import Sign
from tare.rules.rotating import rotating_tensors
from tare.rules.stateless import Stateless


def step_through(case: golden_cases.Case, optimizer: Optimizer, weights: list[nn.Parameter]) -> tuple[float, float]:
    """(largest, largest mean) absolute difference of any tensor at any step. Every tensor is given its gradient."""
    worst = mean = 0.0
    for t in range(case.meta["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = float(case.tensors["lr"][t])
        for i, w in enumerate(weights):
            w.grad = case.tensors[f"G.{i}"][t].clone()
        optimizer.step()
        for i, w in enumerate(weights):
            gap = (w.detach().double() - case.tensors[f"W.{i}"][t].double()).abs()
            worst, mean = max(worst, gap.max().item()), max(mean, gap.mean().item())
    return worst, mean


def start(case: golden_cases.Case) -> list[nn.Parameter]:
    return [nn.Parameter(case.tensors[f"W0.{i}"].clone()) for i in range(len(case.meta["shapes"]))]


def rows(case: golden_cases.Case, columns: Tensor) -> dict[int, tuple[int, ...]]:
    """Recorded selections: update -> the chosen ones of the given columns."""
    steps = case.tensors["active_step"].tolist()
    return {step: tuple(columns[k].nonzero().flatten().tolist()) for k, step in enumerate(steps)}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", golden_cases.names("frugal_block"))
def test_frugal_blocks(name: str, recorded: bool) -> None:
    case = golden_cases.load(name)
    h = case.hyper
    if h["block_order"] == "random" and not recorded:
        pytest.skip("drawn from the global generator")
    betas = tuple(h["betas"])
    rule: Transform = Lion(betas) if h["inner"] == "lion" else Adam(betas, h["eps"])
    order: str | Order = Recorded(rows(case, case.tensors["active"])) if recorded else h["block_order"]
    idle = Stateless(Sign(), h["inactive_lr_scale"])
    blocks = rotating_tensors(rule, idle, h["density"], h["update_gap"], order, h["proj_params_lr_scale"])
    weights = start(case)
    groups = [{"params": [w], "role": "linear" if p else "norm"} for w, p in zip(weights, h["projected"], strict=True)]
    optimizer = Optimizer(groups, Recipe((("linear", blocks), ("*", rule))), 1.0, weight_decay=h["weight_decay"])
    worst, _ = step_through(case, optimizer, weights)
    assert worst <= case.tolerance, f"{name}: {worst:.3g} > {case.tolerance:.3g}"


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", golden_cases.names("badam"))
def test_badam(name: str, recorded: bool) -> None:
    case = golden_cases.load(name)
    h = case.hyper
    if h["switch_mode"] == "random" and not recorded:
        pytest.skip("drawn from the global generator")
    weights = start(case)
    hyper: dict[str, Any] = {
        "period": h["switch_block_every"], "order": h["switch_mode"], "include_embedding": h["include_embedding"],
        "include_lm_head": h["include_lm_head"], "active_modules": h["active_modules"], "betas": tuple(h["betas"]),
        "eps": h["eps"], "weight_decay": h["weight_decay"], "form": "code",
    }  # fmt: skip
    if recorded:
        hyper["order"] = recorded_layers(case)
    optimizer = registry.build("badam", list(zip(h["names"], weights, strict=True)), lr=1.0, **hyper)
    worst, mean = step_through(case, optimizer, weights)
    assert worst <= case.tolerance, f"{name}: {worst:.3g} > {case.tolerance:.3g}"
    if "tolerance_mean_abs" in case.meta:
        assert mean <= case.meta["tolerance_mean_abs"], f"{name}: mean {mean:.3g}"


def recorded_layers(case: golden_cases.Case) -> Recorded:
    """The trace's tensors as blocks: an embedding if it takes turns, and layers by the number in their name."""
    h = case.hyper
    blocks: list[list[int]] = [[0]] if h["include_embedding"] else []
    blocks += [[i for i, n in enumerate(h["names"]) if f"layers.{k}." in n] for k in range(3)]
    active, steps = case.tensors["active"], case.tensors["active_step"].tolist()
    return Recorded({
        step: tuple(b for b, members in enumerate(blocks) if all(active[k][i] for i in members))
        for k, step in enumerate(steps)
    })  # fmt: skip


def test_all_traces_are_here() -> None:
    assert len(golden_cases.names("badam")) == 3
    assert len(golden_cases.names("frugal_block")) == 4
