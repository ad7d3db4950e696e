"""Release with micro-batches and clipping in the plan: what is kept between micro-batches, predicted and measured."""

from typing import Any

import pytest
import torch

import tare
from tare.plan.activations import autocast, causal_loss
from tare.plan.measure import StepMeter
from tare.plan.models import build_model
from tare.plan.rows import PlanRow

SMALL = {"batch": 2, "seq": 64}  # small activations, so that gradients decide


def measured_peaks(plan: Any, key: str, steps: int = 3) -> list[int]:
    """The peak of each of the first steps; the first one computes the bases."""
    s = plan.settings
    model = build_model(s.name, dtype=s.dtype).train()
    optimizer = s.choice(key).build(model)
    if s.clip_mode != "exact":
        optimizer.clip_release(1.0, s.clip_mode)
    tokens = torch.randint(0, 1000, (s.batch, s.seq), generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        with autocast(s.precision):
            return causal_loss(model, tokens)

    peaks = []
    for _ in range(steps):
        with StepMeter(model, optimizer, extra=[tokens]) as meter:
            optimizer.backward(*[loss] * s.accumulate)
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(meter.peak)
    return peaks


def ordinary(row: PlanRow) -> int:
    """The predicted peak of a step without a refresh."""
    return max(row.events[event] for event in ("end of forward", "backward", "optimizer step"))


@pytest.mark.parametrize("name", ["llama-tiny", "llama-3m"])
@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize(
    ("key", "hyper"),
    [
        ("galore", {"rank": 8}),
        ("galore-adafactor", {"rank": 8}),
        ("galore-8bit", {"rank": 8}),
        ("adamw", {}),
        ("lion", {}),
    ],
)
def test_micro_batches(name: str, accumulate: int, key: str, hyper: dict[str, Any]) -> None:
    plan = tare.plan(name, methods=[key], release=True, accumulate=accumulate, hyper=hyper, **SMALL)
    measured_peaks(plan, key, 1)  # tables and probes that are made once
    first, *later = measured_peaks(plan, key)
    row = plan.row(key)
    assert row.peak == pytest.approx(max(first, *later), rel=0.05)
    assert ordinary(row) == pytest.approx(max(later), rel=0.05)


def test_gradients_between_micro_batches_are_small_but_at_a_refresh() -> None:
    plan = tare.plan("llama-3m", methods=["galore"], release=True, accumulate=4, hyper={"rank": 8}, **SMALL)
    row = plan.row("galore")
    assert row.event == "refresh"
    assert ordinary(row) < row.events["refresh"] - row.weights // 4
    spread = tare.plan(
        "llama-3m", methods=["galore"], release=True, accumulate=4, hyper={"rank": 8, "stagger": True}, **SMALL
    ).row("galore")
    assert spread.event == "first step"  # which computes every basis, staggered or not
    assert spread.events["first step"] == row.events["refresh"]
    assert ordinary(row) <= spread.events["refresh"] < row.events["refresh"]


def test_staggered_refresh_keeps_one_whole_gradient() -> None:
    hyper = {"rank": 8, "stagger": True, "period": 40}
    plan = tare.plan("llama-tiny", methods=["galore"], release=True, accumulate=2, hyper=hyper, **SMALL)
    measured_peaks(plan, "galore", 1)
    first, *later = measured_peaks(plan, "galore", 41)
    row = plan.row("galore")
    assert row.events["first step"] == pytest.approx(first, rel=0.05)
    assert row.events["refresh"] == pytest.approx(max(later), rel=0.05)


@pytest.mark.parametrize(
    ("key", "accumulate"), [("galore", 1), ("galore", 3), ("apollo-mini", 1), ("adamw", 1), ("adamw", 2)]
)
def test_two_passes(key: str, accumulate: int) -> None:
    hyper = {"rank": 8} if key == "galore" else {}
    settings = {"methods": [key], "release": True, "accumulate": accumulate, "hyper": hyper}
    plan = tare.plan("llama-3m", clip_mode="two-pass", **settings, **SMALL)
    measured_peaks(plan, key, 1)
    row = plan.row(key)
    assert row.peak == pytest.approx(max(measured_peaks(plan, key)), rel=0.05)
    assert "twice" in row.remark
    if accumulate == 1:  # costs time and no memory
        assert row.peak == tare.plan("llama-3m", **settings, **SMALL).row(key).peak


def test_what_cannot_be_had_is_said() -> None:
    settings = {"release": True, "accumulate": 2, "budget": "1GiB"}
    plan = tare.plan("llama-tiny", methods=["galore", "adamw", "apollo"], clip_mode="previous", **settings, **SMALL)
    assert "--clip-mode previous" in plan.row("galore").note
    assert "needs whole gradients" in plan.row("apollo").note
    assert [plan.row(key).fits for key in ("galore", "adamw", "apollo")] == [False, True, False]
