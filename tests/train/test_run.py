"""The folder of a run: who may write it, what may change on resume, what stands in it at the end."""

import json
import math
import os
import shutil
import signal
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from train_runs import config, finish, kill_after, start, wait_for

from tare.core.errors import CheckpointError, InputError
from tare.train import checkpoint, metrics
from tare.train.adapters import AdapterConfig
from tare.train.config import RunConfig
from tare.train.configfile import load
from tare.train.evaluate import EvalResult
from tare.train.loop import train
from tare.train.run import CHANGES, RunFolder, changes, inherit
from tare.train.session import resolve


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through."""
    out = tmp_path_factory.mktemp("done") / "run"
    train(config(out, steps=4, checkpoint_every=2))
    return out


def test_the_final_model_opens_with_transformers(done: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(done / "model")
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    ids = tokenizer("def main():", return_tensors="pt")["input_ids"]
    assert int(ids.max()) < model.config.vocab_size
    assert tokenizer.decode(ids[0]) == "def main():"


def test_the_saved_configuration_is_resolved_and_reads_back(done: Path) -> None:
    saved = load(done / "config.yaml")
    assert saved.method.lr == 1e-3
    assert saved.run.threads == 1
    assert saved.run.out == str(done)


def test_metrics_are_json_lines_with_event_and_step(done: Path) -> None:
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    events = [(line["event"], line["step"]) for line in lines]
    saved = [
        event for event in events if event[0] == "checkpoint"
    ]  # told when they are whole: beside the training, some steps later
    assert saved == [("checkpoint", 2), ("checkpoint", 4)]
    others = [event for event in events if event not in saved]
    assert others == [("step", 1), ("memory", 2), ("step", 2), ("step", 3), ("step", 4), ("eval", 4)]
    assert {"loss", "lr", "grad_norm", "tokens", "seconds"} <= set(lines[0])


def test_a_folder_that_is_not_empty_is_refused_with_advice(done: Path, tmp_path: Path) -> None:
    before = sorted(done.rglob("*"))
    with pytest.raises(InputError, match=r"run\.out: .* is not empty; resume .*--resume.*or choose another folder"):
        train(config(done, steps=4))
    assert sorted(done.rglob("*")) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no run in .*it holds 'notes\.txt'"):
        RunFolder(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("")
    with pytest.raises(InputError, match=r"run\.out: .*out is a file; give a folder"):
        RunFolder(file)
    with pytest.raises(InputError, match=r"run\.out: .*inner cannot be written"):
        RunFolder(file / "inner")


def test_a_place_that_cannot_be_written() -> None:
    with pytest.raises(InputError, match=r"run\.out: /proc/tare/run cannot be written.*choose another folder"):
        RunFolder("/proc/tare/run")  # chmod would not stop root, /proc does


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.resume: there is no run in .*nowhere; start it without resume"):
        train(config(tmp_path / "nowhere", resume=True))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/nowhere/at/all.txt"}, "/nowhere/at/all.txt"),
        ({"name": "lama-tiny"}, "lama-tiny"),
        ({"key": "galor"}, "galor.*did you mean 'galore'"),
        ({"rank": 3}, "method.rank: adamw has no rank"),
        ({"options": {"momentum": 1}}, "momentum"),
        ({"seq": 4096}, "4096.* 64 positions"),
        ({"device": "cuda:7"}, "run.device: cuda:7"),
        ({"release": True}, "train.clip: .*set train.clip to none"),
        ({"budget": "1MiB"}, "1.00 MiB is too small"),
        ({"key": "apollo", "rank": 4, "release": True, "clip": None, "accumulate": 2}, "accumul"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_leave_nothing_behind(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(config(tmp_path / "a" / "b", **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(config(out, steps=1000), slow=0.1)
    wait_for(out / "metrics.jsonl")
    for resume in (False, True):
        with pytest.raises(InputError, match=rf"is in use by another run \(process {first.pid}\)"):
            train(config(out, resume=resume))
    assert (out / "run.lock").exists()
    assert kill_after(first, 0)
    train(config(out, resume=True))  # the lock of the dead process is taken over
    assert not (out / "run.lock").exists()


def test_a_lock_is_held_once_in_one_process_too(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=f"process {os.getpid()}"):
        RunFolder(tmp_path / "run")
    first.abandon()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["Started", "StepDone"])
def test_a_folder_that_vanishes_while_running_is_an_error(when: str, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def remove(event: object) -> None:
        if type(event).__name__ == when:
            shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(CheckpointError, match=r"run/(checkpoints|metrics\.jsonl): cannot be written"):
        train(config(out), on_event=remove)
    assert not out.exists()


def test_every_setting_has_a_class_of_change() -> None:
    every = {
        f"{part.name}.{spec.name}" for part in fields(RunConfig) for spec in fields(getattr(RunConfig(), part.name))
    }
    assert set(CHANGES) == every


OTHER: dict[str, Any] = {
    "model.name": "llama-9m", "model.tokenizer": "x", "model.checkpointing": True, "data.source": "x", "data.eval_source": "x",
    "data.text_column": "x", "data.bad_rows": 3, "data.seq": 64, "data.eval_fraction": 0.5, "data.eval_tokens": 5, "method.key": "lion",
    "method.lr": 0.5, "method.rank": 5, "method.weight_decay": 0.5, "method.release": True, "method.options": {"eps": 0.1},
    "method.storage": {"moment": "bf16"}, "train.steps": 20, "train.batch": 3, "train.accumulate": 2,
    "train.schedule": "constant", "train.warmup": 2.0, "train.final_lr_ratio": 0.5, "train.clip": None,
    "train.clip_mode": "previous", "train.clip_parts": 2, "train.refresh_from": "first", "train.refresh_parts": 3,
    "train.precision": "bf16", "train.max_bad_steps": 3, "run.out": "x", "run.budget": "9GiB", "run.seed": 9,
    "run.device": "auto", "run.resume": True, "run.checkpoint_every": 9, "run.eval_every": 9, "run.keep": 9, "run.threads": 9,
    "run.tensorboard": True, "model.kind": "masked", "task.name": "classify", "task.template": "x", "task.words": {"0": "x"},
    "task.label_column": "x", "task.shots": 3, "task.objective": "accuracy", "task.eval_examples": 3,
    "train.workers": "data", "model.quantize": "int4", "train.match": "mlp", "adapter.kind": "lora", "adapter.rank": 4,
    "adapter.alpha": 8.0, "adapter.targets": "q_proj", "adapter.dropout": 0.1, "adapter.tokens": 9, "adapter.merge": True,
    "train.spike": 6.0, "train.spike_memory": 8, "train.spike_limit": 1, "run.patience": 5.0,
    "run.checkpoint_async": "never", "train.parallel": "fsdp", "train.shards": 2, "train.sync": "batch", "train.compress": "topk",
    "train.compress_fraction": 0.1, "train.compress_rank": 2, "train.compress_start": 5,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_setting_is_free_warned_of_or_refused(key: str, tmp_path: Path) -> None:
    before = resolve(config(tmp_path))
    section, name = key.split(".")
    if section == "adapter" and name != "kind":  # which has no other settings
        before = replace(before, adapter=AdapterConfig("prefix" if name == "tokens" else "lora").filled())
    after = replace(before, **{section: replace(getattr(before, section), **{name: OTHER[key]})})
    assert changes(asdict(before), before) == []
    if CHANGES[key] == "refuse":
        with pytest.raises(CheckpointError, match=f"^{key}: the run was started with .*cannot go on with another"):
            changes(asdict(before), after)
    else:
        warned = changes(asdict(before), after)
        assert len(warned) == (CHANGES[key] == "warn")
        assert all(text.startswith(key) for text in warned)


def test_what_is_left_open_is_as_it_was(tmp_path: Path) -> None:
    asked = config(tmp_path, "galore", lr=0.5, rank=7, options={"period": 9}, threads=1)
    saved = asdict(resolve(asked))
    again = inherit(saved, config(tmp_path, "auto", threads=None))
    assert (again.method.key, again.method.lr, again.method.rank) == ("galore", 0.5, 7)
    assert again.method.options["period"] == 9
    assert again.run.threads == 1
    assert changes(saved, resolve(again)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "lion"}, r"method\.key: the run was started with 'adamw', not 'lion'"),
        ({"name": "llama-tiny"}, r"model\.name: the run was started with"),
        ({"seed": 5}, r"run\.seed: the run was started with 0, not 5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], message: str, done: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        train(config(done, steps=4, resume=True, **change))


def test_data_that_changed_since_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 200 + "\n\n" + "eight nine ten\n" * 100)
    job = {"source": str(text), "steps": 2, "seq": 16, "eval_fraction": 0.5}
    train(config(tmp_path / "run", **job))
    text.write_text(text.read_text().replace("one", "won"))
    with pytest.raises(CheckpointError, match="has changed since it was saved"):
        train(config(tmp_path / "run", resume=True, **job))


def test_a_changed_config_of_the_model_is_refused_by_name(tmp_path: Path) -> None:
    job = config(tmp_path / "run", steps=3)
    shutil.copytree(job.model.name, tmp_path / "model")
    job = replace(job, model=replace(job.model, name=str(tmp_path / "model")))
    train(job)
    file = tmp_path / "model" / "config.json"
    said = json.loads(file.read_text())
    again = replace(job, run=replace(job.run, resume=True))
    file.write_text(json.dumps({**said, "transformers_version": "9.9", "use_cache": False}))
    assert train(again).steps == 3
    file.write_text(json.dumps({**said, "rms_norm_eps": 0.5}))
    with pytest.raises(
        CheckpointError, match=r"rms_norm_eps in the config.json of the model has changed since it was saved"
    ):
        train(again)


def test_large_data_that_was_only_touched_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above a size count by their time of change; with the same tokens they are the same."""
    monkeypatch.setattr("tare.train.cache.HASHED_SOURCE", 100)
    job = config(tmp_path / "run", steps=3)
    data = Path(shutil.copy(job.data.source, tmp_path / "text.jsonl"))
    job = replace(job, data=replace(job.data, source=str(data)))
    train(job)
    os.utime(data, (1, 1))
    again = replace(job, run=replace(job.run, resume=True))
    assert train(again).steps == 3
    data.write_text(data.read_text() + json.dumps({"text": "one line more " * 200}) + "\n")
    with pytest.raises(CheckpointError, match=r"the tokenizer has changed since"):  # it was trained on them
        train(again)


