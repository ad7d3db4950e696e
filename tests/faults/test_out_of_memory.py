"""F15: memory that is refused in a step ends the run with one line of advice; checkpoints stay, and the advice is of use."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import CONTEXT, config, fingerprint

from tare.train import loop, progress, step
from tare.train.config import RunConfig
from tare.train.loop import train
from tare.train.memory_advice import OutOfMemory, refusal

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error "
    "code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 2.00 GiB is free. More."
)


def starved(job: RunConfig, notes: Path, room: int) -> None:
    """Trains in a process that may map so many bytes more once everything is built; notes what became of it."""

    def limit(event: progress.Event) -> None:
        if isinstance(event, progress.Started):
            mapped = next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")
            )
            size = int(mapped.split()[1]) * 1024 + room
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

    try:
        loop.train(job, on_event=limit)
    except Exception as fault:
        notes.write_text(json.dumps({"kind": type(fault).__name__, "text": str(fault)}))
        raise SystemExit(3) from None


def test_a_process_without_memory_ends_with_advice_and_its_checkpoint(tmp_path: Path) -> None:
    out, notes = tmp_path / "run", tmp_path / "notes.json"
    train(config(out, steps=3, schedule="constant"))
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    greedy = config(out, steps=6, schedule="constant", batch=256, resume=True)
    process = CONTEXT.Process(target=starved, args=(greedy, notes, 24 << 20))
    process.start()
    process.join(120)
    assert process.exitcode == 3
    found = json.loads(notes.read_text())
    assert found["kind"] == "OutOfMemory"
    text = found["text"]
    assert text.startswith("step 4: out of memory (")
    assert "\n" not in text
    assert "the plan says" in text
    assert "--checkpointing" in text
    assert "checkpoints up to step 3 are intact" in text
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before
    assert not (out / "run.lock").exists()
    assert train(config(out, steps=6, schedule="constant", resume=True)).steps == 6
    train(config(tmp_path / "whole", steps=6, schedule="constant"))
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fault", "where"), [(CPU, "step"), (CUDA, "step"), (MemoryError(), "evaluation")], ids=["cpu", "cuda", "python"]
)
def test_plan_measured_and_advice(
    fault: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = step.take_step, []

    def failing(job: Any, position: int) -> Any:
        asked.append(position)
        if len(asked) == 3:
            raise fault
        return real(job, position)

    def refused(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(
        f"tare.train.trainer.{'take_step' if where == 'step' else 'evaluate'}", failing if where == "step" else refused
    )
    with pytest.raises(OutOfMemory) as caught:
        train(config(tmp_path / "run", batch=8, eval_every=2))
    text = str(caught.value)
    assert text.startswith("step 3: out of memory (")
    planned, limit, least = (
        text.partition(words)[2].split()[0] for words in ("the plan says ", "; for ", "--checkpointing (")
    )
    assert "were measured; for" in text
    assert float(least) <= float(limit) <= float(planned) * 7 / 8 + 0.01  # all in MiB, rounded
    assert "the smallest change that fits: --method adamw --checkpointing (" in text


def test_other_faults_are_not_taken_for_it() -> None:
    assert refusal(RuntimeError("expected scalar type Float")) is None
    assert refusal(ValueError("can't allocate memory")) is None
    assert refusal(CUDA) == "CUDA out of memory. Tried to allocate 20.00 GiB"
    assert refusal(MemoryError()) == "no memory left"
