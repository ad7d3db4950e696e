"""F8: a batch that throws the loss up. The run goes back to its checkpoint, leaves that stretch of data out, and is from there on the run
that never saw it, bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import config, fingerprint

from tare.train import checkpoint, metrics, progress
from tare.train.config import RunConfig
from tare.train.data import PackedDataset
from tare.train.loop import Result, train
from tare.train.spikes import spike_of
from tare.train.trainer import Diverged

BATCH = 2
REAL = PackedDataset.batch
BASE: dict[str, Any] = {
    "steps": 14, "batch": BATCH, "checkpoint_every": 4, "eval_every": 6, "schedule": "constant", "spike_memory": 5,
}  # fmt: skip


def poisoned(*steps: int) -> Any:
    """Batches whose positions were meant for these steps (from 1) hold one rare token over and over."""
    bad = {BATCH * (step - 1) for step in steps}

    def batch(self: PackedDataset, position: int, count: int) -> torch.Tensor:
        found = REAL(self, position, count)
        return torch.full_like(found, 7) if position in bad else found

    return batch


def without(first: int, last: int) -> Any:
    """The data from which the sequences first .. last - 1 have been taken out."""

    def batch(self: PackedDataset, position: int, count: int) -> torch.Tensor:
        return REAL(self, position + (last - first if position >= first else 0), count)

    return batch


def run(out: Path, patch: pytest.MonkeyPatch, batch: Any, method: str = "adamw", **changes: Any) -> Result:
    patch.setattr(PackedDataset, "batch", batch)
    return train(config(out, method, **{**BASE, **changes}))


def lines(out: Path, *events: str) -> list[dict[str, Any]]:
    timeless = ("seconds", "forwards")
    found = metrics.read(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timeless} for line in found if line["event"] in events]


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"lr": 3e-3}),
    ("galore", {"lr": 3e-2, "rank": 8, "options": {"period": 3}, "release": True, "clip_mode": "previous"}),
    ("apollo", {"lr": 3e-2, "rank": 8, "options": {"period": 3}}),
    ("badam", {"lr": 3e-3, "options": {"period": 3}}),
    ("adamw-8bit", {"lr": 3e-3}),
    ("mezo", {"lr": 1e-4}),
]


DEFAULT = ("adamw", "galore", "mezo")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "changes"),
    [pytest.param(*form, id=form[0], marks=() if form[0] in DEFAULT else SLOW) for form in FORMS],
)
def test_after_the_way_back_it_is_the_run_that_never_saw_the_stretch(
    method: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checkpoint is of step 8, the spike comes in step 11: sequences 16 to 21 are left out.
    out = tmp_path / "run"
    done = run(out, monkeypatch, poisoned(11), method, spike=6.0, **changes)
    run(tmp_path / "never", monkeypatch, without(16, 22), method, **changes)
    back = lines(out, "rollback")
    assert [(line["step"], line["spiked"], line["left_out"]) for line in back] == [(8, 11, [16, 22])]
    assert fingerprint(out) == fingerprint(tmp_path / "never")
    assert lines(out, "step", "eval") == lines(tmp_path / "never", "step", "eval")
    assert done.steps == 14
    if method == "mezo":
        assert (out / "run.seeds").read_bytes() == (tmp_path / "never" / "run.seeds").read_bytes()


def test_a_kill_on_either_side_of_the_way_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"lr": 3e-3, "spike": 6.0}
    run(tmp_path / "whole", monkeypatch, poisoned(11), **changes)
    for name, stops in (("before", [10]), ("after", [9]), ("later", [13])):
        out, seen = tmp_path / name, list[int]()

        def listen(event: progress.Event, stops: list[int] = stops, seen: list[int] = seen, name: str = name) -> None:
            if isinstance(event, progress.StepDone):
                seen.append(event.step)
                if event.step == stops[0] and (name != "after" or seen.count(9) == 2):
                    os.kill(os.getpid(), signal.SIGTERM)

        assert train(config(out, **{**BASE, **changes}), on_event=listen).interrupted
        saved = checkpoint.load_latest(out / "checkpoints")
        assert saved is not None
        assert saved.trainer["counters"]["rollbacks"] == (name != "before")
        train(config(out, resume=True, **{**BASE, **changes}))
        # What was saved at the interrupt is a checkpoint to go back to, so `before` leaves out less.
        assert (fingerprint(out) == fingerprint(tmp_path / "whole")) == (name != "before")
        assert [line["spiked"] for line in lines(out, "rollback")] == [11]


def test_off_by_default_and_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunConfig().train.spike is None
    run(tmp_path / "run", monkeypatch, poisoned(11), lr=3e-3)
    assert not lines(tmp_path / "run", "rollback")
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.trainer["counters"]["recent"] == []


def test_ways_back_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All data after the checkpoint are bad: it goes back twice, each time past more of them, then stops; the checkpoint is intact."""
    out = tmp_path / "run"
    with pytest.raises(Diverged, match=r"after going back to step 8 2 times \(train\.spike_limit\); lower method\.lr"):
        run(out, monkeypatch, poisoned(*range(9, 99)), lr=3e-3, spike=6.0, spike_limit=2)
    assert [line["left_out"] for line in lines(out, "rollback")] == [[16, 18], [16, 20]]
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-4", "step-8"]
    assert run(out, monkeypatch, REAL, lr=3e-3, spike=6.0, resume=True).steps == 14


def test_without_a_checkpoint_it_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert run(out, monkeypatch, poisoned(11), lr=3e-3, spike=6.0, checkpoint_every=100).steps == 14
    assert not lines(out, "rollback")
    assert [line["step"] for line in lines(out, "warning") if "no checkpoint yet" in line["text"]] == [11]


def test_what_a_spike_is() -> None:
    recent = [4.0, 3.9, 4.1, 4.05, 3.95]
    assert spike_of(4.3, recent, 6.0) is None
    found = spike_of(5.0, recent, 6.0)
    assert found is not None
    assert found.usual == 4.0
    assert spike_of(1.0, recent, 6.0) is None  # falling is no fault
    assert spike_of(4.001, [4.0] * 5, 6.0) is None  # by rounding
    assert spike_of(4.1, [4.0] * 5, 6.0) is not None
    assert spike_of(0.0, [0.0] * 5, 6.0) is None
    assert spike_of(9.0, [*recent[:3], 90.0, 80.0], 6.0) is not None  # former outliers do not hide it
