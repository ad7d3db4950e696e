"""Several processes take the steps of one run: the same bits as alone, one folder, and one fault for all."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import CONTEXT, config, corpus, fingerprint, model
from worker_runs import worker

from tare.core.errors import InputError
from tare.train import loop, metrics, progress, session
from tare.train.config import RunConfig
from tare.train.workers import Crew, attach, enlist

OPTIONS: dict[str, Any] = {"steps": 5, "checkpoint_every": 2, "eval_every": 4, "lr": 1e-3}


def launch(job: RunConfig, notes: Path, faults: tuple[str, str] = ("", "")) -> list[dict[str, Any]]:
    """What two workers came to; `{}` for one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notes.mkdir()
    started = [CONTEXT.Process(target=worker, args=(job, rank, port, notes, faults[rank])) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
        hangs = process.exitcode is None
        process.kill()
        assert not hangs, "the workers hang"
    return [json.loads(path.read_text()) if (path := notes / f"{rank}.json").exists() else {} for rank in range(2)]


def steps_of(out: Path) -> list[tuple[Any, ...]]:
    lines = metrics.read(out / "metrics.jsonl")
    return [(x["event"], x["step"], x["loss"]) for x in lines if x["event"] in ("step", "eval")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    loop.train(config(out, "mezo", **OPTIONS))
    return out


def test_shared_points_are_the_run_of_one_process_also_after_a_kill(alone: Path, tmp_path: Path) -> None:
    job = config(tmp_path / "run", "mezo", **OPTIONS)
    first, second = launch(job, tmp_path / "killed", faults=("", "die@3"))
    assert (first["kind"], second) == ("WorkersFailed", {})
    assert "gone" in first["text"]
    assert "\n" not in first["text"]
    job = replace(job, run=replace(job.run, resume=True))
    first, second = launch(job, tmp_path / "resumed")
    assert fingerprint(tmp_path / "run") == fingerprint(alone)
    assert (tmp_path / "run" / "run.seeds").read_bytes() == (alone / "run.seeds").read_bytes()
    assert steps_of(tmp_path / "run") == steps_of(alone)
    sent = [line["sent"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if line["event"] == "step"]
    assert len(sent) == 5
    assert max(sent) < 100
    assert (first["workers"], first["sent"], first["forwards"]) == (2, sum(sent), 5)
    assert second["events"] == []


def test_shared_data_is_the_mean_over_the_batch(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = launch(config(out, "mezo", workers="data", **OPTIONS), tmp_path / "notes")
    assert first["forwards"] == second["forwards"] == 10
    weights, theirs = (load_file(place / "model" / "model.safetensors") for place in (out, alone))
    assert max(float((weights[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    for mine, other in zip(steps_of(out), steps_of(alone), strict=True):
        assert mine[:2] == other[:2]
        assert mine[2] == pytest.approx(other[2], rel=1e-6)
    heard: list[Any] = []
    again = config(out, "mezo", workers="data", resume=True, **{**OPTIONS, "steps": 6, "schedule": "constant"})
    assert loop.train(again, on_event=heard.append).steps == 6
    assert any("cut into 2 parts and now are into 1" in e.text for e in heard if isinstance(e, progress.Warned))


@pytest.mark.parametrize(
    ("faults", "kinds", "words"),
    [
        (("", "batch@2"), ["Elsewhere", "KeyError"], "no such row"),
        pytest.param(("own@3", ""), ["ValueError", "Elsewhere"], "the screen is full", marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_one_ends_all_and_one_says_why(
    faults: tuple[str, str], kinds: list[str], words: str, tmp_path: Path
) -> None:
    found = launch(config(tmp_path / "run", "mezo", **OPTIONS), tmp_path / "notes", faults=faults)
    assert [each["kind"] for each in found] == kinds
    assert [words in each["text"] for each in found] == [kind != "Elsewhere" for kind in kinds]
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_by_the_first(tmp_path: Path) -> None:
    first, second = launch(config(tmp_path / "run", "mezo", source="/nowhere", **OPTIONS), tmp_path / "notes")
    assert (first["kind"], second["kind"]) == ("InputError", "Elsewhere")
    assert "/nowhere" in first["text"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("adamw", {"workers": "data"}, r"train.workers: adamw steps with gradients; set train.parallel"),
        ("adamw", {"batch": 3}, r"train.batch: 3 sequences do not divide among 2 workers; give a multiple of 2"),
        ("adamw", {"batch": 1}, r"train.batch: 1 sequences are fewer than the 2 processes .* start at most 1"),
        ("adamw", {"parallel": "hsdp"}, r"train.shards: missing; .* a divisor of the 2 processes"),
        ("adamw", {"shards": 3}, r"train.shards: 3 does not divide the 2 processes; allowed: 1, 2"),
        ("adamw", {"parallel": "ddp", "shards": 2}, r"train.shards: goes with hsdp, not with ddp"),
        ("mezo", {"parallel": "fsdp"}, r"train.parallel: mezo makes no gradients .* set train.workers"),
        ("mezo", {"shards": 2}, r"train.shards: mezo makes no gradients"),
        ("zo2", {}, r"method 'zo2' shares no points"),
        ("mezo", {"batch": 3, "workers": "data"}, r"train.batch: 3 sequences do not divide among 2 workers"),
        ("mezo", {"options": {"probe": "one-point"}}, r"2 workers share the points of a step, and mezo asks for 1"),
    ],
)
def test_what_cannot_be_shared(method: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    crew, job = Crew(size=2), config(tmp_path / "run", method, **{**OPTIONS, **changes})
    with pytest.raises(InputError, match=words):
        attach(crew, enlist(job, crew), session.build_optimizer(job, torch.nn.Linear(4, 4)))
    plain = config(tmp_path / "run", method, **OPTIONS)
    assert enlist(plain, Crew()) is plain


def test_one_process_by_itself_shares_nothing(tmp_path: Path) -> None:
    heard: list[Any] = []
    done = loop.train(
        config(tmp_path / "run", "mezo", workers="data", **{**OPTIONS, "steps": 1}), on_event=heard.append
    )
    assert (done.workers, done.sent) == (1, 0)
    assert ["torchrun" in event.text for event in heard if isinstance(event, progress.Warned)] == [True]
    assert not any("sent" in line for line in done.history)


@pytest.mark.slow
def test_by_command(tmp_path: Path) -> None:
    """Under torchrun itself: the model of one process; and one line on why two cannot."""
    flags = f"--model {model()} --data {corpus()} --method mezo --lr 1e-3 --seq 32 --batch 2 --steps 3 --threads 1 --device cpu".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(launcher: list[str], out: str, *more: str) -> "subprocess.CompletedProcess[str]":
        command = [*launcher, "-m", "tare", "train", *flags, "--out", str(tmp_path / out), *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    alone, shared = run([sys.executable], "alone"), run(torchrun, "shared", "--workers", "points")
    assert (alone.returncode, shared.returncode) == (0, 0), shared.stderr
    assert "by each of 2 workers" in shared.stdout
    assert fingerprint(tmp_path / "alone") == fingerprint(tmp_path / "shared")
    refused = run(
        torchrun, "refused", "--workers", "data", "--accumulate", "2", "--config", str(tmp_path / "none.yaml")
    )
    assert [line for line in refused.stderr.splitlines() if line.startswith("tare: ")] == [
        f"tare: {tmp_path / 'none.yaml'}: no such file; --config expects a YAML file"
    ]
