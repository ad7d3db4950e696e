"""Adan (Xie, Zhou, Li, Lin, Yan 2022, arXiv 2208.06677): Nesterov momentum from the difference of successive gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec, Step, Transform


@dataclass(frozen=True)
class Adan(Transform):
    """d = g - g_prev (0 at the first step); m = b1 m + (1-b1) g; v = b2 v + (1-b2) d; n = b3 n + (1-b3) (g + b2 d)^2;
    U = (m / (1-b1^t) + b2 v / (1-b2^t)) / (sqrt(n / (1-b3^t)) + eps).

    betas: of the averages, as the code has them; the paper's are one minus these. With b2 = 0 this is Adam with (b1, b3).

    An optimizer may put a factor for this step's gradient into its options, under `SCALE`.
    """

    betas: tuple[float, float, float] = (0.98, 0.92, 0.99)
    eps: float = 1e-8

    SCALE: ClassVar[str] = "grad_scale"

    def __post_init__(self) -> None:
        check_betas(self.betas, 3)
        check_number("eps", self.eps)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {
            "exp_avg": StateSpec(leaf.shape),
            "exp_avg_diff": StateSpec(leaf.shape),
            "exp_avg_sq": StateSpec(leaf.shape, signed=False),
            "previous": StateSpec(leaf.shape),
        }

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        b1, b2, b3 = step.options.get("betas", self.betas)
        m, v, n, previous = (state[name] for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous"))
        scale = float(step.options.get(self.SCALE, 1.0))
        g = grad.to(m.dtype).view_as(m)
        if scale != 1.0:
            g = g * scale
        m.lerp_(g, 1.0 - b1)
        if step.count > 1:
            d = torch.sub(g, previous, out=previous)  # the memory of g_prev serves for d, z and the root in turn
            v.lerp_(d, 1.0 - b2)
            z = d.mul_(b2).add_(g)
        else:
            v.mul_(b2)
            z = g
        n.mul_(b3).addcmul_(z, z, value=1.0 - b3)
        c1, c2, root = 1.0 - b1**step.count, 1.0 - b2**step.count, math.sqrt(1.0 - b3**step.count)
        below = torch.sqrt(n, out=previous).add_(self.eps * root)
        u = torch.add(m, v, alpha=b2 * c1 / c2).div_(below)
        previous.copy_(g)
        return Dense(u, scale=root / c1, correction=root / c1)
