"""`metrics.jsonl`: one JSON object a line, appended as the run goes, and cut back to the resumed step on resume.

Every line has `event` (`step`, `eval`, `memory`, `skip`, `checkpoint`, `resume`, `rollback`, `warning`) and `step`, the number of steps
finished when it was written. Touches only its file (and TensorBoard's, when asked for).
"""

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from tare.core.errors import CheckpointError, InputError
from tare.train.cache import write_atomic

NAME = "metrics.jsonl"


class Metrics:
    """The open log of one run."""

    def __init__(self, path: Path, tensorboard: bool = False, step: int = 0) -> None:
        """Open for appending; TensorBoard then forgets what it was told of steps after `step`."""
        self._path, self._board = path, tensorboard
        self._open(step)

    def _open(self, step: int) -> None:
        path = self._path
        try:
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        except OSError as fault:
            raise CheckpointError(f"{path}: cannot be written: {fault.strerror}") from fault
        self._writer = writer_class()(str(path.parent / "tensorboard"), purge_step=step + 1) if self._board else None

    def cut(self, step: int, evaluated: int) -> None:
        """Drop what is about to come again, as `truncate` does, and go on behind it."""
        self.close()
        truncate(self._path, step, evaluated)
        self._open(step)

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append one line and hand it to the system at once. Numbers that are not finite become null: JSON has none."""
        line = {"event": event, "step": step, **{key: _plain(value) for key, value in values.items()}}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as fault:
            raise CheckpointError(f"{self._file.name}: cannot be written: {fault.strerror}") from fault
        if self._writer is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    self._writer.add_scalar(f"{event}/{key}", value, step)
        return line

    def sync(self) -> None:
        """Make the lines durable; called before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class Silent:
    """The log of a worker that is not the first: none."""

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Nothing is written."""
        return {}

    def cut(self, step: int, evaluated: int) -> None:
        """Nothing to do."""

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. A torn last line, left by a kill, is no line; a broken one elsewhere is skipped too."""
    lines = []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    for raw in data.split(b"\n")[:-1]:  # what follows the last newline is torn, or empty
        if (line := parsed(raw)) is not None:
            lines.append(line)
    return lines


def parsed(raw: bytes) -> dict[str, Any] | None:
    """One line of a log; None where it is none."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) and "event" in line else None


def truncate(path: Path, step: int, evaluated: int) -> None:
    """Drop what was logged after `step` finished steps, and evaluations after step `evaluated`: they are about to come again.

    Atomic, so that a kill leaves the old file or the new one. Raises `CheckpointError` where it cannot be written.
    """
    if path.exists():
        kept = [line for line in read(path) if line["step"] <= (evaluated if line["event"] == "eval" else step)]
        try:
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        except OSError as fault:
            raise CheckpointError(f"{path}: cannot be written: {fault.strerror}") from fault


def writer_class() -> Any:
    """TensorBoard's writer. Raises `InputError`, naming the extra, where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            'run.tensorboard: TensorBoard is not installed; pip install "tare[tensorboard]", or leave the setting off'
        ) from None
    return SummaryWriter


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
