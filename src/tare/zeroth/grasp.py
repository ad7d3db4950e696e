"""ZO-GraSP: which layers can spare how many weights, from losses alone, once before training (DeepZero, arXiv 2310.02025).

Scores of GraSP (Wang, Zhang, Grosse 2020, arXiv 2002.07376), -theta H g, with two random-direction estimates of the gradient in place of
backpropagation: at theta, and a step mu along the first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tare.core.checks import check_number, check_whole
from tare.zeroth.probes import finite


@dataclass(frozen=True)
class Grasp:
    """score = -theta * (g1 - g0) / mu, g0 = RGE(theta), g1 = RGE(theta + mu g0).

    Args:
        q: directions of each estimate; q + 1 evaluations.
        mu: their length.
        per_tensor: the released estimate: each tensor's direction scaled to norm 1, and no factor for it, which shrinks large tensors.
        signed: the largest scores are kept, as the paper says; else the largest magnitudes, as the released code does.
    """

    q: int = 192
    mu: float = 5e-3
    per_tensor: bool = False
    signed: bool = False

    def __post_init__(self) -> None:
        check_whole("q", self.q, 1)
        check_number("grasp's mu", self.mu, 0.0)


@dataclass
class Scores:
    """What was found: estimates and scores of each weight, in its shape, and all losses in the order of evaluation."""

    first: list[Tensor]
    second: list[Tensor]
    scores: list[Tensor]
    losses: list[float]


Directions = Callable[[int, int], Sequence[Tensor]]  # (number of the estimate, of the direction) -> one for each weight


@torch.no_grad()
def score(how: Grasp, weights: Sequence[Tensor], directions: Directions, loss: Callable[[], float]) -> Scores | None:
    """Scores of some weights, which are written meanwhile and put back bit for bit; None where a loss was not finite.

    A copy of the weights and two estimates of their size are held.
    """
    before = [w.clone() for w in weights]
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in before]
    losses: list[float] = []

    def at(point: Sequence[Tensor], z: Sequence[Tensor] | None = None) -> float:
        for i, (w, x) in enumerate(zip(weights, point, strict=True)):
            w.copy_(x if z is None else x + how.mu * z[i])
        losses.append(loss())
        return losses[-1]

    def estimate(number: int, point: Sequence[Tensor]) -> list[Tensor]:
        here = at(point)
        total = [torch.zeros_like(x) for x in point]
        for j in range(how.q):
            z = [u.to(x.dtype).view(x.shape) for u, x in zip(directions(number, j), point, strict=True)]
            if how.per_tensor:
                z = [u / (u.norm() + 1e-8) for u in z]
            change = at(point, z) - here
            for g, u in zip(total, z, strict=True):
                g.add_(u, alpha=change / how.q / (1.0 if how.per_tensor else how.mu))
        return total

    try:
        first = estimate(0, wide)
        if not finite(losses):
            return None
        second = estimate(1, [x + how.mu * g for x, g in zip(wide, first, strict=True)])
    finally:
        for w, x in zip(weights, before, strict=True):
            w.copy_(x)
    if not finite(losses):
        return None
    scores = [-x * (b - a) / how.mu for x, a, b in zip(wide, first, second, strict=True)]
    return Scores(first, second, scores, losses)


def keep(how: Grasp, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of the weights that stay when the lowest round(sparsity x all) of all together go; equal ones go in order."""
    ranks = [(s if how.signed else s.abs()).flatten().double().cpu() for s in scores]
    everything = torch.cat(ranks)
    stays = torch.ones(everything.numel(), dtype=torch.bool)
    stays[torch.argsort(everything, stable=True)[: round(sparsity * everything.numel())]] = False
    parts = stays.split([math.prod(s.shape) for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]
