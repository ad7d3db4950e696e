"""One of two workers of a run, in a process of its own; light to import, since each such process does."""

import json
import os
from pathlib import Path
from typing import Any

from tare.train import loop, progress
from tare.train.config import RunConfig


def worker(job: RunConfig, rank: int, port: int, notes: Path, fault: str) -> None:
    """One of two. notes: what it came to is put there. fault: what goes wrong in it, and in which step."""
    launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**launched, "MASTER_PORT": str(port)})
    events: list[Any] = []

    def listen(event: Any) -> None:
        events.append(type(event).__name__)
        if isinstance(event, progress.StepDone) and fault == f"own@{event.step}":
            raise ValueError("the screen is full")

    if fault.startswith(("batch@", "die@")):
        from tare.train.data import PackedDataset

        real, at = PackedDataset.batch, 2 * int(fault.split("@")[1])

        def batch(self: Any, position: int, count: int) -> Any:
            if position == at:
                if fault.startswith("die"):
                    os.kill(os.getpid(), 9)
                raise KeyError("no such row")
            return real(self, position, count)

        PackedDataset.batch = batch  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    try:
        done = loop.train(job, on_event=listen)
        found = {"sent": done.sent, "workers": done.workers, "forwards": done.forwards}
    except Exception as error:
        found = {"kind": type(error).__name__, "text": str(error)}
    (notes / f"{rank}.json").write_text(json.dumps({**found, "events": events}))
