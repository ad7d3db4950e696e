"""Orthogonalisation of a matrix: the quintic Newton-Schulz iteration of Muon (Jordan 2024, kellerjordan.github.io/posts/muon), or the exact
polar factor U V^T.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_whole
from tare.kernels import gemm, symmetric
from tare.kernels.paper import few
from tare.rules.postmap import PostMap

# Chosen by Jordan for the steepest slope at zero (a^5 = 485 over five steps), not for convergence to 1: singular values in
# [0.003, 1] land in [0.68, 1.2], which is near enough for a direction.
A, B, C = 3.4445, -4.7750, 2.0315
GUARD = 1e-7  # added to the norm, so that zero stays zero
BLOCK = 256  # columns that one product takes at a time where the iterate is changed in place
TOGETHER = 5  # steps taken on the Gram matrix before the iterate itself is formed
LONG = 1.3  # ratio of the sides from which on that is less work
SMALL = 768  # rows up to which three matrices [s, s] are little memory, whatever the ratio

Form = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Orthogonal(PostMap):
    """U V^T of X = U S V^T, nearly (Newton-Schulz) or exactly (svd).

    Args:
        steps: Newton-Schulz steps (5 in Muon and Scion).
        dtype: in which the iterate is kept: `bf16` as published, or `fp32` (fp64 for fp64 input). Where a processor has no
            bf16 units, the products on a bf16 iterate are done in fp32: the same or better numbers, many times faster.
        backend: `newton-schulz`, or `svd`: exact; directions below 1e-6 of the largest singular value are dropped.
    """

    steps: int = 5
    dtype: Form = "bf16"
    backend: Literal["newton-schulz", "svd"] = "newton-schulz"

    def __post_init__(self) -> None:
        check_whole("steps", self.steps)
        check_choice("dtype", self.dtype, ("bf16", "fp32"))
        check_choice("backend", self.backend, ("newton-schulz", "svd"))

    def __call__(self, x: Tensor) -> Tensor:
        return self._map(x, spent=False).to(x.dtype)

    def consume(self, x: Tensor) -> Tensor:
        """The result may be narrower than x: bf16."""
        return self._map(x, spent=True)

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.backend == "newton-schulz" and self.dtype == "bf16" else dtype

    @property
    def workspace(self) -> float:
        """The iterate, the Gram matrix and some blocks; the SVD its factors too."""
        return 4.0 if self.backend == "svd" else 1.6 if self.dtype == "bf16" else 2.2

    def _map(self, x: Tensor, spent: bool) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        matrix = x if x.ndim > 1 else x.reshape(1, -1)
        u = polar(matrix) if self.backend == "svd" else newton_schulz(matrix, self.steps, self.dtype, spent)
        return u.reshape(x.shape)

    def describe(self) -> str:
        return "polar factor" if self.backend == "svd" else f"newton-schulz {self.steps}, {self.dtype}"


PUBLISHED = Orthogonal()  # as Muon and Scion have it


def newton_schulz(x: Tensor, steps: int = 5, dtype: Form = "bf16", spent: bool = False) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T on the shorter side, from X / (|X|_F + 1e-7), for each of x [..., m, n].

    spent: x may be overwritten with the result. The result is bf16 where the iterate is.
    """
    kept = torch.bfloat16 if dtype == "bf16" else x.dtype
    z = x if spent and x.dtype == kept else x.to(kept, copy=True)
    tall = z.shape[-2] > z.shape[-1]
    if z.device.type != "cpu" or (kept == torch.bfloat16 and _has_bf16_units()):
        z.div_(_norm(z).to(kept) + GUARD)
        whole = _iterate_whole(z.mT if tall else z, steps)
        return whole.mT if tall else whole
    for part in z.view(-1, *z.shape[-2:]) if z.is_contiguous() else z.flatten(0, -3) if z.ndim > 2 else (z,):
        part.div_(_norm(part).to(kept) + GUARD)
        _iterate_in_place(part.mT if tall else part, steps)
    return z


def _norm(z: Tensor) -> Tensor:
    """Frobenius norms of [..., m, n], accumulated in 32 bits at least; on the CPU by blocks, since there it is cast first."""
    wide = torch.promote_types(z.dtype, torch.float32)
    if z.device.type != "cpu" or wide == z.dtype or z.ndim != 2:
        return torch.linalg.vector_norm(z, dim=(-2, -1), keepdim=True, dtype=wide)
    blocks = z.split(BLOCK)
    parts = z.new_empty(len(blocks), dtype=wide)
    for number, block in few(enumerate(blocks)):
        parts[number] = torch.linalg.vector_norm(block, dtype=wide)
    return torch.linalg.vector_norm(parts).view(1, 1)


