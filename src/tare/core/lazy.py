"""Lazy deltas: what is left of a gradient outside a subspace, an update that lives on a few rows or columns, and a map of either.

None is formed whole: they are written by blocks of rows, so that no full-size temporary exists, except where a map must see
the whole matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tare.core.delta import _BLOCK, Delta
from tare.kernels import gemm


@dataclass
class Outside(Delta):
    """U = scale * (grad - a * left @ right): what a projection leaves over. left [m, r], right [r, n]; batches as in grad."""

    grad: Tensor
    left: Tensor
    right: Tensor
    a: float = 1.0
    scale: float = 1.0

    def rows(self, start: int, stop: int) -> Tensor:
        left = self.left[start:stop] if self.left.ndim == self.grad.ndim else self.left
        right = self.right[start:stop] if self.right.ndim == 3 else self.right
        grad = self.grad[start:stop]
        with gemm.fast_matmul():
            if grad.ndim == 2:
                rest = torch.addmm(grad, left.to(grad.dtype), right.to(grad.dtype), alpha=-self.a)
            else:
                rest = grad - self.a * (left.to(grad.dtype) @ right.to(grad.dtype))
        return _scaled(rest.to(self.right.dtype), self.scale)


@dataclass
class Picked(Delta):
    """U = scale * u on the rows or columns `index` [k], zero elsewhere. dim: -2 for rows, -1 for columns, 0 for flat entries.

    u: [k, n], [m, k], or [k] for entries of a matrix of `shape`.
    """

    u: Tensor
    index: Tensor
    dim: int
    shape: tuple[int, ...]
    scale: float = 1.0
    lr_inside: bool = False

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        if beta != 1.0:
            weight.mul_(beta)
        if self.index.ndim == 1 and (self.dim != 0 or weight.is_contiguous()):
            target = weight.view(-1) if self.dim == 0 else weight
            target.index_add_(self.dim, self.index, self.u.to(weight.dtype), alpha=-alpha * self.scale)
        else:
            super().write(weight, alpha, 1.0)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._whole[start:stop]

    @cached_property
    def _whole(self) -> Tensor:
        out = self.u.new_zeros(self.shape)
        return place(out, self.u * self.scale, self.index, self.dim)

    @property
    def scaled(self) -> bool:
        return self.lr_inside


@dataclass
class Unpicked(Delta):
    """U = scale * grad with the picked rows, columns or entries set to zero."""

    grad: Tensor
    index: Tensor
    dim: int
    a: float = 1.0
    dtype: torch.dtype = torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.grad[start:stop].to(self.dtype, copy=True)
        keep = 1.0 - self.a
        if self.index.ndim > 1 or self.dim == 0 or (self.dim == -2 and self.grad.ndim == 2):
            # Rows and entries by number: only those of this block.
            width = 1 if self.dim == -2 and self.index.ndim == 1 else part[0].numel()
            if self.index.ndim > 1:
                return _fill(part, self.index[start:stop], self.dim, keep)
            first, last = start * width, start * width + part.shape[0] * width
            chosen = self.index[(self.index >= first) & (self.index < last)].long() - first
            flat = part.view(-1) if self.dim == 0 else part
            flat[chosen] = flat[chosen] * keep
            return part
        part.index_copy_(self.dim, self.index.long(), part.index_select(self.dim, self.index) * keep)
        return part


def _fill(part: Tensor, index: Tensor, dim: int, keep: float) -> Tensor:
    where = _expanded(index, part, dim)
    return part.scatter_(dim, where, part.gather(dim, where) * keep)


def _expanded(index: Tensor, like: Tensor, dim: int) -> Tensor:
    """Indices [E, k] against a batch of matrices, in the form of gather and scatter."""
    if dim == -2:
        return index.long().unsqueeze(-1).expand(-1, -1, like.shape[-1])
    return index.long().unsqueeze(-2).expand(-1, like.shape[-2], -1)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows (-2), columns (-1) or flat entries (0) of x by number."""
    if dim == 0:
        return x.reshape(-1).index_select(0, index)
    return x.index_select(dim, index) if index.ndim == 1 else x.gather(dim, _expanded(index, x, dim))


def place(out: Tensor, values: Tensor, index: Tensor, dim: int) -> Tensor:
    """out with `values` at the rows, columns or flat entries `index`, in place."""
    if dim == 0:
        out.view(-1).index_copy_(0, index.long(), values)
    elif index.ndim == 1:
        out.index_copy_(dim, index.long(), values)
    else:
        out.scatter_(dim, _expanded(index, out, dim), values)
    return out


@dataclass
class Mapped(Delta):
    """U = scale * map(inner). by_rows: whether the map may be applied to blocks of rows; otherwise `inner` is formed whole."""

    inner: Delta
    map: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    scale: float = 1.0
    by_rows: bool = False
    lr_inside: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        if self.by_rows:
            return _scaled(self.map(self.inner.rows(start, stop)), self.scale)
        return self._whole[start:stop]

    @cached_property
    def _whole(self) -> Tensor:
        return _scaled(self.map(self.inner.rows(0, self.shape[0])), self.scale)

    @property
    def scaled(self) -> bool:
        return self.lr_inside


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def squared_norm(delta: Delta, shape: tuple[int, ...], stack: int = 0) -> Tensor:
    """|U|^2 as a 0-d tensor, or one for each matrix of a batch (stack: its leading dimensions), by blocks of rows."""
    step = max(1, _BLOCK * shape[0] // max(1, math.prod(shape)))
    parts = []
    for start in range(0, shape[0], step):
        block = delta.rows(start, start + step)
        parts.append(block.square().flatten(stack).sum(-1))
    return torch.cat(parts) if stack else torch.stack(parts).sum()
