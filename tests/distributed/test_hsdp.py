"""HSDP with both sides above one: four processes, weights cut in two, twice. Steps, checkpoints, runs and plans of one process."""

from pathlib import Path
from typing import Any

import pytest
import work_checkpoint
import work_forward
from ranks import Ranks
from test_checkpoint_sharded import furthest, train
from test_plan_measured import planned
from test_train_runs import OPTIONS, far, losses
from test_train_steps import GALORE, SCALED
from train_runs import config

from tare.methods import registry
from tare.train import checkpoint, integrity, loop

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adamw", SCALED, {"clip": 0.01, "accumulate": 2}),
    ("adamw", SCALED, {"tied": True, "accumulate": 2, "sync": "step"}),
    ("adamw", {}, {"release": True, "clip": 0.05}),
    ("galore", GALORE, {"tied": True}),
    ("apollo-mini", {}, {"accumulate": 2}),
    ("muon", {}, {}),
    ("adamw-8bit", {"storage": {"min_quantized": 0}}, {}),
]


def test_every_method_trains_like_one_process(ranks4: Ranks) -> None:
    for gaps in ranks4.run("work_shard", "fully_sharded", keys=registry.keys("gradient"), shards=2):
        assert all(gap <= 1e-10 for gap in gaps.values()), gaps


@pytest.mark.parametrize(("method", "options", "changes"), CASES)
def test_steps_are_those_of_one_process(
    ranks4: Ranks, method: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    found = ranks4.run("work_train", "beside", parallel="hsdp", method=method, options=options, shards=2, **changes)
    for each in found:
        assert max(each["weight"], each["loss"], each["norm"]) < 1e-12
        assert each["moved"] > 1e-6
    assert [each["rows"] for each in found] == [16, 15, 16, 15]


def test_copies_that_drift_apart_are_named(ranks4: Ranks) -> None:
    assert ranks4.run("work_train", "apart_in_pieces") == [(None, (3, "layers.1.down_proj.bias"))] * 4


def test_what_a_step_sends_is_the_formula(ranks4: Ranks) -> None:
    for accumulate in (1, 2):
        for each in ranks4.run("work_train", "traffic", parallel="hsdp", accumulate=accumulate, shards=2):
            assert each["counted"] == each["formula"]
            assert each["counted"].keys() == {"gathered", "scattered", "reduced"}


def test_forward_only_steps_are_those_of_one_process(ranks4: Ranks) -> None:
    own = {"lr": 1e-2, "rule": "adam"}
    wanted = work_forward.alone(4, "mezo", own)
    for one in ranks4.run("work_forward", "together", key="mezo", form=own, wrap="hsdp2"):
        assert one["losses"] == pytest.approx(wanted["losses"], rel=1e-12)
        for name, weights in wanted["weights"].items():
            assert one["weights"][name] == pytest.approx(weights, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("method", ["torch", "adamw:block=5", "galore:rank=2,period=3"])
def test_checkpoints_go_from_any_kind_of_run_to_any(method: str, ranks2: Ranks, ranks4: Ranks, tmp_path: Path) -> None:
    """Saved once although two hold each piece; resumed bit for bit by the same four, and to the last digits by others."""
    folder = str(tmp_path / "c")
    alone = work_checkpoint.train(0, 1, how="plain", method=method, last=6)
    on = {"method": method, "folder": folder, "save": True}
    train(ranks4, how="hsdp2", last=2, **on)
    ((_, place),) = checkpoint.found(tmp_path / "c")
    assert integrity.verify(place)["format"] == integrity.SHARDED
    assert len(list(place.glob("weights-*.safetensors"))) <= 4
    whole = train(ranks4, how="hsdp2", method=method, last=4)
    assert train(ranks4, how="hsdp2", method=method, folder=folder, first=2, last=4) == whole
    train(ranks2, how="fsdp", first=2, last=3, **on)
    train(ranks4, how="hsdp2", first=3, last=4, **on)
    train(None, how="plain", first=4, last=5, **on)
    assert furthest(train(ranks4, how="hsdp2", first=5, last=6, **on), alone) < 1e-12


def test_a_run_of_four_is_the_run_of_one_and_goes_on_as_another(ranks2: Ranks, ranks4: Ranks, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "run"
    loop.train(config(alone, "galore", rank=8, **OPTIONS))
    on = {"parallel": "hsdp", "shards": 2, **OPTIONS}
    stopped = ranks4.run(
        "work_train", "trained", job=config(out, "galore", rank=8, **on), out=str(out), stop_at=2, stops=3
    )
    assert [(each["interrupted"], each["steps"]) for each in stopped] == [(True, 2)] * 4
    assert any("4 processes by HSDP" in text for text in stopped[0]["heard"])
    assert [each["heard"] for each in stopped[1:]] == [[]] * 3
    more = config(out, "galore", rank=8, resume=True, parallel="fsdp", **OPTIONS)
    assert [each["steps"] for each in ranks2.run("work_train", "trained", job=more, out=str(out))] == [5, 5]
    assert far(out, alone) < 1e-5
    assert losses(out) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.parametrize("key", ["adamw", "galore", "muon"])
def test_what_is_planned_is_what_each_holds(ranks4: Ranks, key: str) -> None:
    hyper = {"rank": 16} if "rank" in registry.options(key) else {}
    real = ranks4.run(
        "work_plan_ranks", "measured", name="uneven", key=key, parallel="hsdp", batch=8, seq=64, hyper=hyper, shards=2
    )
    row = planned("uneven", key, "hsdp", gpus=4, shards=2, hyper=hyper).row(key)
    assert row.ranks.first.state == real[0]["state"]
    assert max(each["peak"] for each in real) == pytest.approx(row.peak, rel=0.05)
