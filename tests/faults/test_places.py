"""F13, F14, F12: folders that go away or may not be written, clocks that jump, two runs at once, records that cannot be read."""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_runs import CONTEXT, config, corpus, fingerprint, wait_for

from tare.core.errors import CheckpointError, InputError
from tare.train import loop, metrics, progress
from tare.train.config import RunConfig
from tare.train.data import PackedDataset
from tare.train.loop import train

NOBODY = 65534


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder into which other users may look too, unlike those of pytest."""
    place = Path(tempfile.mkdtemp(prefix="tare-test-"))
    place.chmod(0o777)
    yield place
    for path in place.rglob("*"):
        path.chmod(stat.S_IRWXU)
    shutil.rmtree(place)


def losing_rights(job: RunConfig, notes: Path, at: int) -> None:
    """Trains; after a step the run's folders are read-only, and the process is of a user who has to heed that (root has not)."""

    def listen(event: progress.Event) -> None:
        if isinstance(event, progress.StepDone) and event.step == at:
            wait_for(Path(job.run.out) / "checkpoints" / "step-3")  # written in the background
            for path in [Path(job.run.out), *Path(job.run.out).rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)
            os.seteuid(NOBODY)

    try:
        loop.train(job, on_event=listen)
    except Exception as fault:
        os.seteuid(0)
        (notes / "said.json").write_text(json.dumps([type(fault).__name__, str(fault)]))
        raise SystemExit(2) from None


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to become nobody")
def test_a_folder_that_becomes_read_only_ends_the_run_with_its_checkpoint(open_place: Path) -> None:
    out = open_place / "run"
    job = {"steps": 8, "checkpoint_every": 3}
    process = CONTEXT.Process(target=losing_rights, args=(config(out, **job), open_place, 4))
    process.start()
    process.join(120)
    assert process.exitcode == 2
    kind, said = json.loads((open_place / "said.json").read_text())
    assert kind == "CheckpointError", said
    assert "\n" not in said
    assert "cannot be written" in said or "could not be saved" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    for path in (out, *out.rglob("*")):
        path.chmod(0o777)
    train(config(out, **job, resume=True))
    train(config(open_place / "whole", **job))
    assert fingerprint(out) == fingerprint(open_place / "whole")


def test_a_file_in_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    """Also what a disk that was unmounted and mounted elsewhere looks like: the name is there and is no folder."""
    out = tmp_path / "run"

    def spoil(event: progress.Event) -> None:
        if isinstance(event, progress.StepDone) and event.step == 2:
            (out / "checkpoints").write_text("")

    with pytest.raises(CheckpointError, match=r"checkpoints.*: (cannot be written|could not be saved)"):
        train(config(out), on_event=spoil)
    (out / "checkpoints").unlink()
    assert train(config(out, resume=True)).steps == 10


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours forth and back in every step, as by a wrong time server; intervals are measured by another clock."""
    train(config(tmp_path / "whole"))
    real, looks = time.time, []

    def jumping() -> float:
        looks.append(1)
        return real() + (-1) ** len(looks) * 86400 * len(looks)

    monkeypatch.setattr(time, "time", jumping)
    done = train(config(tmp_path / "run"))
    monkeypatch.undo()
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    assert 0 <= done.seconds < 600
    assert all(
        0 <= line["seconds"] < 600 for line in metrics.read(done.out / "metrics.jsonl") if line["event"] == "step"
    )
    resumed = train(config(tmp_path / "run", resume=True))
    assert resumed.steps == 10


def test_a_batch_that_cannot_be_read_ends_the_run_and_a_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens lie on a disk that fails: the fault is told, nothing of the step is kept."""
    real = PackedDataset.batch

    def failing(self: PackedDataset, position: int, count: int) -> Any:
        if position >= 10:
            raise OSError(5, "Input/output error", "train.bin")
        return real(self, position, count)

    monkeypatch.setattr(PackedDataset, "batch", failing)
    with pytest.raises(OSError, match="Input/output error"):
        train(config(tmp_path / "run"))
    monkeypatch.undo()
    train(config(tmp_path / "run", resume=True))
    train(config(tmp_path / "whole"))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_tokens_cut_short_behind_our_back_are_noticed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    first = train(config(tmp_path / "first", steps=2))
    (file,) = (tmp_path / "cache" / "tokens").glob("*/train.bin")
    file.write_bytes(file.read_bytes()[:-64])
    again = train(config(tmp_path / "again", steps=2))
    assert again.loss == first.loss
    assert fingerprint(tmp_path / "first") == fingerprint(tmp_path / "again")


def test_data_that_is_no_longer_there_on_resume_is_named(tmp_path: Path) -> None:
    text = shutil.copy(corpus(), tmp_path / "text.jsonl")
    train(config(tmp_path / "run", steps=3, source=str(text), schedule="constant"))
    Path(text).unlink()
    with pytest.raises(InputError, match=r"data: .*text\.jsonl' does not exist"):
        train(config(tmp_path / "run", steps=5, source=str(text), schedule="constant", resume=True))
    assert (tmp_path / "run" / "checkpoints" / "step-3").exists()
