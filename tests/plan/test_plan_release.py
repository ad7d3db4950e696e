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
    if s.choice(key).storage.weight == "int8":
        tare.quantize_weights_(model)
    optimizer = s.choice(key).build(model)
    if s.clip_mode != "exact":
        optimizer.clip_release(1.0, s.clip_mode, parts=s.clip_parts)
    optimizer.refresh_release(s.bases.source, parts=s.bases.parts)
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


BASES: dict[str, dict[str, Any]] = {
    "sum": {},
    "2 passes": {"refresh_parts": 2},
    "4 passes": {"refresh_parts": 4},
    "first": {"refresh_from": "first"},
}


@pytest.mark.parametrize("bases", BASES.values(), ids=BASES)
@pytest.mark.parametrize("name", ["llama-tiny", "llama-3m"])
@pytest.mark.parametrize(
    ("key", "hyper"),
    [
        ("galore", {"rank": 8}),
        ("galore", {"rank": 8, "period": 40, "stagger": True}),
        ("galore-8bit", {"rank": 32}),
        ("q-galore", {"rank": 8}),
        ("compose", {"rank": 8, "basis": "randomized", "period": 1}),
        ("compose", {"rank": 8, "basis": "gaussian", "side": "left"}),
    ],
    ids=["galore", "staggered", "8 bits", "int8 weights", "at every update", "drawn"],
)
def test_where_bases_come_from(key: str, hyper: dict[str, Any], name: str, bases: dict[str, Any]) -> None:
    plan = tare.plan(name, methods=[key], release=True, accumulate=3, hyper=hyper, **bases, **SMALL)
    measured_peaks(plan, key, 1)
    first, *later = measured_peaks(plan, key)
    row = plan.row(key)
    assert row.peak == pytest.approx(max(first, *later), rel=0.05)
    assert row.events.get("first step", row.events["refresh"]) == pytest.approx(first, rel=0.05)


def test_what_bases_cost() -> None:
    """In a model that is mostly projected, the first step falls towards the ordinary one."""
    rows = {
        what: tare.plan(
            "llama-60m", methods=["galore"], release=True, accumulate=4, hyper={"rank": 8}, **bases, **SMALL
        ).row("galore")
        for what, bases in BASES.items()
    }
    peaks = {what: row.events["refresh"] - ordinary(row) for what, row in rows.items()}
    assert peaks["sum"] > peaks["2 passes"] > peaks["4 passes"] > peaks["first"]
    assert peaks["4 passes"] < 0.4 * peaks["sum"]
    assert peaks["first"] < 0.2 * peaks["sum"]
    assert "twice" in rows["2 passes"].remark
    assert "first micro-batch" in rows["first"].remark
    assert not rows["sum"].remark


@pytest.mark.parametrize("clip_parts", [1, 3])
def test_measuring_in_passes(clip_parts: int) -> None:
    """Two-pass clipping with several micro-batches: each pass holds a share of the whole gradients."""
    settings = {"methods": ["galore"], "release": True, "accumulate": 3, "hyper": {"rank": 8}, "refresh_parts": 3}
    plan = tare.plan("llama-3m", clip_mode="two-pass", clip_parts=clip_parts, **settings, **SMALL)
    measured_peaks(plan, "galore", 1)
    assert plan.row("galore").peak == pytest.approx(max(measured_peaks(plan, "galore")), rel=0.05)
    assert f"1/{clip_parts} of" in plan.row("galore").remark or clip_parts == 1


def test_advice_computes_bases_in_passes() -> None:
    settings = {"methods": ["galore"], "release": True, "accumulate": 4, "hyper": {"rank": 8}, "checkpointing": True}
    peaks = [
        tare.plan("llama-60m", **settings, **bases, **SMALL).row("galore").peak
        for bases in (BASES["sum"], BASES["2 passes"])
    ]
    plan = tare.plan("llama-60m", budget=sum(peaks) // 2, **settings, **SMALL)
    assert plan.advice is not None
    assert plan.advice.fits
    assert plan.advice.flags == "--refresh-parts 2"


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
