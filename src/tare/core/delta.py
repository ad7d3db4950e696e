"""Delta: the direction U of one step, kept lazy, so that W <- beta W - alpha U is one pass over W and no full-size temporary.

Every kind can also be materialised, whole or some rows, for the writes that round (stochastic) and for tests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tare.kernels import device, gemm
from tare.kernels.paper import few

_BLOCK = 1 << 18  # elements of a block of rows: it stays in cache


@dataclass
class Delta:
    """U [m, n] (or any shape for Dense). scaled: True when the rule has already multiplied by the learning rate."""

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        """W <- beta W - alpha U, in place, in the weight's own rounding: by blocks of rows, unless a kind knows better."""
        step = max(1, _BLOCK * weight.shape[0] // max(1, weight.numel()))
        for start in few(range(0, weight.shape[0], step)):
            part = weight[start : start + step]
            if beta != 1.0:
                part.mul_(beta)
            part.add_(self.rows(start, start + step), alpha=-alpha)

    def fused(self, weight: Tensor, alpha: float, beta: float, **rounding: Any) -> bool:
        """`write` in one kernel, rounded as told (key, start, low), where the device has one; False: nothing was touched."""
        return False

    def rows(self, start: int, stop: int) -> Tensor:
        """U[start:stop], materialised in the dtype of the arithmetic."""
        raise NotImplementedError

    @property
    def scaled(self) -> bool:
        return False


@dataclass
class Dense(Delta):
    """U = scale * u. correction: the bias-correction factor inside `scale`; a wrapper that needs the uncorrected
    direction uses `uncorrected`."""

    u: Tensor
    scale: float = 1.0
    correction: float = 1.0
    lr_inside: bool = False

    def fused(self, weight: Tensor, alpha: float, beta: float, **rounding: Any) -> bool:
        return device.write_(weight, self.u, decay=beta, alpha=alpha, scale=self.scale, **rounding)

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        if self.fused(weight, alpha, beta):
            return
        if self.u.dtype.itemsize < 4 and self.u.dtype != weight.dtype and self.u.shape == weight.shape != ():
            super().write(weight, alpha, beta)  # torch would first widen all of u
            return
        if beta != 1.0:
            weight.mul_(beta)
        weight.add_(self.u.view_as(weight) if self.u.shape != weight.shape else self.u, alpha=-alpha * self.scale)

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.u[start:stop] if self.u.ndim else self.u
        return (part.float() if part.dtype.itemsize < 4 else part) * self.scale

    @property
    def scaled(self) -> bool:
        return self.lr_inside

    @property
    def uncorrected(self) -> float:
        """Factor that turns `u` into the direction before bias correction."""
        return self.scale / self.correction


@dataclass
class LowRank(Delta):
    """U = scale * left @ right, left [m, r], right [r, n]; written by one in-place `addmm_`."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    lr_inside: bool = False

    def fused(self, weight: Tensor, alpha: float, beta: float, **rounding: Any) -> bool:
        return device.lift_(weight, self.left, self.right, decay=beta, alpha=alpha, scale=self.scale, **rounding)

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        left, right = self.left.to(weight.dtype), self.right.to(weight.dtype)
        with gemm.fast_matmul():
            if weight.ndim == 3:
                weight.baddbmm_(left, right.expand(weight.shape[0], -1, -1), beta=beta, alpha=-alpha * self.scale)
            else:
                weight.addmm_(left, right, beta=beta, alpha=-alpha * self.scale)

    def rows(self, start: int, stop: int) -> Tensor:
        with gemm.fast_matmul():
            right = self.right[start:stop] if self.right.ndim == 3 else self.right
            return (self.left[start:stop] @ right).mul_(self.scale)

    @property
    def scaled(self) -> bool:
        return self.lr_inside


@dataclass
class Scaled(Delta):
    """U = scale * grad * factor, factor [m, 1], [1, n] or 0-d: a broadcast, written by `addcmul_`."""

    grad: Tensor
    factor: Tensor
    scale: float = 1.0
    lr_inside: bool = False

    def fused(self, weight: Tensor, alpha: float, beta: float, **rounding: Any) -> bool:
        how = {"decay": beta, "alpha": alpha, "scale": self.scale, **rounding}
        return device.write_scaled_(weight, self.grad, self.factor, **how)

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        if self.fused(weight, alpha, beta):
            return
        if beta != 1.0:
            weight.mul_(beta)
        if weight.dtype == self.grad.dtype == self.factor.dtype:
            weight.addcmul_(self.grad, self.factor, value=-alpha * self.scale)
        else:  # 16-bit weights: the product is formed in fp32 by row blocks, and rounded once
            super().write(weight, alpha, 1.0)

    def rows(self, start: int, stop: int) -> Tensor:
        factor = self.factor[start:stop] if self.factor.ndim > 1 and self.factor.shape[0] > 1 else self.factor
        return self.grad[start:stop].to(self.factor.dtype) * (factor * self.scale)

    @property
    def scaled(self) -> bool:
        return self.lr_inside


@dataclass
class Sum(Delta):
    """U = the sum of its parts; the decay goes with the first."""

    parts: tuple[Delta, ...]

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        if weight.dtype in (torch.bfloat16, torch.float16):  # summed in fp32 by blocks of rows, and rounded once
            super().write(weight, alpha, beta)
            return
        for number, part in enumerate(self.parts):
            part.write(weight, alpha, beta if number == 0 else 1.0)

    def rows(self, start: int, stop: int) -> Tensor:
        total = self.parts[0].rows(start, stop)
        for part in self.parts[1:]:
            total = total + part.rows(start, stop)
        return total

    @property
    def scaled(self) -> bool:
        return self.parts[0].scaled


def materialise(delta: Delta, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """U whole, in `shape`: for tests and for weights that no view can reach."""
    rows = shape[0] if shape else 1
    return delta.rows(0, rows).reshape(shape)
