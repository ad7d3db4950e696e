"""diffGrad (Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri 2020, arXiv 1909.11015): Adam with friction where gradients stay alike."""

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


@dataclass(frozen=True)
class DiffGrad(OnePass):
    """m, v as Adam; xi = sigmoid(|g_prev - g|), g_prev = 0 at first; U = c_t xi m / (sqrt(v) + eps), eps before bias correction.

    xi is in [1/2, 1): where gradients are small it is 1/2 whatever they do, and the step is half of Adam's.

    reference_alias: the first published file kept a reference to the gradient instead of a copy, which the in-place
    `zero_grad` of older torch turned into the gradient itself: the difference was always 0, xi always 1/2. No gradient is kept.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    reference_alias: bool = False

    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_number("eps", self.eps)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        specs = {"exp_avg": StateSpec(leaf.shape), "exp_avg_sq": StateSpec(leaf.shape, signed=False)}
        return specs if self.reference_alias else {**specs, "previous": StateSpec(leaf.shape)}

    def _native(self, work: Work) -> bool:
        own, scale = self._numbers(work.step)
        names = ("exp_avg", "exp_avg_sq", "" if self.reference_alias else "previous")
        return one_pass(native_light.diffgrad_, work, names, scale, **own)

    def _numbers(self, step: Step) -> tuple[dict[str, Any], float]:
        """What the kernel is told, and what multiplies U: c_t, with the friction where that is a constant."""
        b1, b2 = step.betas(self.betas)
        c = math.sqrt(1.0 - b2**step.count) / (1.0 - b1**step.count)
        return {"beta1": b1, "beta2": b2, "eps": self.eps}, 0.5 * c if self.reference_alias else c

    def _direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Dense:
        own, scale = self._numbers(step)
        b1, b2 = own["beta1"], own["beta2"]
        c = 2.0 * scale if self.reference_alias else scale
        m, v = state["exp_avg"], state["exp_avg_sq"]
        previous = None if self.reference_alias else state["previous"]
        fused = direction(native_light.diffgrad_, grad.view_as(m), (m, v, previous), spent, **own)
        if fused is not None:
            return Dense(fused, scale=scale, correction=c)
        g = grad.to(m.dtype).view_as(m)
        m.lerp_(g, 1.0 - b1)
        v.mul_(b2).addcmul_(g, g, value=1.0 - b2)
        u = v.sqrt().add_(self.eps)
        if previous is None:
            return Dense(torch.div(m, u, out=u), scale=scale, correction=c)
        xi = torch.sub(previous, g, out=previous).abs_().sigmoid_()  # in the memory of g_prev, which g takes next
        torch.div(xi.mul_(m), u, out=u)
        previous.copy_(g)
        return Dense(u, scale=scale, correction=c)
