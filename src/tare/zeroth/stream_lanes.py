"""Lanes: several runs of a closure that take turns at every block, so that a block that is there serves all of them.

Each lane is a thread, but only one runs at any time: a lane goes on until it reaches a gate, and waits there until all others have come
as far. What torch keeps for each thread (no_grad, autocast, CUDA's device and stream) is as in the caller's.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


class Abandoned(BaseException):
    """Raised at the gate of a lane when another one has failed, so that it unwinds."""


class Lanes:
    """`run` gives the results of all `runs`, in order; inside of them `gate` hands on.

    The first lane is the caller's thread. enter, leave: told the number of the lane that begins or goes on, and of the one that stops.
    """

    def __init__(
        self, runs: list[Callable[[], Any]], enter: Callable[[int], None], leave: Callable[[int], None]
    ) -> None:
        self._runs, self._enter, self._leave = runs, enter, leave
        self._results: list[Any] = [None] * len(runs)
        self._turns = [threading.Semaphore(0) for _ in runs]
        self._threads: dict[int, threading.Thread] = {}
        self._done: set[int] = set()
        self._now = 0
        self._fault: BaseException | None = None

    def run(self) -> list[Any]:
        """Raises what the first lane to fail raised, when all have stopped."""
        self._setting = ambient()
        self._lane(0)
        while len(self._done) < len(self._runs):
            self._wait(0)
        for thread in self._threads.values():
            thread.join()
        if self._fault is not None:
            raise self._fault
        return self._results

    def gate(self) -> None:
        """Let every other lane come to its next gate; called by the lane that runs."""
        me, other = self._now, self._next()
        if other is None:
            return
        self._leave(me)
        self._hand(other)
        self._wait(me)
        if self._fault is not None:
            raise Abandoned
        self._enter(me)

    def _lane(self, number: int) -> None:
        try:
            self._enter(number)
            self._results[number] = self._runs[number]()
        except BaseException as error:
            if not isinstance(error, Abandoned) and self._fault is None:
                self._fault = error
        finally:
            self._leave(number)
            self._done.add(number)
            other = self._next()
            if other is not None:
                self._hand(other)
            elif number:
                self._turns[0].release()

    def _next(self) -> int | None:
        """Whose turn it is: after a fault nobody begins, and those that wait unwind."""
        count = len(self._runs)
        for step in range(1, count):
            other = (self._now + step) % count
            begun = other == 0 or other in self._threads
            if other not in self._done and not begun and self._fault is not None:
                self._done.add(other)
            if other not in self._done:
                return other
        return None

    def _hand(self, other: int) -> None:
        self._now = other
        if other and other not in self._threads:
            context = contextvars.copy_context()
            self._threads[other] = threading.Thread(target=context.run, args=(self._begin, other), daemon=True)
            self._threads[other].start()
        else:
            self._turns[other].release()

    def _begin(self, number: int) -> None:
        with self._setting():
            self._lane(number)

    def _wait(self, me: int) -> None:
        """Until it is its turn. An interrupt meanwhile waits for it too, and then stops everything: nothing runs beside the unwinding."""
        while True:
            try:
                self._turns[me].acquire()
                return
            except BaseException as error:
                self._fault = self._fault or error


def ambient() -> Callable[[], Any]:
    """A context for another thread that stands as this one does."""
    grad = torch.is_grad_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in ("cpu", "cuda")
        if kind == "cpu" or torch.cuda.is_available()
    ]
    cache = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def standing() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in casts:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype, True, cache))
            if stream is not None:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return standing


def alone_because() -> str:
    """Why runs in this thread cannot be taken to others; empty where they can."""
    if torch.is_inference_mode_enabled():
        return "inference mode is on"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode of torch is on"
    return ""
