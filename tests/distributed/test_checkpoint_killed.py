"""kill -9 of either rank at every stage of a sharded save, beside the training or not: the previous checkpoint or the new one, no mix."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import work_checkpoint as work
from processes import CONTEXT

from tare.train import checkpoint, integrity

# rank, stage, whether the new checkpoint is there afterwards
STAGES = [
    (0, "before_write:weights-00001-of-00002.safetensors@2", False),
    (1, "before_write:weights-00002-of-00002.safetensors@2", False),
    (0, "after_write:weights-00001-of-00002.safetensors@2", False),
    (1, "after_fsync:weights-00002-of-00002.safetensors@2", False),
    (0, "after_fsync:optimizer-00001-of-00002.safetensors@2", False),
    (1, "after_write:optimizer-00002-of-00002.safetensors@2", False),
    (1, "after_fsync:optimizer-00002-of-00002.safetensors@2", False),
    (0, "after_write:layout.json@2", False),
    (0, "after_fsync:trainer.json@2", False),
    (0, "after_write:manifest@2", False),
    (0, "before_rename@2", False),
    (0, "after_rename@2", True),
    (0, "after_commit@2", True),
    (0, "during_delete@1", True),
]
SHORT = (3, 22)  # these of the cases below in the default tests: in the background, and at once


def run(rank: int, store: str, folder: str, doomed: int, stage: str, beside: bool) -> None:
    """Two saves, at steps 2 and 4, and a third."""
    if rank == doomed:
        os.environ["TARE_FAIL_AT"] = stage
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work.three_saves(Path(folder), beside)


CASES = [(*case, beside) for case in STAGES for beside in (False, True)]


@pytest.mark.parametrize(
    ("doomed", "stage", "new", "beside"),
    [pytest.param(*case, marks=() if n in SHORT else pytest.mark.slow) for n, case in enumerate(CASES)],
)
def test_a_killed_rank_leaves_the_previous_or_the_new_checkpoint(
    doomed: int, stage: str, new: bool, beside: bool, tmp_path: Path, tally: Any
) -> None:
    processes = [
        CONTEXT.Process(target=run, args=(rank, str(tmp_path / "store"), str(tmp_path / "c"), doomed, stage, beside))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[doomed].join(60)
    assert processes[doomed].exitcode == -signal.SIGKILL
    processes[1 - doomed].join(30)
    third = stage.startswith("during_delete")  # of the oldest, when all have saved the third and the other rank is done
    assert processes[1 - doomed].exitcode is not None, "a rank waits for ever"
    assert third or processes[1 - doomed].exitcode != 0, "a rank went on alone"

    snapshot = checkpoint.load_latest(tmp_path / "c")
    assert snapshot is not None
    assert snapshot.skipped == ()
    assert snapshot.step == (6 if third else 4 if new else 2)
    model, optimizer = work.job("plain", "adamw")
    work.steps(model, optimizer, 0, snapshot.step)
    for name, p in model.named_parameters():
        assert (snapshot.weights[name] - p).abs().max() < 1e-12, "a mix of two steps"
        for raw in (snapshot.content.state[name],):
            assert raw["step"] == snapshot.step
    integrity.sweep(tmp_path / "c", ("step-",))
    assert all(checkpoint.step_of(path.name) is not None for path in (tmp_path / "c").iterdir())
    for step, path in checkpoint.found(tmp_path / "c"):
        checkpoint.load(path, step)
    tally("ranks killed within a save, nothing lost", 1)
