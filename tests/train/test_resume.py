"""A run killed anywhere and resumed ends with the same bits as one that was left alone. Real processes, real SIGKILL."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import config, fingerprint, finish, kill_after, send, start, wait_for

from tare.core.errors import CheckpointError
from tare.kernels import gemm
from tare.train import metrics, tensorfile
from tare.train.config import RunConfig
from tare.train.loop import train
from tare.train.progress import Event, StepDone
from tare.train.seeds import arithmetic, restore_arithmetic

# @n: the n-th time the stage is reached; at the second, there is a checkpoint to lose.
STAGES = [
    "before_write:weights.safetensors@1",
    "after_write:weights.safetensors@2",
    "after_fsync:weights.safetensors@3",
    "after_write:optimizer.safetensors@2",
    "after_write:optimizer.json@1",
    "before_write:trainer.json@2",
    "after_fsync:trainer.json@4",
    "after_write:manifest@2",
    "before_rename@1",
    "before_rename@2",
    "after_rename@1",
    "after_rename@3",
    "after_commit@4",
    "during_delete@1",
    "during_delete@2",
    "before_model@1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[int, float]]]:
    """The uninterrupted run: its bits, and its losses by step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(out))
    return fingerprint(out), losses(out)


def losses(out: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"])
        for line in metrics.read(out / "metrics.jsonl")
        if line["event"] in ("step", "eval")
    ]


BESIDE = [(stage, "always") for stage in STAGES]
AT_ONCE = [(stage, "never") for stage in STAGES]
SHORT = ("after_write:optimizer.safetensors@2", "before_rename@2")


@pytest.mark.parametrize(
    ("stage", "how"),
    [*BESIDE, *(pytest.param(*case, marks=() if case[0] in SHORT else pytest.mark.slow) for case in AT_ONCE)],
)
def test_a_kill_at_any_stage_of_saving_loses_nothing(
    stage: str, how: str, tmp_path: Path, whole: tuple[str, list], tally: Any
) -> None:
    out = tmp_path / "run"
    assert finish(config(out, checkpoint_async=how), fail_at=stage) == -signal.SIGKILL
    assert finish(config(out, checkpoint_async=how, resume=True)) == 0
    assert (fingerprint(out), losses(out)) == whole
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name or path.name == "run.lock"]
    tally("kills within a save, resumed to the same bits", 1)


def test_a_replaced_model_folder_is_old_or_new_after_a_kill(tmp_path: Path, whole: tuple[str, list]) -> None:
    out = tmp_path / "run"
    train(config(out))
    assert finish(config(out, resume=True), fail_at="between_models") == -signal.SIGKILL
    assert finish(config(out, resume=True)) == 0
    assert fingerprint(out) == whole[0]
    assert not (out / "model.old").exists()


def killed_at_random(out: Path, seed: int, kills: int) -> int:
    """Kill the run at random moments of its steps and saves, resuming in between; how many kills met a living process."""
    chance, met = random.Random(seed), 0
    for _ in range(kills):
        met += kill_after(start(config(out, resume=out.exists()), slow=0.1), chance.uniform(0.0, 0.5), begun=True)
    assert finish(config(out, resume=out.exists())) == 0
    return met


def test_kills_at_random_moments_do_not_change_a_bit(tmp_path: Path, whole: tuple[str, list], tally: Any) -> None:
    met = killed_at_random(tmp_path / "run", seed=1, kills=4)
    assert met > 0
    assert (fingerprint(tmp_path / "run"), losses(tmp_path / "run")) == whole
    tally("kills at random moments, resumed to the same bits", met)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_kills_at_random_moments_do_not_change_a_bit(
    seed: int, tmp_path: Path, whole: tuple[str, list], tally: Any
) -> None:  # fmt: skip
    met = killed_at_random(tmp_path / "run", seed=100 + seed, kills=5)
    assert (fingerprint(tmp_path / "run"), losses(tmp_path / "run")) == whole
    tally("kills at random moments, resumed to the same bits", met)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_go_on(number: int, tmp_path: Path, whole: tuple[str, list]) -> None:
    out = tmp_path / "run"
    process = start(config(out, checkpoint_every=1000), slow=0.1)
    wait_for(out / "metrics.jsonl")
    send(process, number, after=0.3)
    process.join(60)
    assert process.exitcode == 75  # Result.interrupted
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert not (out / "model").exists()
    assert finish(config(out, resume=True)) == 0
    assert (fingerprint(out), losses(out)) == whole


