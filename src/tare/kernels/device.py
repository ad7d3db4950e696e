"""Fused writes and products that exist for GPUs only, called as the native kernels are: False (or None) means that nothing was touched.

On the CPU torch's own operations are as good, so there is nothing to call. The kernels of which both kinds exist need no name of their
own: a native entry point hands a CUDA tensor to its Triton counterpart (`calls.kernel`).
"""

from typing import Any, Literal

from torch import Tensor

from tare.kernels.triton import dispatch


def write_(weight: Tensor, update: Tensor, **how: Any) -> bool:
    """W <- round(decay W - alpha U) in one pass; see `triton.dense.write_`."""
    return dispatch.wants(weight) and bool(dispatch.kernel("dense.write_")(weight, update, **how))


def write_scaled_(weight: Tensor, grad: Tensor, factor: Tensor, **how: Any) -> bool:
    """W <- round(decay W - alpha G * (scale * factor)) in one pass; see `triton.dense.write_scaled_`."""
    return dispatch.wants(weight) and bool(dispatch.kernel("dense.write_scaled_")(weight, grad, factor, **how))


def lift_(weight: Tensor, left: Tensor, right: Tensor, **how: Any) -> bool:
    """W <- round(decay W - alpha scale left @ right) in one pass over W; see `triton.products.lift_`."""
    return dispatch.wants(weight) and bool(dispatch.kernel("products.lift_")(weight, left, right, **how))


def project(grad: Tensor, basis: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor] | None:
    """R and the squared norms of G's columns (`left`) or rows, in one reading of G; see `triton.products.project`."""
    if not dispatch.wants(grad):
        return None
    found: tuple[Tensor, Tensor] | None = dispatch.kernel("products.project")(grad, basis, side)
    return found
