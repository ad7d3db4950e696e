"""Adan (Xie, Zhou, Li, Lin, Yan 2022, arXiv 2208.06677): Nesterov momentum from the difference of successive gradients."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_number
from tare.core.delta import Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec, Step, Work
from tare.kernels import native_light
from tare.rules.one_pass import OnePass, direction, one_pass

_MOMENTS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous")


@dataclass(frozen=True)
class Adan(OnePass):
    """d = g - g_prev (0 at the first step); m = b1 m + (1-b1) g; v = b2 v + (1-b2) d; n = b3 n + (1-b3) (g + b2 d)^2;
    U = (m / (1-b1^t) + b2 v / (1-b2^t)) / (sqrt(n / (1-b3^t)) + eps).

    betas: of the averages, as the code has them; the paper's are one minus these. With b2 = 0 this is Adam with (b1, b3).

    An optimizer may put a factor for this step's gradient into its options, under `SCALE`.
    """

    betas: tuple[float, float, float] = (0.98, 0.92, 0.99)
    eps: float = 1e-8

    SCALE: ClassVar[str] = "grad_scale"
    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

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

    def _native(self, work: Work) -> bool:
        own, c = self._numbers(work.step)
        return one_pass(native_light.adan_, work, _MOMENTS, c, self._scale(work.step), **own)

    def _scale(self, step: Step) -> float:
        return float(step.options.get(self.SCALE, 1.0))

    def _numbers(self, step: Step) -> tuple[dict[str, Any], float]:
        """What the kernel is told, and c_t = sqrt(1-b3^t) / (1-b1^t), which multiplies U."""
        b1, b2, b3 = (float(beta) for beta in step.options.get("betas", self.betas))
        c1, c2, root = 1.0 - b1**step.count, 1.0 - b2**step.count, math.sqrt(1.0 - b3**step.count)
        own = {"betas": (b1, b2, b3), "mix": b2 * c1 / c2, "eps": self.eps * root, "first": step.count == 1}
        return own, root / c1

    def _direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Dense:
        (own, c), scale = self._numbers(step), self._scale(step)
        (b1, b2, b3), mix, eps = own["betas"], own["mix"], own["eps"]
        m, v, n, previous = (state[name] for name in _MOMENTS)
        fused = direction(native_light.adan_, grad.view_as(m), (m, v, n, previous), spent, scale, **own)
        if fused is not None:
            return Dense(fused, scale=c, correction=c)
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
        below = torch.sqrt(n, out=previous).add_(eps)
        u = torch.add(m, v, alpha=mix).div_(below)
        previous.copy_(g)
        return Dense(u, scale=c, correction=c)
