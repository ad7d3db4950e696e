"""Online basis: P follows the gradient by one optimizer step on an online-PCA loss at every update (Liang et al. 2024, arXiv 2408.12857).

loss(P) = ||P P^T H - H||_F^2 with H = G / ||G||_F, whose gradient needs only two thin products beyond R = P^T G.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_choice, check_number
from tare.core.tensors import whole_norm
from tare.core.transform import StateSpec
from tare.kernels import gemm
from tare.subspace.bases import Basis, SVDBasis
from tare.subspace.projection import Matrix, Projection, Side

Mover = Literal["adamw", "lion", "sgd"]


def pca_gradient(g: Tensor, p: Tensor, r: Tensor, side: Side) -> Tensor:
    """Gradient of ||P P^T H - H||_F^2 with respect to P [s, r]: 2 [P (P^T X) + X (P^T P) - 2 X], X = H H^T P.

    r: P^T G (left) or G P (right), which the step has anyway. A zero gradient gives zero.
    """
    square = whole_norm(g.to(p.dtype)).square_().clamp_min_(torch.finfo(p.dtype).tiny)
    with gemm.fast_matmul():
        x = g @ r.mT.to(g.dtype) if side == "left" else g.mT @ r.to(g.dtype)  # K P, [s, r]
        x = x.to(p.dtype).mul_(square.reciprocal_().mul_(2.0))  # 2 X
        inner = p.mT @ p  # [r, r], less 2 I: what X is multiplied by
        inner.diagonal().sub_(2.0)
        return (x @ inner).addmm_(p, p.mT @ x)


@dataclass(frozen=True)
class OnlineBasis(Basis):
    """Starts from the SVD of the first gradient; then P <- P - lr_P step(dloss/dP) after every update.

    Args:
        gap: lr_P = lr / (first lr * gap), as in the code: it follows the schedule of the weights. The first lr is the
            `reference_lr` of the leaf's parameter group; without one lr_P is lr / gap.
        mover: how P steps: `adamw` (published; its weight decay shrinks P), `lion` or `sgd`.
        betas, eps, weight_decay: of the mover (torch's AdamW defaults, as published).
        orthogonality: lambda of the paper's lambda ||P^T P - I||_F^2; 0 in the code.
    """

    gap: int = 200
    mover: Mover = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    orthogonality: float = 0.0
    start: Basis | None = field(default=None)

    orthonormal: ClassVar[bool] = False
    moves: ClassVar[bool] = True
    two_sided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gap", self.gap)
        check_choice("mover", self.mover, ("adamw", "lion", "sgd"))
        check_betas(self.betas)
        check_number("eps", self.eps)
        check_number("basis weight_decay", self.weight_decay, 0.0, inclusive=True)
        check_number("orthogonality", self.orthogonality, 0.0, inclusive=True)

    def extra(self, length: int, stack: tuple[int, ...] = ()) -> dict[str, StateSpec]:
        shape = (*stack, length, self.rank_of(length))
        specs = {"basis_steps": StateSpec((), "count")}
        if self.mover != "sgd":
            specs["basis_exp_avg"] = StateSpec(shape)
        if self.mover == "adamw":
            specs["basis_exp_avg_sq"] = StateSpec(shape, signed=False)
        return specs

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        return (self.start or SVDBasis(self.rank)).compute(grad, side, previous, key, index)

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        return Matrix(kept.clone(), side)  # a copy: `follow` changes what is kept before the lift is written

    def follow(self, g: Tensor, projected: Tensor, at: Projection, state: Any, step: Any) -> None:
        if state["refreshed_at"] == step.count - 1:  # P was found from this very gradient
            return
        assert isinstance(at, Matrix)
        p = at.p.to(projected.dtype)
        if g.ndim == 3:
            slope = torch.stack([pca_gradient(a, b, c, at.side) for a, b, c in zip(g, p, projected, strict=True)])
        else:
            slope = pca_gradient(g, p, projected, at.side)
        if self.orthogonality:
            eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
            slope = slope + 4.0 * self.orthogonality * (p @ (p.mT @ p - eye))
        state["basis_steps"] += 1
        lr = step.lr / (float(step.options.get("reference_lr", 1.0)) or 1.0) / self.gap
        if not self._fused(slope, state, lr):
            moved = p * (1.0 - lr * self.weight_decay)
            state["basis"] = moved.sub_(self._direction(slope, state, state["basis_steps"]), alpha=lr)

    def _fused(self, slope: Tensor, state: Any, lr: float) -> bool:
        """AdamW's step by torch's kernel, basis included, in one pass; False where something is not kept as plain numbers."""
        names = ("basis", "basis_exp_avg", "basis_exp_avg_sq")
        if self.mover != "adamw" or torch.compiler.is_compiling() or any(state.slots[x].form != "plain" for x in names):
            return False
        p, m, v = (state[name] for name in names)
        if slope.dtype not in (torch.float32, torch.float64) or not p.dtype == m.dtype == v.dtype == slope.dtype:
            return False
        count = torch.scalar_tensor(state["basis_steps"], dtype=torch.float32, device=p.device)
        torch._fused_adamw_(
            [p], [slope.contiguous()], [m], [v], [], [count], lr=lr, beta1=self.betas[0], beta2=self.betas[1],
            weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return True

    def _direction(self, slope: Tensor, state: Any, count: int) -> Tensor:
        if self.mover == "sgd":
            return slope
        b1, b2 = self.betas
        m = state["basis_exp_avg"]
        if self.mover == "lion":
            u = torch.sign(b1 * m + (1.0 - b1) * slope)
            m.mul_(b2).add_(slope, alpha=1.0 - b2)
            return u
        v = state["basis_exp_avg_sq"]
        m.mul_(b1).add_(slope, alpha=1.0 - b1)
        v.mul_(b2).addcmul_(slope, slope, value=1.0 - b2)
        root = (v / (1.0 - b2**count)).sqrt_().add_(self.eps)
        return m / root / (1.0 - b1**count)

    def describe(self) -> str:
        return "online pca"


def projector_error(p: Tensor, g: Tensor, side: Side) -> float:
    """||P P^T - U U^T||_F / sqrt(2 r) with U the exact top-r directions of G: 0 when they span the same space."""
    exact = SVDBasis(p.shape[-1]).compute(g, side, None, 0)
    assert exact is not None
    q, u = torch.linalg.qr(p.double()).Q, exact.double()
    return float((q @ q.mT - u @ u.mT).norm()) / math.sqrt(2 * p.shape[-1])
