"""Rehearsals on paper: a step on fake tensors, of which only the memory matters, walks its long loops in part."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch._C import _get_dispatch_mode

T = TypeVar("T")
_sparing: ContextVar[bool] = ContextVar("sparing", default=False)


def few(pieces: Iterable[T]) -> Iterable[T]:
    """`pieces` of a loop; while `sparing` and under fake tensors only the first two and the last of them.

    For loops over pieces of one size, or of falling sizes, that only write in place: no round then needs more than the second one,
    which begins while the leftovers of the first are still there, and the last leaves behind what it leaves. A loop that gathers
    a result from its pieces must be walked in full.

    >>> list(few(range(9)))
    [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """
    if not _sparing.get() or _get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
        return pieces
    known = list(pieces)
    return known if len(known) <= 3 else [*known[:2], known[-1]]


@contextmanager
def sparing(wanted: bool = True) -> Iterator[None]:
    """Inside, loops over fake tensors are walked in part (`wanted`), or in full."""
    token = _sparing.set(wanted)
    try:
        yield
    finally:
        _sparing.reset(token)
