"""The measured peak of a real training step: allocator events on the CPU, the allocator's own statistics on CUDA.

CPU: torch's profiler reports each block that the allocator hands out or takes back during the window, workspace inside
operators included. The peak is the running sum of these, on top of the tensors that were alive when the window opened.
Blocks that a thread of gloo is the last to let go of are freed unseen (it looks at threads that run Python or autograd): with FSDP2 on the
CPU, what was gathered of a block now and then counts as alive for longer than it was.
"""

import os
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch
from torch import nn
from torch.autograd.profiler import profile, record_function

from tare.core.shard.layout import is_sharded, local
from tare.core.weights import plain_parts

_FREED = "tare.freed "  # followed by the address of a block that was alive before the window


class StepMeter:
    """Measures what one step needs at its highest point.

    Args:
        model: its parameters, buffers and gradients count as alive from the start.
        optimizer: so does its state.
        device: where the model lives; default: of its first parameter.
        extra: further tensors alive from the start, such as the batch.

    After the `with` block `peak` and `baseline` hold bytes. Costs about a tenth of the step's time on the CPU.

    >>> layer = nn.Linear(64, 64, bias=False)
    >>> with StepMeter(layer) as meter:
    ...     both = torch.zeros(64, 64), torch.zeros(64, 64)  # two blocks of 16 KiB on top of the weight's
    >>> meter.baseline, meter.peak
    (16384, 49152)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        device: torch.device | str | None = None,
        extra: Iterable[torch.Tensor] = (),
    ) -> None:
        self._model, self._optimizer, self._extra = model, optimizer, tuple(extra)
        first = next(model.parameters(), None)
        self._device = torch.device(device) if device is not None else first.device if first is not None else None
        self._watch: list[weakref.ref] = []
        self._alive: dict[int, int] = {}
        self.baseline = 0
        self.peak = 0

    def __enter__(self) -> "StepMeter":
        if self._on_cuda():
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.baseline = torch.cuda.memory_allocated(self._device)
            return self
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes start and stop lines to stderr
        for tensor in self._before():
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in self._alive:
                self._alive[address] = storage.nbytes()
                self._watch.append(weakref.ref(storage, _marker(address)))
        self.baseline = sum(self._alive.values())
        self._profile = profile(profile_memory=True).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_cuda():
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
            return
        self._profile.__exit__(kind, fault, trace)
        self._watch.clear()
        if kind is None:
            self.peak = _replay(self._profile, self._alive)
        del self._profile

    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _before(self) -> Iterator[torch.Tensor]:
        return map(local, self._held())  # of what ranks share, what this one has

    def _held(self) -> Iterator[torch.Tensor]:
        for parameter in self._model.parameters():
            yield from plain_parts("", local(parameter.detach()) if is_sharded(parameter) else parameter).values()
            if parameter.grad is not None:
                yield parameter.grad
        yield from self._model.buffers()
        yield from self._extra
        for state in self._optimizer.state.values() if self._optimizer else ():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _marker(address: int):  # type: ignore[no-untyped-def]  # a weakref callback
    def mark(_: object) -> None:
        with record_function(f"{_FREED}{address}"):
            pass

    return mark


def _replay(window: profile, alive: dict[int, int]) -> int:
    """The highest sum of live blocks. The profiler is silent about freeing blocks that are older than itself
    (a replaced basis, old gradients), hence the marks; and not silent if an earlier window saw them, hence addresses."""
    alive = dict(alive)
    now = peak = sum(alive.values())
    for event in _events(window):
        if event.name.startswith(_FREED):
            now -= alive.pop(int(event.name[len(_FREED) :]), 0)
            continue
        fields = event.extra_fields
        if event.name != "[memory]" or fields.device.type != "cpu":
            continue
        if fields.alloc_size > 0:
            now += fields.alloc_size - alive.pop(fields.ptr, 0)  # still listed: freed without a mark
            alive[fields.ptr] = fields.alloc_size
            peak = max(peak, now)
        else:
            now -= alive.pop(fields.ptr, 0)
    return peak


def _events(window: profile) -> list:
    results = window.kineto_results
    assert results is not None
    found, todo = [], list(results.experimental_event_tree())
    while todo:
        event = todo.pop()
        found.append(event)
        todo.extend(event.children)
    return sorted(found, key=lambda event: event.start_time_ns)