def test_an_evaluation_that_overflows_does_not_stop_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = EvalResult(math.nan, math.nan, 10)
    monkeypatch.setattr("tare.train.trainer.evaluate", lambda *given, **more: lost)
    assert train(config(tmp_path / "run", steps=4, checkpoint_every=2, eval_every=2)).steps == 4
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 4  # type: ignore[union-attr]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """After a fallback newer ones, damaged, would push out what is written next."""
    out = tmp_path / "run"
    train(config(out, steps=9, keep=3))
    for step in (6, 9):
        (out / "checkpoints" / f"step-{step}" / "trainer.json").write_text("{}")
    done = train(config(out, steps=9, keep=2, checkpoint_every=1, resume=True))
    assert done.steps == 9
    there = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert there == ["step-6.damaged", "step-8", "step-9", "step-9.damaged"]
    assert [step for step, _ in checkpoint.found(out / "checkpoints")] == [9, 8]
    assert checkpoint.load_latest(out / "checkpoints").skipped == ()  # type: ignore[union-attr]


def test_a_full_disk_under_the_model_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def full(place: Path) -> None:
        (place / "half").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match="model: could not be saved: no space left"):
        folder.write_model(full)
    assert sorted(path.name for path in folder.path.iterdir()) == ["run.lock"]
    folder.close()


