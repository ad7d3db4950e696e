"""The seed log of a run: `run.seeds` in its folder, from which `tare replay` makes the trained model again out of its base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tare.core.errors import InputError
from tare.zeroth.log import SeedLog
from tare.zeroth.record import Record

NAME = "run.seeds"


class RunLog:
    """Writes the steps of a run where that is possible, and says why where it is not. Give it to the optimizer as `on_step`.

    Args:
        path: the file; steps in it beyond the optimizer's are taken again.
        tell: called with a line where no log can be written.
    """

    def __init__(self, path: Path, tell: Callable[[str], Any]) -> None:
        self._log: SeedLog | None = SeedLog(path, overwrite=True)
        self._tell = tell

    def begin(self, optimizer: Any) -> None:
        """Called by the optimizer before the first step."""
        assert self._log is not None
        try:
            self._log.begin(optimizer)
        except InputError as fault:
            self._log = None
            self._tell(f"no seed log: {fault}")

    def __call__(self, record: Record) -> None:
        if self._log is not None:
            self._log(record)

    def sync(self) -> None:
        """Make the steps durable; before a checkpoint that counts on them."""
        if self._log is not None:
            self._log.sync()

    def close(self, seal: bool) -> None:
        """Close the file. seal: with the digest of the weights as they are now, the run being at its end."""
        if self._log is not None:
            self._log.close(seal)
