"""What a step does, counted and not timed: operations dispatched or kernels launched, products, calls of our own kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tare.kernels import library
from tare.report.bench_rows import Contender


class Counting(TorchDispatchMode):
    """Counts operations that do work, views and empty tensors left out, and the floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "detach", "alias", "_unsafe_view")):
            self.operations += 1
        self.flops += _flops(name.removesuffix("_"), args)
        return func(*args, **(kwargs or {}))


def _flops(name: str, args: tuple[Any, ...]) -> int:
    """2 m k n for every product; a matrix times a vector counts as n = 1."""
    at = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}.get(name)
    if at is None:
        return 0
    left, right = args[at], args[at + 1]
    return 2 * left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


class _Calls:
    """Our C++ library, counting the calls of its functions, which no dispatcher sees."""

    def __init__(self, native: Any) -> None:
        self._native, self.calls = native, 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._native, name)

        def call(*args: Any) -> Any:
            self.calls += 1
            return function(*args)

        return call


@contextmanager
def _watched() -> Iterator[Callable[[], int]]:
    native = library.load()
    if native is None:
        yield lambda: 0
        return
    counting = _Calls(native)
    with mock.patch.object(library, "load", return_value=counting):
        yield lambda: counting.calls


def probe(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Counts of one ordinary step.

    `launches`: on a GPU kernels, copies and fills by torch's profiler; on the CPU operations dispatched and calls of our own C++
    kernels, None where the step is compiled. `flops`: of its matrix products, None where unknown.
    """
    if device.type == "cuda":
        flops = None
        if not contender.graphs:
            counting = Counting()
            with counting:
                contender.step()
            flops = counting.flops
        return {"launches": _launches(contender), "own_kernels": None, "flops": flops}
    if contender.graphs:  # a dispatch mode would turn the compiled code off
        contender.step()
        return {"launches": None, "own_kernels": None, "flops": None}
    counting = Counting()
    with _watched() as own, counting:
        contender.step()
    return {"launches": counting.operations + own(), "own_kernels": own(), "flops": counting.flops}


def _launches(contender: Contender) -> int:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        contender.step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events() or ())
