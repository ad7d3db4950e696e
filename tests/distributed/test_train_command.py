"""`tare train --nproc N` and torchrun: real launchers, exit codes, signals, and one line for what is wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "train"))
from test_train_runs import far, losses
from train_runs import corpus, model

from tare.core.errors import InputError
from tare.parallel import group
from tare.parallel.launch import launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def words(out: Path, *more: str, batch: int = 4) -> list[str]:
    sizes = [
        "--seq",
        "32",
        "--batch",
        str(batch),
        "--threads",
        "1",
        "--device",
        "cpu",
        "--data.eval_tokens",
        "512",
        "--data.eval_fraction",
        "0.1",
    ]
    return ["-m", "tare", "train", "--model", model(), "--data", corpus(), *sizes, "--out", str(out), *more]


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)


def said(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("tare: ")]


def test_nproc_is_a_run_of_several(tmp_path: Path) -> None:
    from train_runs import config

    from tare.train import loop

    flags = ["--method", "adamw", "--lr", "1e-3", "--steps", "3"]
    done = run(sys.executable, *words(tmp_path / "two", *flags, "--nproc", "2", "--parallel", "fsdp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model:") == 1
    assert done.stderr.count("2 processes by FSDP2") == 1
    loop.train(config(tmp_path / "one", "adamw", lr=1e-3, steps=3, batch=4))
    assert far(tmp_path / "two", tmp_path / "one") < 1e-5
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
def test_bad_words_are_said_once(tmp_path: Path, launcher: str) -> None:
    front = [sys.executable] if launcher == "nproc" else TORCHRUN
    more = ["--nproc", "2"] if launcher == "nproc" else []
    done = run(*front, *words(tmp_path / "run", "--method", "adamw", *more, batch=3))
    assert said(done) == ["tare: train.batch: 3 sequences do not divide among 2 workers; give a multiple of 2"]
    assert done.returncode == (2 if launcher == "nproc" else 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_fault_in_a_step_ends_all_with_its_own_code(tmp_path: Path) -> None:
    """In the middle of things: models are wrapped, and the others wait in an operation."""
    more = ["--method", "adamw", "--lr", "1e12", "--warmup", "0", "--steps", "40", "--train.max_bad_steps", "2"]
    done = run(sys.executable, *words(tmp_path / "run", *more, "--nproc", "2"))
    assert done.returncode == 2
    (line,) = said(done)
    assert "2 steps in a row (train.max_bad_steps)" in line
    assert "terminate called" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    command = [sys.executable, *words(out, "--method", "adamw", "--steps", "5000", "--nproc", "2")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    end = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or '"step": 3' not in (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    stopped = [line for line in errors.splitlines() if line.startswith("tare: interrupted at step")]
    assert len(stopped) == 1, errors
    at = int(stopped[0].split("step ")[1].split(",")[0])
    assert (out / "checkpoints" / f"step-{at}").is_dir()
    done = run(
        sys.executable, "-m", "tare", "train", "--resume", "--out", str(out), "--steps", str(at + 2), "--warmup", "0"
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {at}" in done.stderr


@pytest.mark.parametrize(
    ("there", "words_"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT missing; start with torchrun"),
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK is no number"),
    ],
)
def test_half_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch, there: dict[str, str], words_: str) -> None:
    for name in group.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not group.launched()
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words_):
        group.launched()


def test_nproc_says_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--nproc: expected a number of processes of at least 1, got 0"):
        launch(0, [])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(InputError, match="a process of torchrun already"):
        launch(2, [])
