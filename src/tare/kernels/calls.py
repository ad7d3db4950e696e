"""What every native entry point asks before it takes raw pointers, and the rehearsal in which they only say that they would.

A kernel returns True when it did the work and False when it touched nothing; `@kernel` marks one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

from tare.kernels import library, paper, rounding
from tare.kernels.library import Noise
from tare.kernels.triton import dispatch

FLOATS = (torch.float32, torch.bfloat16)
FP32, CODES, BF16 = (torch.float32,), (torch.uint8,), (torch.bfloat16,)

P = ParamSpec("P")
_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


def kernel(function: Callable[P, bool]) -> Callable[P, bool]:
    """A native entry point: under `on_paper` it answers as it would for real tensors, and does nothing.

    Where the tensors are on a GPU, its Triton counterpart takes the call.
    """

    @wraps(function)
    def call(*tensors: P.args, **options: P.kwargs) -> bool:
        given = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor)]
        if _rehearsing.get():
            return all(x.is_contiguous() for x in given)
        if given and dispatch.wants(given[0]):
            other = dispatch.counterpart(function)
            return other is not None and other(*tensors, **options)
        return function(*tensors, **options)

    return call


def ready(x: Tensor) -> bool:
    """Whether there are fused kernels for the device of `x`; on the CPU they are compiled here, if they were not yet."""
    return dispatch.wants(x) or library.available()


@contextmanager
def on_paper() -> Iterator[None]:
    """Native kernels refuse fake tensors. Where they exist they will do the work without temporaries: inside, they say so.

    For planning on fake tensors only; nothing is computed.
    """
    token = _rehearsing.set(library.available())
    try:
        with paper.sparing():
            yield
    finally:
        _rehearsing.reset(token)


def fits(numel: int, *tensors: tuple[Tensor, tuple[torch.dtype, ...], int | None]) -> bool:
    """The one place that decides whether raw pointers may be taken. `None` as a size means `numel`."""
    for x, dtypes, size in tensors:
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:  # fake, distributed and other wrapped tensors
            return False
        if x.device.type != "cpu" or x.dtype not in dtypes or x.layout != torch.strided:
            return False
        if x.numel() != (numel if size is None else size) or not x.is_contiguous() or x.is_neg():
            return False
    return numel > 0 and not torch.compiler.is_compiling()


def block_fits(block: int, multiple: int = 16) -> bool:
    """Whether the kernels' stack buffers hold a block, and whole vectors fill it."""
    return multiple <= block <= 4096 and block % multiple == 0


def written(*tensors: Tensor) -> None:
    """Tell autograd, which cannot see a write through a pointer."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def noise(key: int | None, start: int, numel: int) -> Noise | None:
    """None when the elements' indices cross a multiple of 2^32, where the hash's base changes: left to the twin."""
    if key is None:
        return Noise(0, 0, 0)
    start += rounding.offset_of(key)
    if start < 0 or start >> 32 != (start + numel - 1) >> 32:
        return None
    return Noise(rounding.base(key, start >> 32), 1, start & rounding.MASK)
