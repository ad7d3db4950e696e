"""Signs of life between the processes of a run: one that hangs is named, and the others end instead of waiting for it for ever.

A collective operation that waits cannot say for whom. So a thread of each process counts in the group's store, and watches the others do
so. It shows that a process is scheduled at all (not stopped, swapped out, its machine not gone), however long its own work takes.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import distributed as dist

FAREWELL = "bye"  # of a process that is through; the others may go on
_here: "Heartbeat | None" = None  # of this process


class Heartbeat:
    """Counts in a store and watches the next process, the last one the first: so the cost does not grow with their number.

    Args:
        store: with `set`, `check` and `get`, for this object alone (a clone).
        rank, size: of this process, and how many there are.
        patience: seconds without a sign of life.
        gone: called once, in a thread, with a line that names the silent one.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float, gone: Callable[[str], None]) -> None:
        self.store, self.rank, self.patience, self.gone = store, rank, patience, gone
        self.watched, self.step = (rank + 1) % size, 0
        self._pause = min(1.0, patience / 5)
        self._end = threading.Event()
        self._said = ""
        self._heard = self._answered = time.monotonic()  # from the one watched; from the store
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Say farewell, and stop."""
        self._end.set()
        self._threads[0].join(2 * self._pause)

    def _beat(self) -> None:
        count = 0
        with suppress(Exception):  # of the store, whose silence the other thread notices
            while not self._end.wait(self._pause):
                count += 1
                self.store.set(_key(self.rank), f"{count} {self.step}")
                if self.store.check([_key(self.watched)]):
                    said = self.store.get(_key(self.watched)).decode()
                    if said != self._said or said == FAREWELL:
                        self._said, self._heard = said, time.monotonic()
                self._answered = time.monotonic()
            self.store.set(_key(self.rank), FAREWELL)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self._pause):
            now = time.monotonic()
            if (
                now - before > 3 * self._pause + 1.0
            ):  # this process itself stood still: the other is given its time again
                self._heard = self._answered = now
            before = now
            silent = f"gave no sign of life for {self.patience:g} s"
            if now - self._answered > self.patience:
                self.gone(f"the store of the group (worker 0, or what has launched all) {silent}")
                return
            if now - self._heard > self.patience:
                last = f"last heard of in step {self._said.split()[1]}" if self._said else "never heard of"
                self.gone(f"worker {self.watched} {silent} ({last}, worker {self.rank} is in step {self.step})")
                return


@contextmanager
def beating(patience: float) -> Iterator[None]:
    """While inside, the processes of the group watch each other; one that falls silent ends this process. 0: they do not."""
    global _here
    if not patience or _here is not None or not dist.is_initialized() or dist.get_world_size() < 2:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()  # a clone may be used from another thread
    _here = Heartbeat(store.clone(), dist.get_rank(), dist.get_world_size(), patience, _leave)
    try:
        yield
    finally:
        _here.close()
        _here = None


def note(step: int) -> None:
    """Let the others know in which step this process is."""
    if _here is not None:
        _here.step = step


def _key(rank: int) -> str:
    return f"tare/alive/{rank}"


def _leave(text: str) -> None:
    """End the process from a thread: its main thread waits in an operation that cannot be broken off. Files are whole at any moment."""
    print(f"tare: {text}; go on from the last checkpoint with --resume", file=sys.stderr, flush=True)
    os._exit(1)
