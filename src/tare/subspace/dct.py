"""DCT basis: the columns of a fixed orthogonal cosine matrix that align best with the gradient (Modoranu et al. 2025, arXiv 2505.17967).

Only int32 column numbers are kept for a leaf; the s x s matrix is a constant, made once for each size and device.
"""

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tare.core.checks import check_choice, check_whole
from tare.core.errors import InputError
from tare.core.tensors import is_fake
from tare.core.transform import StateSpec
from tare.kernels import gemm
from tare.subspace.bases import Basis, Turn
from tare.subspace.coordinates import gathered, top
from tare.subspace.projection import Matrix, Projection, Side


@functools.lru_cache(maxsize=32)
def dct_matrix(size: int, dtype: torch.dtype, device: str) -> Tensor:
    """D [s, s], D[i, j] = sqrt(2 / s) cos(pi i (2 j + 1) / (2 s)), row 0 times sqrt(1/2): orthogonal.

    The angle is reduced in integers first (its period is 4 s), so that large sizes lose nothing.
    """
    i = torch.arange(size, dtype=torch.int64).unsqueeze(1)
    j = torch.arange(size, dtype=torch.int64).unsqueeze(0)
    angle = (i * (2 * j + 1)) % (4 * size)
    d = torch.cos(angle.double() * (math.pi / (2 * size))) * math.sqrt(2.0 / size)
    d[0] *= math.sqrt(0.5)
    return d.to(dtype).to(device)


def makhoul(rows: Tensor) -> Tensor:
    """DCT-II of every row (last dimension), orthonormal: rows @ D^T by one FFT of length s (Makhoul 1980)."""
    s = rows.shape[-1]
    order = torch.cat((rows[..., ::2], rows[..., 1::2].flip(-1)), -1)
    spectrum = torch.fft.fft(order, dim=-1)
    k = torch.arange(s, device=rows.device, dtype=rows.dtype)
    turn = torch.polar(torch.ones_like(k), k * (-math.pi / (2 * s)))
    out = (spectrum * turn).real.mul_(math.sqrt(2.0 / s))
    out[..., 0] *= math.sqrt(0.5)
    return out


@dataclass(frozen=True)
class DCTBasis(Basis):
    """The r columns of Q with the largest norm of (G Q)_j.

    transform: `matmul` takes Q = D and scores by one product; `makhoul` takes Q = D^T and scores by FFT. They are different
    bases. norm: 1 (the published score) or 2 (the one that minimises the projection error).
    """

    transform: Literal["matmul", "makhoul"] = "matmul"
    norm: int = 1

    comparable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("transform", self.transform, ("matmul", "makhoul"))
        if check_whole("norm", self.norm) > 2:
            raise InputError(f"norm: {self.norm!r} is not offered; 1 is the published score, 2 minimises the error")

    def kept(self, length: int, stack: tuple[int, ...] = (), other: int = 0) -> StateSpec:
        return StateSpec((*stack, self.rank_of(length)), "basis", dtype=torch.int32)

    def fallback(self, spec: StateSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.arange(spec.shape[-1], dtype=torch.int32, device=device).expand(spec.shape).clone()

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        g = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
        g = g if side == "right" else g.mT  # [.., l, s]
        if self.transform == "makhoul":
            s = makhoul(g)
        else:
            with gemm.fast_matmul():
                s = g @ self._matrix(g.shape[-1], g)
        score = s.abs().sum(-2) if self.norm == 1 else s.square().sum(-2)
        return top(score, self.rank_of(g.shape[-1]))

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        size = g.shape[-2] if side == "left" else g.shape[-1]
        table = self._matrix(size, g, dtype)
        if kept.ndim == 1:
            p = table.index_select(1, kept)
        else:
            p = table.mT[kept.long()].mT  # [E, s, r]
        return Matrix(p, side, orthonormal=True)

    def _matrix(self, size: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Q beside `like`; a real one under fake tensors too, since it is kept and would outlive their mode."""
        device = str(like.device)
        with unset_fake_temporarily() if is_fake(like) else nullcontext():
            d = dct_matrix(size, dtype or like.dtype, device)
        return d if self.transform == "matmul" else d.mT

    def turn(self, old: Tensor, fresh: Tensor) -> Turn:
        return gathered(old, fresh)

    def shared(self, length: int) -> dict[str, int]:
        return {f"dct {length}": 4 * length * length}

    def describe(self) -> str:
        return "dct"
