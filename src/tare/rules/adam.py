"""Adam (Kingma & Ba 2015, arXiv 1412.6980) with decoupled decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

Plain twin in `update`; `update_many` reaches torch's fused kernel, or the native ones for 8-bit, 4-bit and 16-bit storage.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.random import make_key
from tare.core.state import State
from tare.core.storage import LOW, Slot
from tare.core.transform import StateSpec, Step, Transform, Work
from tare.kernels import calls, native, native16, native_fourbit
from tare.kernels.triton import dispatch


@dataclass(frozen=True)
class Adam(Transform):
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; U = c_t m / (sqrt(v) + eps), c_t = sqrt(1-b2^t) / (1-b1^t).

    eps_placement: `before` adds eps as written here, before bias correction (GaLore, Fira, APOLLO repositories);
    `after` adds it to the corrected root, that is eps * sqrt(1-b2^t) above (torch, bitsandbytes, the paper).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_placement: Literal["before", "after"] = "after"

    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_number("eps", self.eps)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(leaf.shape), "exp_avg_sq": StateSpec(leaf.shape, signed=False)}

    def factors(self, step: Step) -> tuple[float, float, float, float]:
        """(b1, b2, c_t, eps as it stands beside sqrt(v))."""
        b1, b2 = step.betas(self.betas)
        root = math.sqrt(1.0 - b2**step.count)
        eps = self.eps if self.eps_placement == "before" else self.eps * root
        return b1, b2, root / (1.0 - b1**step.count), eps

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        return self._direction(grad, state, step, spent=False)

    def consume(self, grad: Tensor, state: State, step: Step) -> Dense:
        return self._direction(grad, state, step, spent=True)

    def _direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Dense:
        quantised = self._native_direction(grad, state, step, spent)
        if quantised is not None:
            return quantised
        b1, b2, c, eps = self.factors(step)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if self._small_fused(grad, m, v):
            return self._fused_direction(grad, m, v, step, spent)
        g = grad.to(m.dtype).view_as(m)
        m.mul_(b1).add_(g, alpha=1.0 - b1)
        v.mul_(b2).addcmul_(g, g, value=1.0 - b2)
        return Dense(m / v.sqrt().add_(eps), scale=c, correction=c)

    @staticmethod
    def _small_fused(grad: Tensor, m: Tensor, v: Tensor) -> bool:
        same = grad.dtype == m.dtype == v.dtype and grad.dtype in (torch.float32, torch.float64)
        tracing = torch.compiler.is_compiling()  # the kernel's numbers would be constants: compiled at every step
        dense = grad.is_contiguous() and m.is_contiguous() and v.is_contiguous() and grad.shape == m.shape
        return same and dense and not tracing

    def _fused_direction(self, grad: Tensor, m: Tensor, v: Tensor, step: Step, spent: bool) -> Dense:
        """The fused kernel on a zero tensor in place of the parameter gives u = -U: the plain twin's numbers, one pass.

        Where the gradient is spent, it stands in the place of the parameter itself, and a decay of 1 makes it zero.
        """
        b1, b2, c, eps = self.factors(step)
        u = grad if spent else torch.zeros_like(grad)
        if dispatch.wants(grad) and native16.adamw16_(
            u, grad, m, v, alpha=1.0, decay=0.0, beta1=b1, beta2=b2, eps=eps
        ):  # on a GPU: one launch, and no tensor for the count of steps
            return Dense(u, scale=-c, correction=c)
        self._fused([u], [grad], [m], [v], step, lr=1.0, weight_decay=1.0 if spent else 0.0, maximize=False)
        return Dense(u, scale=-1.0, correction=c)

    def _native_direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Dense | None:
        """The same with 8-bit or 4-bit moments, by the native kernel, without decoding them whole; None where it cannot."""
        slots, raw = state.slots, state.raw
        fused = _quantised(slots)
        if state.window is not None or fused is None:
            return None
        if grad.dtype != torch.float32 or not grad.is_contiguous() or not calls.ready(grad):
            return None
        b1, b2, c, eps = self.factors(step)
        u = grad if spent else torch.zeros_like(grad)
        done = fused(
            u, grad, raw["exp_avg_codes"], raw["exp_avg_absmax"], raw["exp_avg_sq_codes"], raw["exp_avg_sq_absmax"],
            alpha=1.0, decay=0.0, beta1=b1, beta2=b2, eps=eps, block=slots["exp_avg"].block,
        )  # fmt: skip
        return Dense(u, scale=-c, correction=c) if done else None

    def _fused(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        ms: list[Tensor],
        vs: list[Tensor],
        step: Step,
        *,
        lr: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        b1, b2 = step.betas(self.betas)
        # The kernel adds eps after bias correction; dividing by sqrt(1 - b2^t) moves it before, exactly.
        eps = self.eps if self.eps_placement == "after" else self.eps / math.sqrt(1.0 - b2**step.count)
        count = torch.scalar_tensor(step.count, dtype=torch.float32, device=weights[0].device)
        torch._fused_adamw_(
            weights, grads, ms, vs, [], [count] * len(weights), lr=lr, beta1=b1, beta2=b2,
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=maximize,
        )  # fmt: skip

    def update_many(self, batch: list[Work]) -> list[Work]:
        rest: list[Work] = []
        fused: dict[tuple[object, ...], list[Work]] = defaultdict(list)
        for work in batch:
            m, v = work.state.slots["exp_avg"], work.state.slots["exp_avg_sq"]
            if m.form == v.form == "plain" and self._takes(work):
                betas = work.step.betas(self.betas)
                place = (work.weight.device, work.weight.dtype)  # one launch takes one of each
                fused[work.step.count, work.step.lr, work.weight_decay, betas, place].append(work)
            elif not (self._sixteen(work) or self._native(work)):
                rest.append(work)
        for works in fused.values():
            first = works[0]
            # Decay after the update is decay before it with both lr and wd rescaled: one pass either way.
            wd = first.weight_decay / (first.shrink if first.decay == "after" else 1.0)
            self._fused(
                [w.weight for w in works], [w.grad for w in works],
                [w.state.raw["exp_avg"] for w in works], [w.state.raw["exp_avg_sq"] for w in works],
                first.step, lr=first.gain, weight_decay=wd, maximize=first.maximize,
            )  # fmt: skip
        return rest

    @staticmethod
    def _takes(work: Work) -> bool:
        m, v = work.state.raw["exp_avg"], work.state.raw["exp_avg_sq"]
        tensors = (work.weight, work.grad, m, v)
        return (
            work.weight.dtype in (torch.float32, torch.float64)
            and all(t.dtype == work.weight.dtype and t.is_contiguous() for t in tensors)
            and work.weight.numel() > 0
            and work.shrink > 0.0
        )

    def _sixteen(self, work: Work) -> bool:
        """bf16 weights, split ones too, or bf16 moments: one pass by the native kernel; False where it cannot."""
        state = work.state
        m, v = state.slots["exp_avg"], state.slots["exp_avg_sq"]
        rounded = m.form == v.form == "bf16"
        if not rounded and not (m.form == v.form == "plain" and m.dtype == v.dtype == torch.float32):
            return False  # quantised, or the bf16 arithmetic of `bf16_legacy`
        b1, b2, c, eps = self.factors(work.step)
        return native16.adamw16_(
            work.weight, work.grad, state.raw["exp_avg"], state.raw["exp_avg_sq"], state.raw.get(LOW),
            alpha=work.gain * c, decay=work.shrink, beta1=b1, beta2=b2, eps=eps, ascend=work.maximize, key=work.noise,
            keys=(make_key(state.key, "exp_avg"), make_key(state.key, "exp_avg_sq")) if rounded else None,
        )  # fmt: skip

    def _native(self, work: Work) -> bool:
        b1, b2, c, eps = self.factors(work.step)
        raw, fused = work.state.raw, _quantised(work.state.slots)
        if work.maximize or fused is None or LOW in raw:
            return False
        return fused(
            work.weight, work.grad, raw["exp_avg_codes"], raw["exp_avg_absmax"], raw["exp_avg_sq_codes"],
            raw["exp_avg_sq_absmax"], alpha=work.gain * c, decay=work.shrink, beta1=b1, beta2=b2, eps=eps,
            block=work.state.slots["exp_avg"].block, key=work.noise,
        )  # fmt: skip


def _quantised(slots: dict[str, Slot]) -> Callable[..., bool] | None:
    """The native kernel for moments kept in this form, or None."""
    m, v = slots["exp_avg"], slots["exp_avg_sq"]
    if m.form != v.form or m.block != v.block:
        return None
    return {"int8": native.adamw8bit_, "int4": native_fourbit.adamw4bit_}.get(m.form)
