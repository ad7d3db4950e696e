"""Dice: the random numbers that a closure draws fall alike at every point of a step, and otherwise at the next step."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Dice:
    """The generators of torch (the CPU's and those of the CUDA devices given), Python and NumPy during one step.

    Every evaluation starts from where they stood before the step. `settle` leaves them as if the closure had run once, so a closure
    that draws nothing leaves them untouched, and no two steps share numbers.
    """

    def __init__(self, devices: Iterable[torch.device]):
        self._gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._before = self.look()
        self._after: tuple[Any, ...] | None = None
        self._fresh = True

    @contextmanager
    def throw(self) -> Iterator[None]:
        """Around one evaluation."""
        if not self._fresh:
            self.put(self._before)
        self._fresh = False
        yield
        if self._after is None:
            self._after = self.look()

    def settle(self, failed: bool = False) -> None:
        """After the last one; after a step that failed as before the first, so that it can be taken again."""
        if not self._fresh:
            self.put(self._before if failed or self._after is None else self._after)

    def look(self) -> tuple[Any, ...]:
        """Where the generators stand."""
        numpy = sys.modules.get("numpy")
        arrays = numpy.random.get_state() if numpy is not None else None
        gpus = [torch.cuda.get_rng_state(number) for number in self._gpus]
        return torch.get_rng_state(), gpus, random.getstate(), arrays

    def put(self, state: tuple[Any, ...]) -> None:
        """Back to what `look` saw."""
        host, gpus, python, arrays = state
        torch.set_rng_state(host)
        for number, one in zip(self._gpus, gpus, strict=True):
            torch.cuda.set_rng_state(one, number)
        random.setstate(python)
        if arrays is not None:
            sys.modules["numpy"].random.set_state(arrays)