def _iterate_whole(y: Tensor, steps: int) -> Tensor:
    """All of [..., s, l] at once, in its own dtype: three products a step."""
    for _ in range(steps):
        gram = y @ y.mT
        if y.ndim == 2:
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=B, alpha=C), y, beta=A)
        else:
            y = torch.add(A * y, (B * gram).add_(gram @ gram, alpha=C) @ y)
    return y


def _iterate_as_published(y: Tensor, steps: int) -> Tensor:
    """Small matrices in the published order of operations, which fp32 results follow to the last bit."""
    with gemm.fast_matmul():
        for _ in few(range(steps)):
            gram = y @ y.mT
            y = A * y + (B * gram + (C * gram) @ gram) @ y
    return y


def _iterate_in_place(y: Tensor, steps: int) -> None:
    """One matrix [s, l] in place, with fp32 products (fp64 for fp64) by blocks of columns.

    The polynomial b A + c A^2 is formed where it is small, or small beside X; else A is multiplied twice, which needs no second s x s.
    """
    side, length = y.shape
    if y.dtype.itemsize > 2 and side <= 2 * BLOCK:
        y.copy_(_iterate_as_published(y, steps))
        return
    if y.dtype.itemsize == 2 and length >= LONG * side and (side <= SMALL or length >= 4 * side):
        _iterate_by_gram(y, steps)
        return
    wide = torch.promote_types(y.dtype, torch.float32)
    polynomial = length >= 2 * side or side <= 2 * BLOCK
    width = BLOCK if length >= 2 * side or not polynomial else BLOCK // 2  # so that it needs no more memory
    gram = torch.empty(side, side, dtype=wide, device=y.device)
    blocks = y.split(width, dim=1) if y.dtype != wide or length > 2 * BLOCK else (y,)
    with gemm.fast_matmul():
        for _ in few(range(steps)):
            _gram_of(y, gram)
            poly = symmetric.polynomial(gram, B, C, torch.empty_like(gram)) if polynomial else gram
            for block in few(blocks):
                x = block.to(wide)  # the block itself where nothing is to be widened
                t = poly @ x
                if polynomial:
                    block.copy_(t.add_(x, alpha=A))
                else:
                    x = torch.addmm(t, poly, t, beta=B, alpha=C).add_(x, alpha=A)
                    block.copy_(x)


def _iterate_by_gram(y: Tensor, steps: int) -> None:
    """One bf16 matrix [s, l] in place, with fp32 products: X_k = Q_k X, Q_k = P_k .. P_1 with P = a I + b A + c A^2, A <- P A P.

    All of these are symmetric and commute, so that two products of a whole round are as long as X: the first and the last. What a
    squared condition number costs in fp32 is less than the rounding of every iterate to bf16 cost; X is rounded, and A made
    anew, after five steps, before the errors of its smallest eigenvalues, which grow by a^2 a step, are seen.
    """
    wide, side = torch.float32, y.shape[0]
    with gemm.fast_matmul():
        for done in range(0, steps, TOGETHER):
            count = min(TOGETHER, steps - done)
            a = _gram_of(y, torch.empty(side, side, dtype=wide, device=y.device))
            q = p = None
            for number in few(range(count)):
                p = symmetric.polynomial(a, B, C, torch.empty_like(a) if p is None or p is q else p)
                p.diagonal().add_(A)
                q = p if q is None else symmetric.multiply_(q, p)
                if number + 1 < count:
                    symmetric.multiply_(symmetric.multiply_(a, p), p)
            assert q is not None
            del a, p
            for block in few(y.split(BLOCK, dim=1)):
                block.copy_(q @ block.to(wide))


def _gram_of(y: Tensor, out: Tensor) -> Tensor:
    """Y Y^T in the dtype of `out`; what is narrower is widened by blocks of columns."""
    if y.dtype == out.dtype:
        return symmetric.gram(y, out)
    for number, block in few(enumerate(y.split(BLOCK, dim=1))):
        x = block.to(out.dtype)
        symmetric.lower(x, x.mT, out, beta=1.0 if number else 0.0)
    return symmetric.mirror_(out)


@cache
def _has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 natively. Without, torch's bf16 products take several times as long as fp32 ones."""
    cpu = torch.cpu
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(cpu, name)()) for name in asked if hasattr(cpu, name))


def polar(x: Tensor) -> Tensor:
    """The exact polar factor U V^T of each of x [..., m, n]; NaN where a matrix is not finite."""
    sick = ~torch.isfinite(x).all(-1, keepdim=True).all(-2, keepdim=True)
    u, s, vh = torch.linalg.svd(x.masked_fill(sick, 0.0), full_matrices=False)
    kept = (s > s[..., :1] * 1e-6).to(x.dtype)
    return ((u * kept.unsqueeze(-2)) @ vh).masked_fill_(sick, torch.nan)
