"""Whitening of a matrix, with the row normalisation that comes before it in SWAN (Ma et al. 2025, arXiv 2412.13148)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_whole
from tare.kernels import gemm, symmetric
from tare.kernels.paper import few
from tare.rules.postmap import PostMap

BLOCK = 256  # columns that are normalised at a time


@dataclass(frozen=True)
class Whiten(PostMap):
    """(X X^T)^(-1/2) X over the shorter side; a tall X is transposed first, so that the norms run along the longer side.

    Args:
        iterations: of the coupled Newton-Schulz iteration (the paper's 10); singular values below 1e-2 of the largest are
            only begun to be raised.
        rows: what is done before: `none`, `rms` (every row over its root mean square) or `centred` (its mean taken off, then
            over its standard deviation, as the paper has it).
        rescale: give the result the Frobenius norm of what was whitened.
        backend: `newton-schulz`, or `eigh`: the exact root, with directions below 1e-6 of the largest singular value dropped.
    """

    iterations: int = 10
    rows: Literal["none", "rms", "centred"] = "none"
    rescale: bool = False
    backend: Literal["newton-schulz", "eigh"] = "newton-schulz"

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations)
        check_choice("rows", self.rows, ("none", "rms", "centred"))
        check_choice("backend", self.backend, ("newton-schulz", "eigh"))

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        matrices = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, 1, -1)
        out = torch.empty_like(matrices, memory_format=torch.contiguous_format)
        for matrix, to in zip(matrices, out, strict=True):
            tall = matrix.shape[0] > matrix.shape[1]
            self._whiten(*((matrix.mT, to.mT) if tall else (matrix, to)))
        return out.view(x.shape)

    def _whiten(self, x: Tensor, out: Tensor) -> None:
        """One matrix [s, l]. The normalised rows are formed by blocks of columns, never whole."""
        shift, factor = row_factors(x, self.rows)  # [s, 1] each
        width = BLOCK if x.device.type == "cpu" else x.shape[1]
        pairs = list(zip(x.split(width, dim=1), out.split(width, dim=1), strict=True))

        def normalised(block: Tensor) -> Tensor:
            return block if self.rows == "none" else torch.sub(block, shift).mul_(factor)

        gram = torch.empty(x.shape[0], x.shape[0], dtype=x.dtype, device=x.device)
        with gemm.fast_matmul():
            for number, (block, _) in few(enumerate(pairs)):
                g = normalised(block)
                symmetric.lower(g, g.mT, gram, beta=1.0 if number else 0.0)
            symmetric.mirror_(gram)
            size = gram.diagonal().sum()  # |G|_F^2
            root = exact_root(gram) if self.backend == "eigh" else inverse_root_(gram, self.iterations)
            del gram
            for block, to in few(pairs):
                torch.mm(root, normalised(block), out=to)
        if self.rescale:
            norm = torch.linalg.vector_norm(out)
            out.mul_(torch.where(norm == 0, norm, size.sqrt() / norm))

    @property
    def workspace(self) -> float:
        """The result, and four of the shorter side squared."""
        return 5.0

    def describe(self) -> str:
        return f"whiten {self.iterations}" if self.backend == "newton-schulz" else "whiten, exact"


def row_factors(x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """(shift, factor) [s, 1] of SWAN's GradNorm (x - shift) * factor: rows of root mean square 1, of what is left after
    centring if asked. A row of zeros stays one; a row with a single entry is not centred, since nothing would be left.
    """
    shift = x.new_zeros(x.shape[0], 1)
    if how == "none":
        return shift, torch.ones_like(shift)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if how == "centred" and x.shape[1] > 1:
        shift = x.mean(1, keepdim=True)
        blocks = x.split(BLOCK, dim=1)
        length = torch.linalg.vector_norm(
            torch.cat([torch.linalg.vector_norm(block - shift, dim=1, keepdim=True) for block in blocks], 1),
            dim=1, keepdim=True,
        )  # fmt: skip
    return shift, torch.where(length == 0, length, x.shape[1] ** 0.5 / length)


def inverse_root_(a: Tensor, iterations: int) -> Tensor:
    """A^(-1/2) of a symmetric A [s, s], whose memory is taken, by Y <- Y T, Z <- T Z, T = (3 I - Z Y) / 2, from Y = A / |A|_F.

    The factors commute, so that their order does not matter, and every product is symmetric.
    """
    size = torch.linalg.vector_norm(a)
    size.masked_fill_(size == 0, 1.0)
    y = a.div_(size)
    z = y.mul(-0.5)  # Z = I at first
    z.diagonal().add_(1.5)
    t, spare = z.clone(), torch.empty_like(z)
    for _ in few(range(iterations - 1)):
        y, spare = symmetric.product(y, t, spare), y
        symmetric.product(z, y, t).mul_(-0.5).diagonal().add_(1.5)
        z, spare = symmetric.product(t, z, spare), z
    return z.div_(size.sqrt_())


def exact_root(a: Tensor) -> Tensor:
    """A^(-1/2) by the eigenvalues; NaN if A is not finite, zero in directions below 1e-6 of the largest singular value."""
    sick = ~torch.isfinite(a).all()
    values, vectors = torch.linalg.eigh(a.masked_fill(sick, 0.0))
    kept = values > values[-1:] * 1e-12
    scale = torch.where(kept, values.clamp_min(torch.finfo(a.dtype).tiny).rsqrt(), 0.0)
    return ((vectors * scale) @ vectors.mT).masked_fill_(sick, torch.nan)
