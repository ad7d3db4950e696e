"""Saving beside the training: what is saved is the state as it was, one save at a time, and no fault goes unheard."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tare
from tare.core.errors import CheckpointError
from tare.train import checkpoint, integrity, saving, tensorfile
from tare.train.saving import SMALL, Saver, in_background

TRAINER: dict[str, Any] = {"counters": {"step": 1}}


@pytest.fixture
def job() -> tuple[nn.Module, tare.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(9, 7)
    optimizer = tare.AdamW(model, lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.randn(3, 9)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writers wait for this."""
    gate, real = threading.Event(), tensorfile.write

    def slow(*given: Any) -> dict[str, Any]:
        assert gate.wait(20)
        return real(*given)

    monkeypatch.setattr(tensorfile, "write", slow)
    return gate


def bits(snapshot: checkpoint.Snapshot) -> list[bytes]:
    tensors = [*snapshot.weights.values(), *checkpoint.flatten(snapshot.optimizer)[1].values()]
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def test_what_is_saved_is_the_state_at_the_request(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = job
    Saver(tmp_path / "sync", model, optimizer, background=False).save(1, TRAINER)
    gate = held_back(monkeypatch)
    saver = Saver(tmp_path / "async", model, optimizer)
    saver.save(1, TRAINER)
    for _ in range(3):
        step(model, optimizer)
    assert saver.finished() == []
    assert checkpoint.found(tmp_path / "async") == []
    gate.set()
    assert saver.close() == [(1, tmp_path / "async" / "step-1")]
    then, now = (checkpoint.load_latest(tmp_path / name) for name in ("sync", "async"))
    assert then is not None
    assert now is not None
    assert bits(then) == bits(now)
    assert now.optimizer["state"][0]["step"] == 1
    assert not torch.equal(now.weights["weight"], model.weight)


def test_the_next_save_waits_for_the_one_before_and_uses_its_memory(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = job
    gate = held_back(monkeypatch)
    saver = Saver(tmp_path / "c", model, optimizer)
    saver.save(1, TRAINER)
    first = {name: tensor.data_ptr() for name, tensor in saver._buffers.items()}
    threading.Timer(0.2, gate.set).start()
    began = time.monotonic()
    saver.save(2, TRAINER)
    assert time.monotonic() - began > 0.15
    assert {name: tensor.data_ptr() for name, tensor in saver._buffers.items()} == first
    assert [number for number, _ in saver.close()] == [1, 2]
    assert saver._buffers == {}
    assert [number for number, _ in checkpoint.found(tmp_path / "c")] == [2, 1]


@pytest.mark.parametrize("look", ["finished", "save", "close"])
def test_a_fault_of_the_background_is_raised_at_the_next_look_once(
    look: str, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path / "c", *job)
    saver.save(1, TRAINER)
    saver.wait()
    monkeypatch.setattr(tensorfile, "write", full)
    saver.save(2, TRAINER)
    saver.wait()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"step-2: could not be saved: no space left.*saved before is intact"):
        saver.save(3, TRAINER) if look == "save" else getattr(saver, look)()
    assert saver.close() == [(1, tmp_path / "c" / "step-1")]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-1"]
    integrity.verify(tmp_path / "c" / "step-1")


def test_a_fault_that_nobody_thought_of_is_no_silence(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path / "c", *job)
    monkeypatch.setattr(integrity, "seal", lambda *given: 1 / 0)
    saver.save(1, TRAINER)
    with pytest.raises(CheckpointError, match="could not be saved: ZeroDivisionError"):
        saver.close()


def test_what_cannot_be_saved_is_known_before_the_thread(job: Any, tmp_path: Path) -> None:
    model, optimizer = job
    with pytest.raises(TypeError, match="trainer state holds tensors: rng"):
        Saver(tmp_path / "c", model, optimizer).save(1, {"rng": torch.zeros(1)})
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"phase: a tensor of torch\.complex64"):
        Saver(tmp_path / "c", model, optimizer).save(1, TRAINER)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("mode", "device", "budget", "copy", "beside"),
    [
        ("auto", "cpu", None, 4 << 30, True),
        ("auto", "cpu", None, (4 << 30) + 1, False),
        ("auto", "cpu", "2GiB", SMALL, True),
        ("auto", "cpu", "2GiB", SMALL + 1, False),
        ("auto", "cuda", "2GiB", 4 << 30, True),
        ("auto", "cuda", "2GiB", (4 << 30) + 1, False),
        ("always", "cpu", "2GiB", 1 << 40, True),
        ("never", "cuda", None, 1, False),
    ],
)
def test_a_budget_on_the_cpu_is_not_broken_by_the_copy_nor_the_host_filled(
    mode: Any, device: str, budget: Any, copy: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "memory_of", lambda _: 16 << 30)
    assert in_background(mode, torch.device(device), budget, copy) is beside
