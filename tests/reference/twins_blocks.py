"""Slow twins of methods whose blocks take turns, written from the equations over a list of matrices, in whatever dtype they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Adam:
    """m, v and k of one tensor since its turn began."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    m: float | Tensor = 0.0
    v: float | Tensor = 0.0
    k: int = 0

    def direction(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.k += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        return (self.m / (1 - b1**self.k)) / ((self.v / (1 - b2**self.k)).sqrt() + self.eps)


@dataclass
class Blocks:
    """FRUGAL's Algorithm with whole tensors, and BAdam where `kappa` is None: what is off is not touched.

    chosen(t): numbers of the tensors that are on at update t, from 0; starts(t): whether a turn begins there.
    """

    weights: list[Tensor]
    chosen: Callable[[int], Sequence[int]]
    starts: Callable[[int], bool]
    kappa: float | None = 1.0
    always: Sequence[int] = ()
    keep_always: bool = True
    decay: float = 0.0
    scale: float = 1.0
    t: int = 0
    adam: dict[int, Adam] = field(default_factory=dict)

    def step(self, grads: Sequence[Tensor], lr: float) -> list[Tensor]:
        on = set(self.chosen(self.t)) | set(self.always)
        if self.starts(self.t):
            stays = self.adam if self.keep_always and self.t else {}
            self.adam = {i: stays[i] if i in self.always and i in stays else Adam() for i in on}
        for i, g in enumerate(grads):
            w = self.weights[i]
            if i in on:
                self.weights[i] = (1 - lr * self.decay) * w - lr * self.scale * self.adam[i].direction(g)
            elif self.kappa is not None:
                self.weights[i] = (1 - lr * self.decay) * w - lr * self.scale * self.kappa * torch.sign(g)
        self.t += 1
        return [w.clone() for w in self.weights]
