"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): row and column means of the squared gradient in place of a second moment.

Two published forms: `torch` (torch.optim.Adafactor) and `transformers` (the Hugging Face form that the GaLore repository runs).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.delta import Delta, Dense
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform


@dataclass(frozen=True)
class Adafactor(Transform):
    """beta2_t = 1 - t^decay_rate; V ~ row x column / mean(row); u = g / sqrt(V), divided by max(1, RMS(u) / clip).

    Args:
        beta1: first moment of the *already lr-scaled* update (transformers form); None keeps none.
        decay_rate: exponent of beta2_t, -0.8.
        eps: (added to g^2 or floor of V, floor of RMS(W)).
        clip_threshold: RMS of the update is clipped to this.
        scale_parameter: multiply the learning rate by max(eps[1], RMS(W)). The torch form always does.
        form: `transformers` or `torch`; torch also caps the learning rate at 1 / sqrt(t).
    """

    beta1: float | None = None
    decay_rate: float = -0.8
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    scale_parameter: bool = False
    form: Literal["transformers", "torch"] = "transformers"

    sharding: ClassVar[Sharding] = "matrix"
    accumulates: ClassVar[bool] = True  # dense leaves simply keep their gradient between micro-batches

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.scale_parameter or self.form == "torch"

    def __post_init__(self) -> None:
        if not isinstance(self.eps, tuple | list) or len(self.eps) != 2:
            raise InputError(f"Invalid eps: {self.eps!r}; expected a pair such as (1e-30, 1e-3)")
        for number, eps in enumerate(self.eps):
            check_number(f"eps[{number}]", eps, 0.0, inclusive=True)
        if check_number("decay_rate", self.decay_rate, -math.inf) > 0.0:
            raise InputError(f"Invalid decay_rate: {self.decay_rate!r}; expected a number <= 0 such as -0.8")
        if self.beta1 is not None:
            check_number("beta1", self.beta1, 0.0, inclusive=True, below=1.0)
        check_number("clip_threshold", self.clip_threshold)
        check_choice("form", self.form, ("transformers", "torch"))

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        specs: dict[str, StateSpec] = {}
        if len(leaf.shape) >= 2:
            specs["exp_avg_sq_row"] = StateSpec((*leaf.shape[:-1], 1), "exact")
            specs["exp_avg_sq_col"] = StateSpec((*leaf.shape[:-2], 1, leaf.shape[-1]), "exact")
        else:
            specs["exp_avg_sq"] = StateSpec(leaf.shape, "exact")
        if self.beta1 is not None:
            specs["exp_avg"] = StateSpec(leaf.shape)
        return specs

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        g = grad.to(step.leaf.compute_dtype)
        u = self._torch(g, state, step) if self.form == "torch" else self._transformers(g, state, step)
        if self.form == "torch":
            lr = min(step.lr, 1.0 / math.sqrt(step.count))
            return Dense(u.mul_(self._relative(step) * lr), lr_inside=True)
        if self.scale_parameter:
            u.mul_(self._relative(step))
        if self.beta1 is None:
            return Dense(u)
        moment = state["exp_avg"]
        moment.mul_(self.beta1).add_(u.mul_(step.lr), alpha=1.0 - self.beta1)
        return Dense(moment, lr_inside=True)

    def _relative(self, step: Step) -> Tensor:
        weight = step.weight.to(step.leaf.compute_dtype)
        return _rms(weight).clamp_(min=self.eps[1])

    def _clip(self, u: Tensor) -> Tensor:
        return u.div_(_rms(u).div_(self.clip_threshold).clamp_(min=1.0))

    def _transformers(self, g: Tensor, state: State, step: Step) -> Tensor:
        beta2 = 1.0 - step.count**self.decay_rate
        squared = g.square().add_(self.eps[0])
        if g.ndim >= 2:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.mul_(beta2).add_(squared.mean(-1, keepdim=True), alpha=1.0 - beta2)
            col.mul_(beta2).add_(squared.mean(-2, keepdim=True), alpha=1.0 - beta2)
            u = torch.mul(g, (row / row.mean(-2, keepdim=True)).rsqrt_(), out=squared).mul_(col.rsqrt())
        else:
            v = state["exp_avg_sq"]
            v.mul_(beta2).add_(squared, alpha=1.0 - beta2)
            u = torch.mul(g, v.rsqrt(), out=squared)
        return self._clip(u)

    def _torch(self, g: Tensor, state: State, step: Step) -> Tensor:
        beta2 = 1.0 - step.count**self.decay_rate
        if g.ndim >= 2:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.lerp_(g.norm(dim=-1, keepdim=True).square_().div_(g.size(-1)), 1.0 - beta2)
            col.lerp_(g.norm(dim=-2, keepdim=True).square_().div_(g.size(-2)), 1.0 - beta2)
            estimate = (row @ col).div_(row.mean(dim=-2, keepdim=True).clamp_(min=self.eps[0]))
        else:
            v = state["exp_avg_sq"]
            v.lerp_(g.square(), 1.0 - beta2)
            estimate = v.clone()
        floor = max(self.eps[0] ** 2, torch.finfo(estimate.dtype).tiny)  # 0 would make NaN of a zero gradient
        return self._clip(estimate.clamp_(min=floor).rsqrt_().mul_(g))

    def describe(self) -> str:
        return "adafactor"


def _rms(x: Tensor) -> Tensor:
    return x.norm().div_(max(1, x.numel()) ** 0.5)
