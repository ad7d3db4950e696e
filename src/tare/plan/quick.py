"""A fake-tensor mode that remembers: what an operator gave for tensors of these shapes it gives again, in a fourth of the time.

torch has such a memory too, but it takes each place within a storage for a case of its own, and a step that walks through a
matrix by blocks is nothing else. Only what is beyond doubt is remembered; everything else goes the ordinary way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_ABSOLUTE = ("aten::as_strided", "aten::set_", "aten::resize_")  # read or write a place within a storage as such

# How to make an answer again, from the mode and the arguments.
Answer = Callable[["QuickFakeMode", Sequence[Any], Mapping[str, Any]], Any]
# Of the process, by the default dtype. Shapes only, no tensors.
_MEMORY: dict[torch.dtype, dict[Any, Answer | None]] = {}


class QuickFakeMode(FakeTensorMode):
    """`FakeTensorMode` with that memory. quick: False turns it off.

    >>> with QuickFakeMode() as mode:
    ...     x = torch.empty(8, 4)
    ...     _ = x[:2] * 2, x[2:4] * 2
    >>> mode.answered > 0
    True
    """

    def __init__(self, quick: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._quick = quick
        self._memory = _MEMORY.setdefault(torch.get_default_dtype(), {})
        self.answered = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuickFakeMode":
        """Itself: a copy of a fake tensor is of the same mode.

        A fake parameter holds its mode in its `__dict__`, so that a copy of a layer would copy the mode too, and with it torch's
        weak references to storages: those free, when they die, what only the original may free.
        """
        return self

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As torch's own; called for every operator."""
        kwargs = kwargs or {}
        key = self._key(func, args, kwargs) if self._quick else None
        if key is not None and key in self._memory:
            make = self._memory[key]
            if make is not None:
                self.answered += 1
                return make(self, args, kwargs)
        result = super().dispatch(func, types, args, kwargs)
        if key is not None and key not in self._memory:
            still = self._key(func, args, kwargs) == key  # nothing was resized
            self._memory[key] = _answer(func, result, args, kwargs) if still else None
        return result

    def _key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """All that the shape of an answer can depend on; None where that is more than shapes and plain values."""
        if type(func) is not OpOverload:
            return None
        parts: list[Any] = [func, len(args), *kwargs]
        tensors = False
        for x in (*args, *kwargs.values()):
            kind = type(x)
            if kind is FakeTensor:
                if x.constant is not None or x.fake_mode is not self or x.dtype.is_complex or x.is_neg():
                    return None
                parts.append((x.shape, x.stride(), x.dtype, x.fake_device))
                tensors = True
            elif kind in _PLAIN:
                parts.append((kind, x if x == x else "nan"))
            elif kind in (list, tuple) and all(type(y) is int for y in x):
                parts.append((kind, *x))
            else:
                return None
        return tuple(parts) if tensors else None


def _answer(func: Any, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer | None:
    """How `result` is made again; None if that is in doubt."""
    if func._schema.name.startswith(_ABSOLUTE) or torch.Tag.inplace_view in func.tags:
        return None
    if type(result) is FakeTensor:
        return _same(result, args, kwargs) or _fresh(result, args, kwargs) or _view(result, args)
    if type(result) in (list, tuple) and result and all(type(x) is FakeTensor for x in result):
        kind = type(result)
        makers = [_fresh(x, args, kwargs) or _view(x, args) for x in result]
        if all(makers) and len({x.untyped_storage()._cdata for x in result}) in (1, len(result)):
            return lambda mode, given, named: kind(make(mode, given, named) for make in makers)  # type: ignore[misc]
    return None


def _same(result: FakeTensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer | None:
    """One of the arguments itself."""
    for at, x in enumerate(args):
        if x is result:
            return lambda mode, given, named: given[at]
    for name, x in kwargs.items():
        if x is result:
            return lambda mode, given, named: named[name]
    return None


def _fresh(result: FakeTensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer | None:
    """A tensor with a storage of its own, filled to the last byte."""
    storages = {x.untyped_storage()._cdata for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
    storage = result.untyped_storage()
    shape, stride, dtype, device = tuple(result.shape), result.stride(), result.dtype, result.fake_device
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if result.numel() else 0
    if (
        storage._cdata in storages
        or result.constant is not None
        or result.requires_grad
        or storage.nbytes() != reach * dtype.itemsize
        or result.is_neg()
        or result.is_conj()
    ):
        return None

    def make(mode: QuickFakeMode, given: Sequence[Any], named: Mapping[str, Any]) -> FakeTensor:
        return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    return make


def _view(result: FakeTensor, args: Sequence[Any]) -> Answer | None:
    """A view of the first argument, as far into it as this one is."""
    base = args[0] if args and type(args[0]) is FakeTensor else None
    if (
        base is None
        or base.untyped_storage()._cdata != result.untyped_storage()._cdata
        or base.dtype != result.dtype
        or result.constant is not None
        or result.is_neg()
        or result.is_conj()
    ):
        return None
    shape, stride, device = tuple(result.shape), result.stride(), result.fake_device
    dtype, further = result.dtype, result.storage_offset() - base.storage_offset()

    def make(mode: QuickFakeMode, given: Sequence[Any], named: Mapping[str, Any]) -> FakeTensor:
        whole: Tensor = given[0]
        part = torch.empty(0, dtype=dtype, device="meta")
        part.set_(whole.untyped_storage(), whole.storage_offset() + further, shape, stride)
        return FakeTensor(mode, part, device)

    return make
