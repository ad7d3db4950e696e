"""Whole runs by several processes: the run of one; stopped, resumed by another number or another way; refused in one line."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent.parent / "train"))
import task_models
from train_runs import config

from tare.train import checkpoint, loop, metrics
from tare.train.adapters import AdapterConfig
from tare.train.config import RunConfig

OPTIONS: dict[str, Any] = {"steps": 5, "batch": 4, "lr": 1e-3, "checkpoint_every": 3, "eval_every": 5}


def far(a: Path, b: Path) -> float:
    """The largest difference of two saved models, which have the same names."""
    one, other = (load_file(place / "model" / "model.safetensors") for place in (a, b))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(out / "metrics.jsonl") if line["event"] in ("step", "eval")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    loop.train(config(out, "galore", rank=8, **OPTIONS))
    return out


def job(out: Path, **changes: Any) -> RunConfig:
    return config(out, "galore", rank=8, **{**OPTIONS, **changes})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_is_the_run_of_one(ranks2: Ranks, alone: Path, tmp_path: Path, parallel: str) -> None:
    out = tmp_path / "run"
    found = ranks2.run("work_train", "trained", job=job(out, parallel=parallel), out=str(out))
    assert [each["steps"] for each in found] == [5, 5], found
    assert far(out, alone) < 1e-5
    assert losses(out) == pytest.approx(losses(alone), abs=1e-5)
    assert found[1]["heard"] == []
    assert any(f"2 processes by {'DDP' if parallel == 'ddp' else 'FSDP2'}" in text for text in found[0]["heard"])
    assert found[0]["measured"] == found[1]["measured"]


def test_stopped_on_one_rank_and_resumed_by_one_process(ranks2: Ranks, alone: Path, tmp_path: Path) -> None:
    """FSDP on two, a signal on rank 1 alone: both stop behind the same step, and one process goes on."""
    out = tmp_path / "run"
    first = ranks2.run("work_train", "trained", job=job(out, parallel="fsdp"), out=str(out), stop_at=2, stops=1)
    assert [(each["interrupted"], each["steps"]) for each in first] == [(True, 2)] * 2
    done = loop.train(job(out, resume=True))
    assert (done.steps, done.interrupted) == (5, False)
    assert far(out, alone) < 1e-5


def test_started_by_one_and_resumed_by_two(ranks2: Ranks, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    part = job(out, steps=3, schedule="constant")
    loop.train(part)
    whole = tmp_path / "whole"
    loop.train(replace(part, train=replace(part.train, steps=6), run=replace(part.run, out=str(whole))))
    for parallel, steps in (("ddp", 4), ("fsdp", 6)):
        more = job(out, steps=steps, schedule="constant", parallel=parallel, resume=True)
        found = ranks2.run("work_train", "trained", job=more, out=str(out))
        assert [each["steps"] for each in found] == [steps] * 2, found
        cut = any("cut into 1 parts and now are into 2" in text for text in found[0]["heard"])
        assert cut == (parallel == "ddp")
    assert far(out, whole) < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 3}, "train.batch: 3 sequences do not divide among 2 workers; give a multiple of 2"),
        ({"parallel": "fsdp", "release": True, "clip": None}, "release: model.layers.0"),
        ({"source": "/nowhere"}, "data: '/nowhere' does not exist"),
    ],
)
def test_one_of_them_says_what_is_wrong(ranks2: Ranks, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    out = tmp_path / "run"
    found = ranks2.run("work_train", "trained", job=job(out, **changes), out=str(out))
    assert sorted(each["kind"] == "Elsewhere" for each in found) == [False, True], found
    (told,) = (each["text"] for each in found if each["kind"] != "Elsewhere")
    assert words in told
    assert "\n" not in told
    assert not out.exists()


def test_int8_weights_are_averaged_leaf_by_leaf_and_never_cut(ranks2: Ranks, tmp_path: Path) -> None:
    ready = config(tmp_path / "run", "q-galore", **{**OPTIONS, "steps": 2})
    found = ranks2.run("work_train", "trained", job=ready, out=str(tmp_path / "run"))
    assert [each["steps"] for each in found] == [2, 2], found
    loop.train(replace(ready, run=replace(ready.run, out=str(tmp_path / "one"))))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)  # rounded stochastically
    cut = replace(ready, train=replace(ready.train, parallel="fsdp"))
    refused = ranks2.run("work_train", "trained", job=cut, out=str(tmp_path / "cut"))
    assert any("q_proj.weight is int8, which cannot be cut" in each["text"] for each in refused)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_planned_for_two_is_what_each_needs(tmp_path: Path, parallel: str) -> None:
    peaks = []
    for number in range(3):  # a gathered block may be counted for too long (see plan.measure), which only adds
        fresh = Ranks(2)  # processes in which nothing has run yet: what others leave behind would be measured too
        out = tmp_path / str(number)
        found = fresh.run("work_train", "trained", job=job(out, parallel=parallel), out=str(out))[0]
        fresh.close()
        measured, predicted = found["measured"], found["predicted"]
        for part in ("weights", "state"):
            assert measured[part] == pytest.approx(predicted[part], rel=0.02), part
        peaks.append(measured["peak"])
        if min(peaks) <= 1.05 * predicted["peak"]:
            break
    assert min(peaks) == pytest.approx(predicted["peak"], rel=0.05), peaks


def test_answers_of_uneven_length_and_an_adapter(ranks2: Ranks, tmp_path: Path) -> None:
    """A choice is a mean over tokens, of which processes have different numbers; only LoRA is trained, on weights that are cut."""
    folder, data = task_models.llama(tmp_path / "model", weights=True), task_models.copa(tmp_path / "copa.jsonl", 24)
    ready = task_models.job(tmp_path / "one", folder, data, "adamw", task="choice", lr=1e-2, batch=4)
    ready = replace(ready, adapter=AdapterConfig(kind="lora", rank=2))
    one = loop.train(ready)
    out = tmp_path / "two"
    cut = replace(ready, train=replace(ready.train, parallel="fsdp"))
    found = ranks2.run("work_train", "trained", job=cut, out=str(out))
    assert [each.get("steps") for each in found] == [4, 4], found
    assert found[0]["loss"] == pytest.approx(one.loss, abs=1e-5)
    assert found[0]["scores"] == found[1]["scores"] == one.scores

    # Stopped, and gone on with by one process, from a checkpoint that holds the pieces of the adapter alone.
    out = tmp_path / "half"
    ranks2.run("work_train", "trained", job=cut, out=str(out), stop_at=2, stops=1)
    saved = checkpoint.load_latest(out / "checkpoints")
    assert saved is not None
    assert saved.content.sharded
    assert saved.weights
    assert all("lora_" in name for name in saved.weights)
    assert saved.content.manifest["base"]["model"] == folder
    again = loop.train(replace(ready, run=replace(ready.run, out=str(out), resume=True)))
    assert again.loss == pytest.approx(one.loss, abs=1e-5)
    assert again.scores == one.scores
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    name = "adapter_model.safetensors"
    mine, theirs = (load_file(place / "model" / name) for place in (out, tmp_path / "one"))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[leaf] - theirs[leaf]).abs().max()) for leaf in theirs) < 1e-4


@pytest.mark.parametrize(("method", "parallel"), [("adamw", "ddp"), ("galore", "fsdp"), ("mezo", None)])
def test_a_spike_takes_all_ranks_back(ranks2: Ranks, tmp_path: Path, method: str, parallel: str | None) -> None:
    """F8: sequences 20 and 21 throw up the loss of step 11; all go back to step 8 and never see 16 to 21."""
    more = {"rank": 8} if method == "galore" else {}
    lr = {"adamw": 3e-3, "galore": 3e-2, "mezo": 1e-4}[method]
    options = {
        "steps": 14,
        "batch": 2,
        "checkpoint_every": 4,
        "eval_every": 6,
        "schedule": "constant",
        "spike_memory": 5,
        "lr": lr,
    }
    how_shared = {"parallel": parallel} if parallel else {"workers": "data"}
    for name, how in (("run", {"spoilt": range(20, 22)}), ("never", {"gone": range(16, 22)})):
        out = tmp_path / name
        spike = 6.0 if name == "run" else None
        made = config(out, method, **more, **options, spike=spike, **how_shared)
        found = ranks2.run("work_train", "trained", job=made, out=str(out), **how)
        assert [each.get("steps") for each in found] == [14, 14], found
    back = [line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if line["event"] == "rollback"]
    assert [(line["step"], line["spiked"], line["left_out"]) for line in back] == [(8, 11, [16, 22])]
    assert losses(tmp_path / "run") == losses(tmp_path / "never")
    assert far(tmp_path / "run", tmp_path / "never") == 0
