"""One of two processes of a run, in which something happens at a step: `die@3` kills it, `stop@3` stops it.

argv: a JSON object with `fault` and `notes` (a folder, so that a process that is started again does not do it again), and either the rest
of a job, or it is followed by the words of a command line.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from tare.train.data import PackedDataset


def arm(fault: str, notes: Path) -> None:
    """The fault happens in worker 1, when it takes the data of that step; once."""
    what, _, step = fault.partition("@")
    if not what or os.environ["RANK"] != "1":
        return
    real, at, done = PackedDataset.batch, 2 * (int(step) - 1), notes / f"{fault}.done"

    def batch(self: Any, position: int, count: int) -> Any:
        if position == at and not done.exists():
            done.touch()
            os.kill(os.getpid(), {"die": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
        return real(self, position, count)

    PackedDataset.batch = batch  # type: ignore[method-assign]


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    arm(job.pop("fault"), Path(job.pop("notes")))
    if job:
        from train_runs import config

        from tare.train.loop import train

        train(config(Path(job.pop("out")), "mezo", **job))
    else:
        from tare.cli.main import main

        sys.exit(main(sys.argv[2:]))
