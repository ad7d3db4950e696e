"""SIGINT and SIGTERM as a wish: the first asks the run to stop after its step, the second ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While inside, `stop` says whether the run has been asked to stop; handlers are put back on exit.

    Only the main thread may set handlers; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.stop = False
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            os._exit(128 + number)  # nothing to clean: every file is whole or still under its temporary name
        self.stop = True