def test_a_second_signal_ends_at_once_and_leaves_the_old_checkpoint(tmp_path: Path, whole: tuple[str, list]) -> None:
    out = tmp_path / "run"
    process = start(config(out), slow=0.5)
    wait_for(out / "checkpoints" / "step-3")
    send(process, signal.SIGTERM)
    send(process, signal.SIGTERM, after=0.05)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGTERM
    assert finish(config(out, resume=True)) == 0
    assert (fingerprint(out), losses(out)) == whole


def test_a_signal_waits_for_a_save_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, list]
) -> None:
    out, real = tmp_path / "run", tensorfile.write

    def slow(*given: Any) -> dict[str, Any]:
        time.sleep(0.3)
        return real(*given)

    monkeypatch.setattr(tensorfile, "write", slow)
    stop_after(4, config(out, checkpoint_async="always"))  # right after the save of step 3 has begun
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-3", "step-4"]
    saved = [line["step"] for line in metrics.read(out / "metrics.jsonl") if line["event"] == "checkpoint"]
    assert saved == [3, 4]
    monkeypatch.undo()
    train(config(out, resume=True))
    assert (fingerprint(out), losses(out)) == whole


def test_killed_before_the_first_checkpoint_starts_over(tmp_path: Path, whole: tuple[str, list]) -> None:
    out = tmp_path / "run"
    assert finish(config(out), fail_at="before_write:weights.safetensors") == -signal.SIGKILL
    assert not list((out / "checkpoints").glob("step-?"))
    result = train(config(out, resume=True))
    assert result.steps == 10
    assert (fingerprint(out), losses(out)) == whole


