"""Element-wise rules other than Adam in plain torch operations, chunk by chunk: twins of the entry points of `native_light`.

Products and sums are separate operations here and there, so the states come out equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.kernels import blockwise, rounding, split24

Map = Literal["none", "sign", "dead-zone", "huber"]


@dataclass(frozen=True)
class Write:
    """How a step reads the gradient and writes what it found: W <- decay W - alpha U, U of factor * G.

    decay: 1 - lr * weight_decay; with 0 the old weight is not read, so that with alpha = -1 U itself stands in its place.
    alpha: all that multiplies U.
    factor: of the gradient; -1 to ascend.
    key: stochastic rounding of a bf16 weight (see `rounding`), of a split one at its 24th bit; None: to nearest.
    keys: the same for bf16 moments, one each.
    start: index of the first element for the keys.
    """

    decay: float = 0.0
    alpha: float = -1.0
    factor: float = 1.0
    key: int | None = None
    keys: tuple[int, ...] | None = None
    start: int = 0


def _step(
    rule: Callable[..., tuple[Tensor, ...]],
    weight: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    low: Tensor | None,
    write: Write,
) -> None:
    """rule: fp32 gradient and moments [n] to the direction and the new moments."""
    w, size = weight.view(-1), blockwise.chunk_elements(weight.device)
    for first in range(0, w.numel(), size):
        at, start = slice(first, first + size), write.start + first
        kept = [m.view(-1)[at] for m in moments]
        u, *new = rule(grad.view(-1)[at].to(torch.float32) * write.factor, *(m.to(torch.float32) for m in kept))
        for moment, exact, key in zip(kept, new, write.keys or [None] * len(kept), strict=True):
            _put(moment, exact, key, start)
        if low is not None:
            c = low.view(-1)[at]
            if write.decay == 0.0:
                w[at] = 0.0
                c.zero_()
            split24.write_split_(w[at], c, u, decay=write.decay, alpha=write.alpha, key=write.key, start=start)
            continue
        exact = u * -write.alpha if write.decay == 0.0 else w[at].to(torch.float32) * write.decay - u * write.alpha
        _put(w[at], exact, write.key, start)


def _put(target: Tensor, exact: Tensor, key: int | None, start: int) -> None:
    if key is None or target.dtype != torch.bfloat16:
        target.copy_(exact)
    else:
        rounding.round_stochastic_(target, exact, key, start)


def mapped(x: Tensor, kind: Map, width: float) -> Tensor:
    """`x`, sign(x), sign(x) where |x| > width, or clip(x / width, -1, 1); a NaN stays one."""
    if kind == "none":
        return x
    if kind == "huber":
        return (x / width).clamp_(-1.0, 1.0)
    u = x.sign()
    if kind == "dead-zone":
        u.mul_(x.abs() > width)
    return u.addcmul_(x, x.new_zeros(()))  # the sign of NaN is 0 in torch


@torch.no_grad()
def mapped_(
    weight: Tensor, grad: Tensor, low: Tensor | None, write: Write, *, kind: Map = "none", width: float = 0.0
) -> None:
    """See `native_light.mapped_`. All tensors contiguous, here and below."""
    _step(lambda g: (mapped(g, kind, width),), weight, grad, (), low, write)


@torch.no_grad()
def lion_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    low: Tensor | None,
    write: Write,
    *,
    beta1: float,
    beta2: float,
    kind: Map = "sign",
    width: float = 0.0,
) -> None:
    """See `native_light.lion_`."""

    def rule(g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return mapped(m * beta1 + g * (1 - beta1), kind, width), m * beta2 + g * (1 - beta2)

    _step(rule, weight, grad, (exp_avg,), low, write)


@torch.no_grad()
def adan_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    previous: Tensor,
    low: Tensor | None,
    write: Write,
    *,
    betas: tuple[float, float, float],
    mix: float,
    eps: float,
    first: bool,
) -> None:
    """See `native_light.adan_`."""
    b1, b2, b3 = betas

    def rule(g: Tensor, m: Tensor, v: Tensor, s: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        v, z = v * b2, g
        if not first:
            d = g - before
            v, z = v + d * (1 - b2), d * b2 + g
        m, s = m * b1 + g * (1 - b1), s * b3 + z * (1 - b3) * z
        return (m + v * mix) / (s.sqrt() + eps), m, v, s, g

    _step(rule, weight, grad, (exp_avg, exp_avg_diff, exp_avg_sq, previous), low, write)


@torch.no_grad()
def diffgrad_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    previous: Tensor | None,
    low: Tensor | None,
    write: Write,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """See `native_light.diffgrad_`."""

    def rule(g: Tensor, m: Tensor, v: Tensor, before: Tensor | None = None) -> tuple[Tensor, ...]:
        m, v = m * beta1 + g * (1 - beta1), v * beta2 + g * (1 - beta2) * g
        u = m / (v.sqrt() + eps)
        return (u, m, v) if before is None else (u * (before - g).abs().sigmoid(), m, v, g)

    kept = (exp_avg, exp_avg_sq) if previous is None else (exp_avg, exp_avg_sq, previous)
    _step(rule, weight, grad, kept, low, write)


@torch.no_grad()
def momentum_(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    low: Tensor | None,
    write: Write,
    *,
    beta: float,
    rest: float,
    nesterov: bool = False,
) -> None:
    """See `native_light.momentum_`."""

    def rule(g: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        b = b * beta + g * rest
        return (g + b * beta if nesterov else b), b

    _step(rule, weight, grad, (buffer,), low, write)