def test_a_lock_given_free_twice_is_not_that_of_the_next(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.close()
    second = RunFolder(tmp_path / "run")
    first.close()
    with pytest.raises(InputError, match="in use"):
        RunFolder(tmp_path / "run")
    second.close()


def test_a_changed_learning_rate_is_used_and_warned_of(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=3, schedule="constant", warmup=0.0))
    result = train(config(out, steps=5, schedule="constant", warmup=0.0, lr=7e-4, weight_decay=0.25, resume=True))
    rates = [line["lr"] for line in result.history if line["event"] == "step"]
    assert rates == [1e-3] * 3 + [7e-4] * 2
    warned = [line["text"] for line in result.history if line["event"] == "warning"]
    assert [text.split()[0] for text in warned] == ["method.lr", "method.weight_decay", "train.steps"]


def test_a_torn_last_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"event": "step", "step": 1}\n\xff\xfe\n[1]\n{"event": "eval", "step": 2}\n{"event": "step", "st'
    )
    assert [line["step"] for line in metrics.read(path)] == [1, 2]
    metrics.truncate(path, step=5, evaluated=1)
    assert path.read_text() == '{"event": "step", "step": 1}\n'
    metrics.truncate(path, step=-1, evaluated=0)
    assert path.read_text() == ""


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = metrics.Metrics(tmp_path / "metrics.jsonl")
    log.write("step", 1, loss=float("nan"), parts={"a": float("inf"), "b": 1.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "event": "step", "step": 1, "loss": None, "parts": {"a": None, "b": 1.0},
    }  # fmt: skip


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r'run\.tensorboard: .*pip install "tare\[tensorboard\]"'):
        train(config(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_a_run_killed_while_its_model_is_written_has_none_or_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finish(config(out, steps=2), fail_at="before_model") == -signal.SIGKILL
    assert not (out / "model").exists()
    assert finish(config(out, steps=2, resume=True)) == 0
    assert (out / "model" / "config.json").exists()
