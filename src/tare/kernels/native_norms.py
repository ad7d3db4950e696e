"""Native passes over one matrix, called through ctypes; see `native` for how they are built, trusted and refused.

The twins are in `plain_norms`; sums are gathered in another order than there, so the results agree to rounding, and are the same for
any number of threads.
"""

from typing import Literal

import torch
from torch import Tensor

from tare.kernels import library
from tare.kernels.calls import FLOATS, FP32, fits, kernel, written


@kernel
def squares(x: Tensor, lines: Literal["rows", "columns"], out: Tensor) -> bool:
    """Squared norms of the rows or columns of x [m, n], fp32 or bf16, in one reading of it.

    Args:
        x: contiguous, as all tensors here.
        lines: which.
        out: [m] or [n] fp32, overwritten.

    Returns:
        True when done; False when nothing was touched.
    """
    if x.ndim != 2 or not fits(x.numel(), (x, FLOATS, None), (out, FP32, x.shape[0 if lines == "rows" else 1])):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_squares(
        x.data_ptr(), x.dtype == torch.bfloat16, *x.shape, lines == "columns", out.data_ptr(), torch.get_num_threads()
    )
    written(out)
    return True


@kernel
def project_one(
    grad: Tensor, vector: Tensor, side: Literal["left", "right"], projected: Tensor, squares: Tensor
) -> bool:
    """R = p^T G (left) or G p (right) for a basis of one vector, and the squared norms of G's columns (left) or rows, in one reading.

    Args:
        grad: [m, n], fp32 or bf16.
        vector: p, fp32: m elements on the left, n on the right.
        side: which is projected.
        projected, squares: fp32, overwritten: n elements on the left, m on the right.

    Returns:
        True when done; False when nothing was touched.
    """
    if grad.ndim != 2:
        return False
    long, short = grad.shape if side == "right" else reversed(grad.shape)
    outputs = ((projected, FP32, long), (squares, FP32, long))
    if not fits(grad.numel(), (grad, FLOATS, None), (vector, FP32, short), *outputs):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_project(
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        vector.data_ptr(),
        *grad.shape,
        side == "left",
        projected.data_ptr(),
        squares.data_ptr(),
        torch.get_num_threads(),
    )
    written(projected, squares)
    return True


@kernel
def inner(a: Tensor, b: Tensor, lines: Literal["rows", "columns"], product: Tensor, square: Tensor) -> bool:
    """<a, b> and |a|^2 of the rows or columns of a, b [m, n], in one reading of both. fp32 only, outputs [m] or [n].

    Returns:
        True when done; False when nothing was touched.
    """
    size = a.shape[0 if lines == "rows" else 1] if a.ndim == 2 and a.shape == b.shape else 0
    if not size or not fits(a.numel(), (a, FP32, None), (b, FP32, None), (product, FP32, size), (square, FP32, size)):
        return False
    native = library.load()
    if native is None:
        return False
    places = (a.data_ptr(), b.data_ptr(), *a.shape, lines == "columns", product.data_ptr(), square.data_ptr())
    native.tare_inner(*places, torch.get_num_threads())
    written(product, square)
    return True


@kernel
def sinkhorn(x: Tensor, iterations: int, out: Tensor) -> bool:
    """Rows, then columns, of x [m, n] to unit root mean square, `iterations` times, into `out`: see `rules.sinkhorn`. fp32 only.

    Returns:
        True when done; False when nothing was touched.
    """
    if x.ndim != 2 or not fits(x.numel(), (x, FP32, None), (out, FP32, None)):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_sinkhorn(x.data_ptr(), *x.shape, iterations, out.data_ptr(), torch.get_num_threads())
    written(out)
    return True


@kernel
def mirror_(square: Tensor) -> bool:
    """a[i, j] <- a[j, i] above the diagonal of a square fp32 matrix.

    Returns:
        True when done; False when nothing was touched.
    """
    if square.ndim != 2 or square.shape[0] != square.shape[1] or not fits(square.numel(), (square, FP32, None)):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_mirror(square.data_ptr(), square.shape[0], torch.get_num_threads())
    written(square)
    return True
