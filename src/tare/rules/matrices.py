"""What rules on matrices share: a leaf's gradient as a matrix, interpolation and inner products by blocks of rows."""

import torch
from torch import Tensor

from tare.core.leaf import Leaf
from tare.kernels.paper import few

_BLOCK = 1 << 18  # elements combined at once: the temporaries stay in cache


def as_matrix(x: Tensor, leaf: Leaf) -> Tensor:
    """x as its leaf's matrix [m, n] or stack of matrices [E, m, n]; as it is where it has none, or is a chunk of its leaf."""
    if leaf.matrix is None or tuple(x.shape) == leaf.view or x.numel() != leaf.numel:
        return x
    return x.reshape(leaf.view)


def interpolate(m: Tensor, g: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """beta m + (1 - beta) g as a new contiguous tensor of `dtype`, by blocks of rows where it is narrower than the sum."""
    if dtype == m.dtype or m.ndim < 2:
        return torch.mul(m, beta).add_(g, alpha=1.0 - beta).to(dtype)
    out = torch.empty(m.shape, dtype=dtype, device=m.device)
    rows = max(1, _BLOCK * m.shape[0] // max(1, m.numel()))
    for start in few(range(0, m.shape[0], rows)):
        part = slice(start, start + rows)
        out[part] = torch.mul(m[part], beta).add_(g[part], alpha=1.0 - beta)
    return out


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> as a 0-d tensor in the wider of their dtypes, by blocks of rows."""
    if a.ndim < 2:
        return (a * b).sum()
    rows = max(1, _BLOCK * a.shape[0] // max(1, a.numel()))
    count = -(-a.shape[0] // rows)
    parts = torch.empty(count, dtype=torch.promote_types(a.dtype, b.dtype), device=a.device)
    for number in few(range(count)):
        part = slice(number * rows, (number + 1) * rows)
        parts[number] = (a[part] * b[part]).sum()
    return parts.sum()
