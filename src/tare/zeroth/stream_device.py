"""Where blocks are brought to: a CUDA device, with transfers beside the computation, or a room on the host that only counts.

Both count every byte of weights that is there, and refuse what is more than they were given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.zeroth.stream_blocks import bytes_of


@dataclass
class Room:
    """Bytes on the device. limit: None for any number."""

    limit: int | None = None
    used: int = 0
    peak: int = 0

    def take(self, count: int, what: str) -> None:
        """Raises InputError where it would be more than the limit."""
        if self.limit is not None and self.used + count > self.limit:
            raise InputError(
                f"budget: {what} needs {count:,} bytes beside the {self.used:,} that are on the device, of {self.limit:,}; give a larger "
                "budget"
            )
        self.used += count
        self.peak = max(self.peak, self.used)

    def give(self, count: int) -> None:
        self.used -= count


@dataclass(eq=False)
class Slot:
    """Room for one block on the device. block: whose weights are here, or on their way."""

    views: list[Tensor] = field(default_factory=list)
    block: int | None = None
    fresh: bool = False  # brought, and not entered since
    last: int = 0  # when it was used
    filled: Any = None  # events on a CUDA device
    left: Any = None
    written: Any = None


class Host:
    """The device is a part of the host's memory: the plain twin of `Cuda`, and what tests count with. Transfers are real copies."""

    def __init__(self, device: torch.device, room: Room):
        self.device, self.room = device, room

    def home(self, weight: Tensor) -> Tensor:
        """A weight as it rests between steps."""
        return weight

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor that stays on the device."""
        return tensor

    def fit(self, slot: Slot, wanted: Sequence[Tensor]) -> None:
        """Give a slot tensors like those wanted; the same as before where they fit."""
        forms = [(w.dtype, w.shape, w.stride()) for w in wanted]
        if [(v.dtype, v.shape, v.stride()) for v in slot.views] == forms:
            return
        self.empty(slot)
        self.room.take(bytes_of(wanted), "a block")
        slot.views = [torch.empty_like(w, device=self.device, requires_grad=False) for w in wanted]

    def empty(self, slot: Slot) -> None:
        """Give its room back."""
        self.room.give(bytes_of(slot.views))
        slot.views, slot.block = [], None

    def bring(self, slot: Slot, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy (part of the slot, what rests on the host)."""
        for view, source in pairs:
            view.copy_(source)

    def enter(self, slot: Slot) -> None:
        """What is computed from here on finds the slot filled."""

    def write(self, slot: Slot, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy (home, part of the slot) back."""
        for home, view in pairs:
            home.copy_(view)

    def leave(self, slot: Slot) -> None:
        """What has been asked for so far is all that reads the slot."""

    def settle(self) -> None:
        """Wait until what was written back is there."""

    def describe(self) -> str:
        return "the host itself, which counts bytes"


class Cuda(Host):
    """Blocks rest in pinned memory; one stream brings, one writes back, and events keep them and the computation in order."""

    def __init__(self, device: torch.device, room: Room):
        super().__init__(device, room)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def home(self, weight: Tensor) -> Tensor:
        host = weight.cpu()
        return host if host.is_pinned() else host.pin_memory()

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def fit(self, slot: Slot, wanted: Sequence[Tensor]) -> None:
        before = slot.views
        super().fit(slot, wanted)
        if slot.views is not before:  # its memory may just have been left by what is still running
            self.leave(slot)

    def empty(self, slot: Slot) -> None:
        if slot.views:
            torch.cuda.synchronize(self.device)  # blocks of unequal shapes only
        super().empty(slot)

    def bring(self, slot: Slot, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for event in (slot.left, slot.written):
            if event is not None:
                self._up.wait_event(event)
        self._up.wait_stream(self._down)  # the source may be what is being written back
        with torch.cuda.stream(self._up):
            for view, source in pairs:
                view.copy_(source, non_blocking=True)
            slot.filled = self._up.record_event()

    def enter(self, slot: Slot) -> None:
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)

    def write(self, slot: Slot, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._down.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self._down):
            for home, view in pairs:
                home.copy_(view, non_blocking=True)
            slot.written = self._down.record_event()

    def leave(self, slot: Slot) -> None:
        slot.left = torch.cuda.current_stream(self.device).record_event()

    def settle(self) -> None:
        self._up.synchronize()
        self._down.synchronize()

    def describe(self) -> str:
        return f"{self.device}, from pinned memory, beside the computation"


def carrier(device: str | torch.device | None, budget: int | None) -> Host:
    """device: None for CUDA where there is one, else the host.

    Raises:
        InputError: a device that is none or is not there.
    """
    chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(chosen)
    except RuntimeError as error:
        raise InputError(f"device: {device!r} is none; give 'cuda', 'cuda:1' or 'cpu'") from error
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device: {found} cannot be streamed to here; expected cuda (with a GPU) or cpu")
    if found.type == "cuda":
        found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
        if budget is None:
            budget = torch.cuda.get_device_properties(found).total_memory
        return Cuda(found, Room(budget))
    return Host(found, Room(budget))
