"""`tare doctor`: every damage is named, the verdict is what a resume then does, and nothing is ever changed."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_runs import config

from tare.cli.main import main
from tare.train import integrity
from tare.train.doctor import Report, examine
from tare.train.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6, and its model."""
    out = tmp_path_factory.mktemp("doctor") / "run"
    train(config(out, steps=6))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def look(folder: Path) -> Report:
    """Examine; nothing may have changed."""
    before = state(folder)
    report = examine(folder)
    assert state(folder) == before
    return report


def damaged(report: Report) -> list[str]:
    return [f"{finding.what}: {finding.text}" for finding in report.findings if finding.level == "damaged"]


def test_a_finished_run_is_whole(out: Path) -> None:
    report = look(out)
    assert (report.code, report.resumes, report.steps, report.finished) == (0, 6, 6, True)
    assert report.command == f"tare train --resume --out {out} --steps MORE"
    assert [finding.level for finding in report.findings] == ["whole"] * len(report.findings)
    named = [finding.what for finding in report.findings]
    assert named == ["config.yaml", "checkpoints/step-6", "checkpoints/step-3", "metrics.jsonl", "model"]


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.json", "manifest.json"]
)
def test_a_flipped_byte_is_named_and_the_older_checkpoint_taken(name: str, out: Path) -> None:
    file = out / "checkpoints" / "step-6" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)
    report = look(out)
    assert (report.code, report.resumes, report.finished) == (1, 3, False)
    assert report.command == f"tare train --resume --out {out}"
    (text,) = damaged(report)
    assert text.startswith(f"checkpoints/step-6: {name}: damaged")


def test_with_every_checkpoint_damaged_nothing_can_be_resumed(out: Path) -> None:
    for path in (out / "checkpoints").glob("step-*/weights.safetensors"):
        path.write_bytes(b"")
    report = look(out)
    assert (report.code, report.resumes, report.command) == (2, None, None)
    assert len(damaged(report)) == 2


def lines(out: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = out / "metrics.jsonl"
    path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n"))))


def drop(event: str, step: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda rows: [row for row in rows if f'"{event}", "step": {step},'.encode() not in row]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "broken line": (lambda out: lines(out, lambda rows: [rows[0], b'{"event": "st', *rows[1:]]), "first is line 2"),
    "lost step": (lambda out: lines(out, drop("step", 4)), "the steps after 3 are missing"),
    "order": (lambda out: lines(out, lambda rows: [*rows[:-1], rows[0], b""]), "step 1 stands behind"),
    "short": (lambda out: lines(out, lambda rows: [*rows[:2], b""]), r"ends at step \d, before the checkpoint of step 6"),
    "no log": (lambda out: (out / "metrics.jsonl").unlink(), "metrics.jsonl: missing"),
    "gone": (lambda out: shutil.rmtree(out / "checkpoints" / "step-6"), "step-6: missing; by the log it was the newest"),
    "config": (lambda out: (out / "config.yaml").write_text("run: {out: 3"), "config.yaml: "),
    "model": (lambda out: (out / "model" / "model.safetensors").write_bytes(b"x" * 9), "model/model.safetensors: cannot be read"),
    "no model config": (lambda out: (out / "model" / "config.json").unlink(), "model: lacks config.json"),
    "extra": (lambda out: (out / "checkpoints" / "step-3" / "x").write_text(""), "step-3: x: does not belong"),
    "seed log": (lambda out: (out / "run.seeds").write_bytes(b"no"), "run.seeds: not a seed log"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damage_is_named_and_the_run_can_go_on(case: str, out: Path) -> None:
    damage, told = DAMAGES[case]
    damage(out)
    report = look(out)
    assert report.code == 1
    found = damaged(report)
    assert len(found) == 1, found
    assert re.search(told, found[0]), found
    assert report.resumes == (3 if case == "gone" else 6)
    assert ("--config FILE" in str(report.command)) is (case == "config")


def test_a_newer_format_is_said_as_a_resume_says_it(out: Path) -> None:
    manifest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])) / "manifest.json"
    said = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}
    manifest.write_bytes(integrity._manifest({**said, "format": 99}))
    report = examine(out)
    assert report.resumes is None
    assert report.code == 2
    assert any("format" in finding.text for finding in report.findings if finding.level == "damaged")


def test_what_a_kill_leaves_is_no_damage(out: Path) -> None:
    (out / "run.lock").write_text("999999\n")
    (out / "checkpoints" / f"step-9{integrity.TEMPORARY}ab").mkdir()
    (out / "model.old").mkdir()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    report = look(out)
    assert (report.code, report.process) == (0, None)
    left = {finding.what for finding in report.findings if finding.level == "left"}
    assert left == {"run.lock", "metrics.jsonl", "model.old", f"checkpoints/step-9{integrity.TEMPORARY}ab"}


def test_a_living_process_is_told_of(out: Path) -> None:
    with open(out / "run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()}\n")
        file.flush()
        report = look(out)
    assert report.process == f"process {os.getpid()}"
    assert report.code == 0


def test_a_run_without_a_checkpoint_goes_on_from_its_beginning(out: Path) -> None:
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    (out / "metrics.jsonl").unlink()
    report = look(out)
    assert (report.code, report.resumes) == (0, 0)
    assert "goes on from the beginning" in report.verdict


@pytest.mark.parametrize("what", ["nothing", "file", "other folder"])
def test_what_is_no_run_is_said(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("")
    if what == "other folder":
        path.mkdir()
        (path / "notes.txt").write_text("")
    assert examine(path).code == 2


def test_the_command_prints_a_table_or_one_document(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(out)]) == 0
    text = capsys.readouterr().out
    assert "checkpoints/step-6" in text
    assert f"tare train --resume --out {out} --steps MORE" in text
    (out / "checkpoints" / "step-6" / "weights.safetensors").unlink()
    assert main(["doctor", str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["code"], told["resumes"], told["command"]) == (1, 3, f"tare train --resume --out {out}")
    assert {
        "what": "checkpoints/step-6",
        "level": "damaged",
        "text": "weights.safetensors: missing from the checkpoint",
    } in told["findings"]
    assert main(["doctor", str(out / "nowhere")]) == 2
    assert main(["doctor"]) == 2
    assert "tare: RUN: missing" in capsys.readouterr().err


def test_the_verdict_is_what_a_resume_does(out: Path) -> None:
    (out / "checkpoints" / "step-6" / "optimizer.json").write_text("{}")
    report = look(out)
    first: list[str] = []
    train(config(out, steps=6, resume=True), on_event=lambda event: first.append(str(event)))
    assert any(f"resumed at step {report.resumes}" in text for text in first)
    assert look(out).code == 0


def test_pieces_of_ranks_are_verified_one_by_one(out: Path) -> None:
    """A sharded checkpoint of a release, put behind the run's own ones."""
    shutil.rmtree(out / "checkpoints")
    golden = Path(__file__).parents[1] / "golden" / "checkpoints" / "0.1.0" / "galore" / "sharded"
    shutil.copytree(golden, out / "checkpoints")
    lines(out, drop("checkpoint", 6))
    lines(out, drop("checkpoint", 3))
    report = look(out)
    assert (report.code, report.resumes) == (0, 3)
    (found,) = (finding for finding in report.findings if finding.what == "checkpoints/step-3")
    assert "in the pieces of 2 ranks" in found.text
    (out / "checkpoints" / "step-3" / "optimizer-00002-of-00002.safetensors").unlink()
    report = look(out)
    assert report.code == 2
    assert damaged(report) == ["checkpoints/step-3: optimizer-00002-of-00002.safetensors: missing from the checkpoint"]
