"""Reads: which weights are read from their own memory while one evaluation runs; how misplaced reads are found."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from tare.core.int8_weight import LISTENERS

# What hands out the memory itself, past the dispatcher: Triton's launcher, NumPy, DLPack.
_ADDRESSES = {
    Tensor.data_ptr, Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__,
    Tensor.__cuda_array_interface__.__get__,
}  # fmt: skip


class Reads:
    """Context that notes every operation, every address taken and every decoding of watched tensors or of views of them.

    While it is on, compiled functions run uncompiled: nothing escapes it but extensions that take tensors past the dispatcher without
    asking Python for their address. A few microseconds an operation.
    """

    def __init__(self) -> None:
        self.found: set[Tensor] = set()
        self._owners: dict[int, list[Tensor]] = defaultdict(list)  # storage -> watched tensors
        self._paused = 0

    def watch(self, tensor: Tensor) -> None:
        """Note reads of `tensor`; of a tensor made of others, of any of its parts."""
        for part in _parts(tensor):
            self._owners[_storage(part)].append(tensor)

    def moved(self, tensor: Tensor) -> None:
        """A tensor has got other memory, whose former owner is gone: it is watched there, if it is watched at all."""
        watched = any(tensor is one for owners in self._owners.values() for one in owners)
        for part in _parts(tensor):
            self._owners.pop(_storage(part), None)
        if watched:
            self.watch(tensor)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is noted inside."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __enter__(self) -> "Reads":
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else it would give up for good on what it meets under a mode
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            LISTENERS.append(self.note)
            stack.callback(LISTENERS.remove, self.note)
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operations(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *fault: Any) -> None:
        self._stack.close()

    def note(self, *arguments: Any) -> None:
        if self._paused:
            return
        for argument in arguments:
            if isinstance(argument, Tensor):
                for part in _parts(argument):
                    self.found.update(self._owners.get(_storage(part), ()))


class _Operations(TorchDispatchMode):
    def __init__(self, reads: Reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:  # a view reads nothing; whatever is done with it is seen
            self.reads.note(*tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, reads: Reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDRESSES:
            self.reads.note(*args[:1])
        return func(*args, **(kwargs or {}))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that it consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _storage(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)
