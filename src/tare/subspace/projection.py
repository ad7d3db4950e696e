"""Projection: a basis at work on one matrix [m, n], or on a batch [E, m, n], for one step: project, lift, what is left outside."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.core.delta import _BLOCK, Delta, Dense, LowRank
from tare.core.lazy import Outside, Picked, Unpicked, take
from tare.kernels import gemm, native_norms
from tare.kernels.paper import few

Side = Literal["left", "right"]


class Projection:
    """What a basis offers. side: `left` (R = P^T G) or `right` (R = G P). channel: the dimension of R whose norms belong
    to one channel of G, None where there are no channels. orthonormal: whether |lift(x)| = |x|."""

    side: Side
    orthonormal: bool = False

    @property
    def channel(self) -> int | None:
        return -2 if self.side == "left" else -1

    def project(self, g: Tensor) -> Tensor:
        """R, in the dtype of the arithmetic."""
        raise NotImplementedError

    def measured(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """R, and the norms of G's channels, kept as a dimension of size one, where they come with it for nothing."""
        return self.project(g), None

    def lift(self, direction: Dense, scale: float = 1.0) -> Delta:
        """The direction in the full space, times `scale`."""
        raise NotImplementedError

    def outside(self, g: Tensor, projected: Tensor, a: float) -> Delta:
        """G - a lift(R), lazily."""
        raise NotImplementedError

    def subtract_(self, g: Tensor, projected: Tensor, a: float) -> None:
        """G <- G - a lift(R), in place."""
        rest = self.outside(g, projected, a)
        step = max(1, _BLOCK * g.shape[0] // max(1, g.numel()))
        for start in few(range(0, g.shape[0], step)):
            g[start : start + step] = rest.rows(start, start + step)

    def squared_lengths(self, x: Tensor) -> Tensor:
        """Squared norms of the columns (left) or rows (right) of lift(x), kept as a dimension of size one."""
        raise NotImplementedError


@dataclass
class Matrix(Projection):
    """P [s, r], or a batch [E, s, r], dense."""

    p: Tensor
    side: Side
    orthonormal: bool = False

    def project(self, g: Tensor) -> Tensor:
        p, q = self.p, self.p.to(g.dtype)
        with gemm.fast_matmul():
            r = q.mT @ g if self.side == "left" else g @ q
        return r if r.dtype == p.dtype or p.dtype == torch.bfloat16 else r.to(p.dtype)

    def measured(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        if g.ndim == 2 and self.p.shape[-1] == 1 and self.p.dtype == torch.float32:  # one reading of G for both
            shape = (1, g.shape[1]) if self.side == "left" else (g.shape[0], 1)
            r, squares = (torch.empty(shape, dtype=self.p.dtype, device=g.device) for _ in range(2))
            if native_norms.project_one(g, self.p, self.side, r, squares):
                return r, squares.sqrt_()
        return self.project(g), None

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(left, right) whose product is lift(x)."""
        p = self.p if self.p.dtype == x.dtype else self.p.to(x.dtype)
        return (p, x) if self.side == "left" else (x, p.mT)

    def lift(self, direction: Dense, scale: float = 1.0) -> LowRank:
        left, right = self.factors(direction.u)
        return LowRank(left, right, scale * direction.scale, direction.lr_inside)

    def outside(self, g: Tensor, projected: Tensor, a: float) -> Outside:
        left, right = self.factors(projected)
        return Outside(g, left, right, a)

    def subtract_(self, g: Tensor, projected: Tensor, a: float) -> None:
        if g.ndim != 2 or g.dtype != projected.dtype:
            super().subtract_(g, projected, a)
            return
        left, right = self.factors(projected)
        with gemm.fast_matmul():
            g.addmm_(left, right, alpha=-a)

    def squared_lengths(self, x: Tensor) -> Tensor:
        dim = -2 if self.side == "left" else -1
        if self.orthonormal:
            return x.square().sum(dim, keepdim=True)
        p = self.p.to(x.dtype)
        with gemm.fast_matmul():
            gram = p.mT @ p  # [r, r]
            turned = gram @ x if self.side == "left" else x @ gram
        return turned.mul_(x).sum(dim, keepdim=True).clamp_(min=0.0)


@dataclass
class Coordinates(Projection):
    """Some rows (left), columns (right) or flat entries of the matrix, by number: index [k] int32, or [E, k] for a batch."""

    index: Tensor
    side: Side
    shape: tuple[int, ...]
    dtype: torch.dtype
    entries: bool = False
    orthonormal: bool = True

    @property
    def dim(self) -> int:
        return 0 if self.entries else -2 if self.side == "left" else -1

    @property
    def channel(self) -> int | None:
        return None if self.entries else super().channel

    def project(self, g: Tensor) -> Tensor:
        return take(g, self.index, self.dim).to(self.dtype)

    def lift(self, direction: Dense, scale: float = 1.0) -> Picked:
        return Picked(direction.u, self.index, self.dim, self.shape, scale * direction.scale, direction.lr_inside)

    def outside(self, g: Tensor, projected: Tensor, a: float) -> Unpicked:
        return Unpicked(g, self.index, self.dim, a, self.dtype)

    def squared_lengths(self, x: Tensor) -> Tensor:
        channel = self.channel
        return x.square().sum() if channel is None else x.square().sum(channel, keepdim=True)


@dataclass
class Heads(Projection):
    """One basis P [d, r] for every head of a weight whose rows are heads: G [h d, n], R [h r, n] (GaLore+)."""

    p: Tensor
    heads: int
    orthonormal: bool = True
    side: Side = "left"

    def project(self, g: Tensor) -> Tensor:
        d, r = self.p.shape
        with gemm.fast_matmul():
            out = self.p.to(g.dtype).mT @ g.reshape(self.heads, d, g.shape[-1])
        return out.reshape(self.heads * r, g.shape[-1]).to(self.p.dtype)

    def _lifted(self, x: Tensor) -> Tensor:
        d, r = self.p.shape
        with gemm.fast_matmul():
            return (self.p.to(x.dtype) @ x.view(self.heads, r, x.shape[-1])).reshape(self.heads * d, x.shape[-1])

    def lift(self, direction: Dense, scale: float = 1.0) -> Dense:
        return Dense(self._lifted(direction.u), scale * direction.scale, lr_inside=direction.lr_inside)

    def outside(self, g: Tensor, projected: Tensor, a: float) -> Dense:
        return Dense(self._lifted(projected).mul_(-a).add_(g))

    def squared_lengths(self, x: Tensor) -> Tensor:
        return x.square().sum(-2, keepdim=True)
