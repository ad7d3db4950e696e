"""F10, F9: a worker that stops is named by the others; one that dies under torchrun is started again and the run goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist
from train_runs import config, corpus, fingerprint, model

from tare.train import loop, metrics, restarts
from tare.train.heartbeat import Heartbeat
from tare.train.loop import train

OPTIONS: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "eval_every": 4, "lr": 1e-3}
HERE = Path(__file__).parent


class Cut:
    """A store that no longer answers once it is cut, as one on a stopped machine."""

    def __init__(self, store: Any) -> None:
        self.store, self.cut = store, False

    def __getattr__(self, name: str) -> Any:
        while self.cut:
            time.sleep(0.05)
        return getattr(self.store, name)


def beats(count: int, patience: float = 0.6) -> tuple[list[Heartbeat], list[Cut], list[list[Any]]]:
    shared = dist.HashStore()
    stores, heard = [Cut(shared) for _ in range(count)], [list[Any]() for _ in range(count)]
    tell = [heard[rank].append for rank in range(count)]
    return [Heartbeat(stores[rank], rank, count, patience, tell[rank]) for rank in range(count)], stores, heard


def test_a_silent_worker_is_named_with_its_step_by_the_one_before() -> None:
    found, stores, heard = beats(4)
    for step, one in enumerate(found, 5):
        one.step = step
    time.sleep(0.5)
    stores[2].cut = True
    time.sleep(1.5)
    silent = "gave no sign of life for 0.6 s"
    assert heard[1] == [f"worker 2 {silent} (last heard of in step 7, worker 1 is in step 6)"]
    assert heard[2] == [f"the store of the group (worker 0, or what has launched all) {silent}"]
    assert heard[0] == heard[3] == []
    stores[2].cut = False
    for one in found:
        one.close()


def test_who_says_farewell_is_not_missed() -> None:
    found, _, heard = beats(3)
    time.sleep(0.4)
    found[1].close()
    time.sleep(1.2)
    assert heard == [[], [], []]
    for one in (found[0], found[2]):
        one.close()


def pair(out: Path, notes: Path, fault: str, **more: Any) -> list["subprocess.Popen[str]"]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notes.mkdir()
    job = json.dumps({"out": str(out), "fault": fault, "notes": str(notes), **OPTIONS, **more})
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "faulty_worker.py"), job],
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_stopped_process_ends_the_run_of_the_other_which_names_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = pair(out, tmp_path / "notes", "stop@4", patience=6.0)
    try:
        _, said = first.communicate(timeout=240)
    finally:
        second.send_signal(signal.SIGCONT)
        second.kill()
        first.kill()
    assert first.returncode == 1
    line = said.splitlines()[-1]
    assert re.fullmatch(
        r"tare: worker 1 gave no sign of life for 6 s \((last heard of in step \d|never heard of), worker 0 is in step 4\); go on from "
        r"the last checkpoint with --resume",
        line,
    ), line
    second.wait()
    train(config(out, "mezo", **OPTIONS, resume=True))
    train(config(tmp_path / "alone", "mezo", **OPTIONS))
    assert fingerprint(out) == fingerprint(tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_worker_under_torchrun_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    flags = f"--model {model()} --data {corpus()} --method mezo --lr 1e-3 --seq 32 --batch 2 --steps 6 --threads 1 --device cpu"
    flags += " --checkpoint-every 2 --eval-every 4 --eval-data " + corpus()
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
    ]

    def run(out: Path, fault: str) -> "subprocess.CompletedProcess[str]":
        command = [*launcher, str(HERE / "faulty_worker.py"), json.dumps({"fault": fault, "notes": str(tmp_path)})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, "train", *flags.split(), "--out", str(out)],
            capture_output=True, text=True, env=environment, timeout=300, check=False,
        )  # fmt: skip

    killed, whole = run(tmp_path / "killed", "die@4"), run(tmp_path / "whole", "")
    assert (killed.returncode, whole.returncode) == (0, 0), killed.stderr
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    assert [
        line["step"] for line in metrics.read(tmp_path / "killed" / "metrics.jsonl") if line["event"] == "resume"
    ] == [2]
    # A later launch does not take the folder for its own, however often it is started again.
    again = run(tmp_path / "killed", "")
    assert again.returncode != 0
    assert "is not empty; resume the run in it (--resume)" in again.stderr


def test_only_the_run_of_this_launch_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarts.mark(tmp_path)
    assert not restarts.going_on(job).run.resume
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert not restarts.going_on(job).run.resume
    restarts.mark(tmp_path)
    assert not restarts.going_on(job).run.resume  # it ended before it began
    (tmp_path / "config.yaml").touch()
    assert restarts.going_on(job).run.resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarts.going_on(job).run.resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert not restarts.going_on(job).run.resume
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert not restarts.going_on(job).run.resume


def test_what_is_left_of_a_launch_that_died_before_it_began_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / restarts.NAME).write_text("a 1 2\n")
    assert loop.train(config(tmp_path / "run", steps=1)).steps == 1
    assert not (tmp_path / "run" / restarts.NAME).exists()
