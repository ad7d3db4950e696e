"""What element-wise rules share that step a leaf in one native pass: how the kernel writes it, and the direction alone on a small tensor.

The kernels are in `kernels/native_light.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tare.core.delta import Delta
from tare.core.random import make_key
from tare.core.state import State
from tare.core.storage import LOW
from tare.core.transform import Step, Transform, Work
from tare.kernels import library
from tare.kernels.calls import FLOATS
from tare.kernels.plain_light import Write
from tare.rules.maps import DeadZone, Huber, PostMap, Sign


@dataclass(frozen=True)
class OnePass(Transform):
    """Rules whose direction is `_direction(grad, state, step, spent)`, and that step a whole leaf by `_native(work)` where they can."""

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        return self._direction(grad, state, step, spent=False)

    def consume(self, grad: Tensor, state: State, step: Step) -> Delta:
        return self._direction(grad, state, step, spent=True)

    def update_many(self, batch: list[Work]) -> list[Work]:
        return [work for work in batch if not self._native(work)]

    def _direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Delta:
        """U, moments stepped. spent: nobody reads the gradient afterwards, so U may take its memory."""
        raise NotImplementedError

    def _native(self, work: Work) -> bool:
        """Step a leaf in one pass; False where that cannot be, and nothing was touched."""
        raise NotImplementedError


def map_numbers(post: PostMap | None) -> dict[str, Any] | None:
    """How a kernel is told of a map of the direction; None for one that it does not know.

    >>> map_numbers(Huber(0.5))
    {'kind': 'huber', 'width': 0.5}
    """
    if post is None:
        return {"kind": "none"}
    if type(post) is Sign:
        return {"kind": "sign"}
    if type(post) is DeadZone:
        return {"kind": "dead-zone", "width": post.e}
    return {"kind": "huber", "width": post.delta} if type(post) is Huber else None


def one_pass(
    kernel: Callable[..., bool],
    work: Work,
    names: Sequence[str],
    scale: float = 1.0,
    factor: float = 1.0,
    **own: object,
) -> bool:
    """W <- shrink W - gain scale U by a native kernel; False where it cannot, and nothing was touched.

    Args:
        kernel: of `native_light`, called with weight, gradient, moments, what a split weight adds, how to write, and `own`.
        work: the leaf's job.
        names: of the moments, as the kernel takes them; "" for one that is not kept.
        scale: of U.
        factor: of the gradient.
        own: the kernel's other arguments.
    """
    raw, slots = work.state.raw, [work.state.slots[name] for name in names if name]
    rounded = bool(slots) and all(slot.form == "bf16" for slot in slots)
    # quantised, or the bf16 arithmetic of `bf16_legacy`
    if not rounded and not all(slot.form == "plain" and slot.dtype == torch.float32 for slot in slots):
        return False
    if work.weight.dtype not in FLOATS or work.grad.dtype not in FLOATS or work.shrink <= 0.0:
        return False
    keys = tuple(make_key(work.state.key, slot.name) for slot in slots) if rounded else None
    write = Write(work.shrink, work.gain * scale, -factor if work.maximize else factor, work.noise, keys)
    return kernel(work.weight, work.grad, *(raw[name] if name else None for name in names), raw.get(LOW), write, **own)


def direction(
    kernel: Callable[..., bool],
    grad: Tensor,
    moments: Sequence[Tensor | None],
    spent: bool,
    factor: float = 1.0,
    **own: object,
) -> Tensor | None:
    """U in fp32 by a native kernel, moments stepped; None where it cannot, and nothing was touched.

    Args:
        kernel, factor, own: as in `one_pass`.
        grad: fp32 or bf16.
        moments: fp32, of as many elements, as the kernel takes them.
        spent: nobody reads the gradient afterwards, so U may take its memory.
    """
    kept = [m for m in moments if m is not None]
    if torch.compiler.is_compiling() or grad.device.type != "cpu" or not library.available():
        return None
    if grad.dtype not in FLOATS or any(m.dtype != torch.float32 or m.shape != grad.shape for m in kept):
        return None
    u = grad if spent and grad.dtype == torch.float32 else torch.empty(grad.shape, dtype=torch.float32)
    return u if kernel(u, grad, *moments, None, Write(factor=factor), **own) else None
