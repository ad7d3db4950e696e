"""One matrix stepped by the library with one transform, in float64 unless said otherwise; gradients that nothing else depends on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.optimizer import Optimizer
from tare.core.random import make_key, normal
from tare.core.recipe import Recipe
from tare.core.transform import Transform

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (6, 6), "uneven": (11, 7)}


def numbers(name: str, shape: tuple[int, ...], number: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(make_key(9, name, number), shape).to(dtype)


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gradients with a decaying spectrum, so that singular vectors are well separated, at changing scales."""
    out = []
    for t in range(steps):
        g = numbers("g", shape, t, dtype)
        if len(shape) == 2:
            decay = 0.7 ** torch.arange(shape[1], dtype=dtype)
            g = g * decay * (1.0 + 0.5 * (t % 3))
        out.append(g)
    return out


def optimizer_for(
    transform: Transform, weight: Tensor, lr: float = 0.01, role: str = "linear", decay: Any = "after", **own: Any
) -> tuple[Optimizer, nn.Parameter]:
    p = nn.Parameter(weight.clone())
    group = [{"params": [("w", p)], "role": role}]
    return Optimizer(group, Recipe((("*", transform),), decay), lr, **own), p


def run(
    optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: Sequence[Tensor], lrs: Sequence[float] | None = None
) -> list[Tensor]:
    """The weight after each step."""
    path = []
    for t, g in enumerate(grads):
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[t]
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


def twin(
    step: Callable[..., Tensor], weight: Tensor, grads: Sequence[Tensor], lrs: Sequence[float], **own: Any
) -> list[Tensor]:
    """The weight after each step of a twin."""
    path, memory, w = [], {}, weight.clone()
    for g, lr in zip(grads, lrs, strict=True):
        w = step(w, g, memory, lr=lr, **own)
        path.append(w)
    return path


def worst(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))