def test_killed_before_anything_was_written_starts_over(tmp_path: Path, whole: tuple[str, list]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.lock").write_text("999999\n")  # all that a run killed while it was being built leaves
    train(config(out, resume=True))
    assert (fingerprint(out), losses(out)) == whole


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("galore", {"options": {"period": 4}, "rank": 8}),
        ("galore-8bit", {"options": {"period": 4}, "rank": 8}),
        ("fira", {"options": {"period": 4}, "rank": 8}),
        ("galore-adafactor", {"options": {"period": 4}, "rank": 8}),
        ("apollo", {"options": {"period": 4}, "rank": 8}),
        ("apollo-mini", {"options": {"period": 4}}),
        ("lion", {}),
        ("adamw-8bit", {}),
        ("adamw", {"accumulate": 3, "checkpointing": True}),
        ("adamw", {"precision": "bf16"}),
        ("apollo-mini", {"precision": "bf16-autocast"}),
        ("galore", {"release": True, "clip": None, "accumulate": 2, "options": {"period": 4}, "rank": 8}),
        pytest.param("adamw", {"threads": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "plain",
)
def test_resume_is_exact_around_a_refresh_for_every_method(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    # Bases are computed in steps 1 and 5 of 7: stopped right before, right after, and at the end.
    job = {"steps": 7, "checkpoint_every": 1000, **changes}
    train(config(tmp_path / "whole", method, **job))
    out = tmp_path / "run"
    for step in (4, 5, 7):
        stop_after(step, config(out, method, resume=step > 4, **job))
    train(config(out, method, resume=True, **job))
    assert fingerprint(out) == fingerprint(tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


def stop_after(step: int, job: RunConfig) -> None:
    """Run until so many steps are done, then ask it to stop as a signal does."""

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(job, on_event=listen).interrupted


@pytest.mark.filterwarnings("ignore:data. evaluation reads")
def test_a_corpus_of_one_epoch_and_a_half_resumes_exactly(tmp_path: Path) -> None:
    text = tmp_path / "small.txt"
    text.write_text(
        "the cat sat on the mat and the dog sat on the log. " * 60 + "\n\nanother one: " + "rain falls. " * 40
    )
    data = {"source": str(text), "eval_source": str(text), "seq": 16}
    train(config(tmp_path / "whole", **data, steps=30))
    stop_after(17, config(tmp_path / "run", **data, steps=30))
    train(config(tmp_path / "run", **data, steps=30, resume=True))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 300,
    }
    LlamaConfig(**shape, attention_dropout=0.3).save_pretrained(tmp_path / "model")
    job = {"name": str(tmp_path / "model"), "eval_every": 2}
    train(config(tmp_path / "whole", **job))
    stop_after(5, config(tmp_path / "run", **job))
    train(config(tmp_path / "run", **job, resume=True))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path: Path, whole: tuple[str, list]) -> None:
    out = tmp_path / "run"
    stop_after(7, config(out))
    newest = out / "checkpoints" / "step-7" / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    told: list[str] = []
    train(config(out, resume=True), on_event=lambda event: told.append(str(event)))
    assert fingerprint(out) == whole[0]
    assert any("step-7/weights.safetensors: damaged" in text for text in told)
    warned = [line["text"] for line in metrics.read(out / "metrics.jsonl") if line["event"] == "warning"]
    assert any("step-7/weights.safetensors" in text for text in warned)


def test_when_every_checkpoint_is_damaged_it_stops_and_says_which_file(tmp_path: Path) -> None:
    stop_after(7, config(tmp_path / "run"))
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/optimizer.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-7/optimizer\.json: damaged.*no intact checkpoint is left"):
        train(config(tmp_path / "run", resume=True))


def test_a_disk_that_fills_up_stops_the_run_with_the_old_checkpoint_intact(
    tmp_path: Path, whole: tuple[str, list]
) -> None:
    out = tmp_path / "run"
    stop_after(3, config(out))
    before = sorted(path.name for path in (out / "checkpoints" / "step-3").iterdir())
    assert finish(config(out, resume=True), limit=1 << 18) == 1  # CheckpointError: no space left
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    assert sorted(path.name for path in (out / "checkpoints" / "step-3").iterdir()) == before
    assert finish(config(out, resume=True)) == 0
    assert (fingerprint(out), losses(out)) == whole


def test_metrics_hold_every_step_once_after_kills(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finish(config(out), fail_at="before_rename@3") == -signal.SIGKILL
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "step": 9, "lo')  # torn by the kill
    train(config(out, resume=True))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 11))
    assert [line["step"] for line in lines if line["event"] == "eval"] == [4, 8, 10]


def test_a_finished_run_may_be_resumed_and_extended(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(config(out, schedule="constant"))
    again = train(config(out, schedule="constant", resume=True))
    assert (again.loss, again.steps) == (first.loss, 10)
    shutil.rmtree(out / "model")
    more = train(config(out, schedule="constant", resume=True, steps=12))
    assert more.steps == 12
    assert (out / "model" / "config.json").exists()
    assert any("train.steps was 10 and is now 12" in line.get("text", "") for line in more.history)


@pytest.mark.parametrize("was", [True, False])
def test_the_matrix_library_of_the_first_process_is_used_again(was: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process settles it by a timing; a resumed run must not depend on how busy the machine is then."""
    monkeypatch.delenv("TARE_GEMM", raising=False)
    cpu = torch.device("cpu")
    monkeypatch.setattr(gemm, "_fast", was)
    saved = arithmetic(cpu)
    monkeypatch.setattr(gemm, "_fast", not was)
    monkeypatch.setattr(gemm, "_accurate", True)  # passed over for its speed alone
    assert restore_arithmetic(saved, cpu) == []
    assert gemm.decided() is was
    monkeypatch.setattr(gemm, "_fast", False)
    monkeypatch.setattr(gemm, "_accurate", False)  # here it may not be used
    assert [text.split()[0] for text in restore_arithmetic(saved, cpu)] == ["fast_matmul"] * was
    assert restore_arithmetic({**arithmetic(cpu), "torch": "1.0"}, cpu)[0].startswith("torch was 1.0 and is now")
