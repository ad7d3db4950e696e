"""Saving beside the training: a copy of the state is taken at once, and written by a thread while steps go on.

The copy lies on the CPU in buffers that are used again, so there is one at most; the next save waits for the one before. What goes wrong
in the thread is raised at the next look, and in the end.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tare.core.errors import CheckpointError
from tare.parallel.group import PATIENCE
from tare.train import checkpoint, sharded
from tare.train.base import NONE, Base
from tare.train.machine import memory_of

Mode = Literal["auto", "always", "never"]
SMALL = 64 << 20  # copies up to this size are not worth a word
SHARE = 0.25  # of the host's memory, for larger ones


class Saver:
    """Writes the checkpoints of one run.

    For a model that `fully_shard` has cut, all ranks make one and call the same methods in the same order; else the first rank alone.

    Args:
        folder: the run's `checkpoints/`.
        model, optimizer: what is saved.
        keep: as of `checkpoint.prepare`.
        background: write beside the training. Costs a copy of weights and state in the memory of the host.
        base: weights that are left out, and stated in the manifest.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: Any, keep: int = 2, background: bool = True, base: Base = NONE
    ) -> None:
        self.folder, self.model, self.optimizer, self.keep, self.background = folder, model, optimizer, keep, background
        self.base = base
        self.sharded = sharded.is_sharded(model)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._written: list[tuple[int, Path]] = []
        self._fault: BaseException | None = None
        self._group: Any = None

    def save(
        self,
        step: int,
        trainer: dict[str, Any],
        facts: dict[str, Any] | None = None,
        exchange: dict[str, Any] | None = None,
    ) -> None:
        """Save the state as it is now. Returns when it is written, or in the background as soon as it is copied.

        exchange: of a communication hook (`compressing.state_of`).

        Raises:
            CheckpointError: no space or not writable, of this save or of the one before.
        """
        self.wait()
        self._raise()
        stage = self._stage if self.background else None
        if self.sharded:
            write = sharded.prepare(
                self.folder, step, model=self.model, optimizer=self.optimizer, trainer=trainer, facts=facts, keep=self.keep,
                group=self._own_group(), stage=stage, base=self.base,
            )  # fmt: skip
        else:
            weights, state = checkpoint.weights_of(self.model, self.base.names), self.optimizer.state_dict()
            state = state if exchange is None else {**state, "exchange": exchange}
            write = checkpoint.prepare(
                self.folder, step, weights=weights, optimizer=state, trainer=trainer, facts=facts, keep=self.keep, stage=stage,
                base=self.base,
            )  # fmt: skip
        if not self.background:
            self._written.append((step, write()))
            return
        self._thread = threading.Thread(target=self._run, args=(step, write), name=f"save step {step}")
        self._thread.start()

    def finished(self) -> list[tuple[int, Path]]:
        """What has been written since the last call: step and folder. Raises what went wrong in the background."""
        self._raise()
        with self._lock:
            written, self._written = self._written, []
        return written

    def wait(self) -> None:
        """Until nothing is being written any more. Raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> list[tuple[int, Path]]:
        """Wait for the last one, and give the buffers back; as `finished`."""
        self.wait()
        self._buffers = {}
        return self.finished()

    def _run(self, step: int, write: Callable[[], Path]) -> None:
        try:
            place = write()
            with self._lock:
                self._written.append((step, place))
        except BaseException as fault:
            self._fault = fault

    def _raise(self) -> None:
        fault, self._fault = self._fault, None
        if isinstance(fault, CheckpointError):
            raise fault
        if fault is not None:
            raise CheckpointError(f"{self.folder}: could not be saved: {type(fault).__name__}: {fault}") from fault

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU, in the buffers of the last time where they fit."""
        device = next((t.device for t in tensors.values() if t.device.type != "cpu"), None)
        pinned = device is not None and device.type == "cuda"
        copies = {}
        for name, tensor in tensors.items():
            held = self._buffers.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copies[name] = held.copy_(tensor.detach(), non_blocking=pinned)
        self._buffers = copies  # of state that is gone nothing is kept
        if pinned:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _own_group(self) -> Any:
        """For what the writing ranks tell each other while training goes on over the other groups."""
        if self._group is None:
            from torch import distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self._group


def in_background(mode: Mode, device: torch.device, budget: str | None, copy: int) -> bool:
    """Whether to save beside the training.

    Args:
        mode: the setting `run.checkpoint_async`. `auto`: yes, but where a copy of more than `SMALL` would break a promise, since on the
            CPU the budget counts the memory that it takes, or would need more than `SHARE` of the host's memory.
        device: of the training.
        budget: the setting `run.budget`.
        copy: bytes of weights and state, of all ranks on this host that write.
    """
    if mode != "auto":
        return mode == "always"
    if copy <= SMALL:
        return True
    memory = memory_of(torch.device("cpu"))
    spare = memory is None or copy <= memory * SHARE
    return spare and (device.type != "cpu" or budget is None)
