"""diffGrad (Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri 2020, arXiv 1909.11015): Adam with friction where gradients stay alike."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec, Step, Transform


@dataclass(frozen=True)
class DiffGrad(Transform):
    """m, v as Adam; xi = sigmoid(|g_prev - g|), g_prev = 0 at first; U = c_t xi m / (sqrt(v) + eps), eps before bias correction.

    xi is in [1/2, 1): where gradients are small it is 1/2 whatever they do, and the step is half of Adam's.

    reference_alias: the first published file kept a reference to the gradient instead of a copy, which the in-place
    `zero_grad` of older torch turned into the gradient itself: the difference was always 0, xi always 1/2. No gradient is kept.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    reference_alias: bool = False

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_number("eps", self.eps)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        specs = {"exp_avg": StateSpec(leaf.shape), "exp_avg_sq": StateSpec(leaf.shape, signed=False)}
        return specs if self.reference_alias else {**specs, "previous": StateSpec(leaf.shape)}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        b1, b2 = step.betas(self.betas)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        g = grad.to(m.dtype).view_as(m)
        m.lerp_(g, 1.0 - b1)
        v.mul_(b2).addcmul_(g, g, value=1.0 - b2)
        c = math.sqrt(1.0 - b2**step.count) / (1.0 - b1**step.count)
        u = v.sqrt().add_(self.eps)
        if self.reference_alias:
            return Dense(torch.div(m, u, out=u), scale=0.5 * c, correction=c)
        previous = state["previous"]
        xi = torch.sub(previous, g, out=previous).abs_().sigmoid_()  # in the memory of g_prev, which g takes next
        torch.div(xi.mul_(m), u, out=u)
        previous.copy_(g)
        return Dense(u, scale=c, correction=c)
