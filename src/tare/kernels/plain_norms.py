"""Passes over a matrix in plain torch operations: the twins of `native_norms`, for any device and floating dtype."""

from typing import Literal

import torch
from torch import Tensor

from tare.kernels.paper import few

_BLOCK = 1 << 18  # elements: the products of a block stay in cache


def squares(x: Tensor, lines: Literal["rows", "columns"]) -> Tensor:
    """Squared norms of the rows [m] or columns [n] of x [m, n], in its dtype.

    `vecdot` down the columns is 4-6 times faster than `vector_norm` there; along rows `vector_norm` is the faster one.
    """
    if lines == "rows":
        return torch.linalg.vector_norm(x, dim=-1).square_()
    blocks = x.split(max(1, _BLOCK // max(1, x.shape[1])))  # by row blocks, because vecdot forms the products
    total: Tensor = torch.linalg.vecdot(blocks[0], blocks[0], dim=0)
    for block in few(blocks[1:]):
        total += torch.linalg.vecdot(block, block, dim=0)
    return total


def project_one(grad: Tensor, vector: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """R = p^T G [n] (left) or G p [m], and the squared norms of G's columns (left) or rows, in the dtype of p."""
    g = grad.to(vector.dtype)
    p = vector.reshape(-1)
    return (g.mT @ p, squares(g, "columns")) if side == "left" else (g @ p, squares(g, "rows"))


def inner(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """<a, b> and |a|^2 along `dim` of a, b [.., m, n], kept as a dimension of size one."""
    return tuple(torch.linalg.vecdot(a, x, dim=dim).unsqueeze(dim) for x in (b, a))


def sinkhorn(x: Tensor, iterations: int, out: Tensor) -> None:
    """Rows, then columns, of each of x [..., m, n] to unit root mean square, `iterations` times, into `out`.

    The iterates are diag(r) X diag(c), so that only r [m, 1] and c [1, n] change: each half-step is one product of X * X with a
    vector, and X is scaled once at the end. Rows and columns of zeros stay zero.
    """
    m, n = x.shape[-2:]
    peak = _peak(x)
    peak.masked_fill_(peak == 0, 1.0)
    square = torch.div(x, peak, out=out).square_()  # [m, n] in [0, 1]: no square of a float32 gradient is lost
    r, c = square, square.new_ones(*x.shape[:-2], n, 1)  # squares of the factors
    for _ in range(iterations):
        r = _inverse(square @ c, n)  # [m, 1]
        c = _inverse(square.mT @ r, m)  # [n, 1]
    torch.mul(x, r.sqrt_().div_(peak), out=out).mul_(c.sqrt_().mT)


def _peak(x: Tensor) -> Tensor:
    """Largest magnitude of each matrix, [..., 1, 1]; NaN if there is one."""
    if x.ndim > 2 or x.device.type != "cpu":
        return torch.linalg.vector_norm(x, torch.inf, dim=(-2, -1), keepdim=True)
    low, high = torch.aminmax(x)  # many times faster than a norm, on the CPU
    return torch.maximum(-low, high).view(1, 1)


def _inverse(total: Tensor, size: int) -> Tensor:
    """size / total; 0 where nothing is there to scale, NaN where the total is NaN."""
    return torch.where(total == 0, total, size / total)


def mirror_(square: Tensor, width: int) -> None:
    """Above the diagonal of a square matrix what lies below it, by blocks of `width`; blocks on the diagonal are whole already."""
    for start in range(width, square.shape[0], width):
        stop = min(start + width, square.shape[0])
        square[:start, start:stop].copy_(square[start:stop, :start].mT)
