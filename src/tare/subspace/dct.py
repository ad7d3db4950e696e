"""DCT basis: the columns of a fixed orthogonal cosine matrix that align best with the gradient (Modoranu et al. 2025, arXiv 2505.17967).

Only int32 column numbers are kept for a leaf; the s x s matrix is a constant, made once for each size and device.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tare.core.checks import check_choice, check_whole
from tare.core.errors import InputError
from tare.core.tensors import is_fake
from tare.core.transform import StateSpec
from tare.kernels import gemm
from tare.kernels.paper import few
from tare.subspace.bases import Basis, Turn
from tare.subspace.coordinates import gathered, top
from tare.subspace.projection import Matrix, Projection, Side

_BLOCK = 1 << 18  # elements made at once
LEAST = 8  # sides from which on the products go by FFT


@functools.lru_cache(maxsize=32)
def dct_matrix(size: int, dtype: torch.dtype, device: str) -> Tensor:
    """D [s, s], D[i, j] = sqrt(2 / s) cos(pi i (2 j + 1) / (2 s)), row 0 times sqrt(1/2): orthogonal.

    The angle is reduced in integers first (its period is 4 s), so that large sizes lose nothing.
    """
    d = torch.empty(size, size, dtype=dtype)
    j = torch.arange(size, dtype=torch.int64).unsqueeze(0)
    for rows in torch.arange(size, dtype=torch.int64).unsqueeze(1).split(max(1, _BLOCK // size)):
        angle = (rows * (2 * j + 1)) % (4 * size)
        part = torch.cos(angle.double() * (math.pi / (2 * size))) * math.sqrt(2.0 / size)
        d[rows[0, 0] : rows[-1, 0] + 1] = torch.where(rows == 0, part * math.sqrt(0.5), part)
    return d.to(device)


@functools.lru_cache(maxsize=32)
def _blank(size: int, dtype: torch.dtype, device: str) -> Tensor:
    """What stands for D where only shapes matter: never filled, so that a rehearsal of a large model is quick and small."""
    return torch.empty(size, size, dtype=dtype, device=device)


def cosine_products(rows: Tensor, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """rows @ D for rows [l, s], or rows @ D^T, by one real FFT of length s for each (Makhoul 1980); columns as in `order`."""
    s = rows.shape[-1]
    h, turn = s // 2 + 1, _beside(rows, _turns, s, transposed, rows.dtype)
    if transposed:  # DCT-II
        spectrum = torch.fft.rfft(torch.cat((rows[:, ::2], rows[:, 1::2].flip(1)), 1)).mul_(turn)
        return torch.cat((spectrum.real, spectrum.imag[:, 1 : s - h + 1].neg()), 1, out=out)
    low = rows[:, :h].contiguous()
    high = torch.cat((rows.new_zeros(rows.shape[0], 1), rows[:, s - h + 1 :].flip(1)), 1).neg_()
    spectrum = torch.complex(low, high).mul_(turn)
    del low, high
    return torch.fft.irfft(spectrum, n=s, out=out)


def order(size: int, transposed: bool = False) -> list[int]:
    """Which column of rows @ D (or D^T) stands where in `cosine_products`."""
    h = size // 2 + 1
    if transposed:
        return [*range(h), *range(size - 1, h - 1, -1)]
    return [*range(0, size, 2), *reversed(range(1, size, 2))]


def makhoul(rows: Tensor) -> Tensor:
    """DCT-II of every row (last dimension), orthonormal: rows @ D^T."""
    s = rows.shape[-1]
    found = cosine_products(rows.reshape(-1, s), transposed=True)
    return found.index_select(1, _places(s, True, rows.dtype, str(rows.device))).view(rows.shape)


@functools.lru_cache(maxsize=64)
def _places(size: int, transposed: bool, dtype: torch.dtype, device: str) -> Tensor:
    """Where each column of rows @ D (or D^T) stands in `cosine_products`."""
    places = torch.empty(size, dtype=torch.int64)
    places[torch.tensor(order(size, transposed))] = torch.arange(size)
    return places.to(device)


@functools.lru_cache(maxsize=64)
def _turns(size: int, transposed: bool, dtype: torch.dtype, device: str) -> Tensor:
    """Factors [s // 2 + 1] between a spectrum and the cosines, complex; dtype: of the numbers that are transformed."""
    k = torch.arange(size // 2 + 1, dtype=torch.float64)
    length = math.sqrt(2.0 / size) if transposed else math.sqrt(size / 2.0)
    turns = torch.polar(torch.full_like(k, length), k * (math.pi / (2 * size)) * (-1.0 if transposed else 1.0))
    turns[0] *= math.sqrt(0.5) if transposed else math.sqrt(2.0)
    return turns.to(torch.complex128 if dtype == torch.float64 else torch.complex64).to(device)


def _beside(like: Tensor, table: Callable[..., Tensor], *what: Any) -> Tensor:
    """A table that is made once, on the device of `like`; no fake one under fake tensors, whose mode it would outlive."""
    with unset_fake_temporarily() if is_fake(like) else nullcontext():
        return table(*what, str(like.device))


@dataclass(frozen=True)
class DCTBasis(Basis):
    """The r columns of Q with the largest norm of (G Q)_j.

    transform: `matmul` takes Q = D, as code that scores by one product does; `makhoul` Q = D^T, as code that scores by an FFT.
    They are different bases; here both go by FFT where that is less work. norm: 1 (the published score) or 2 (the one that
    minimises the projection error).
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
        return self._chosen(grad, side, None)

    def watching(self) -> "DCTBasis":
        return _Watching(self.rank, self.transform, self.norm)

    def _chosen(self, grad: Tensor, side: Side, seen: list[Tensor] | None) -> Tensor:
        """The numbers. seen: takes R, which is among the products that are scored."""
        g = grad if side == "right" else grad.mT  # [.., l, s]
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        size, rank = g.shape[-1], self.rank_of(g.shape[-1])
        if g.ndim > 2 or g.device.type != "cpu" or size < LEAST:
            with gemm.fast_matmul():
                products = g.to(dtype) @ self._matrix(size, g, dtype)
            chosen = top(self._score(products), rank)
            if seen is not None:
                seen.append(_columns(products, chosen, side))
            return chosen
        transposed = self.transform == "makhoul"
        whole = torch.empty(g.shape, dtype=dtype, device=g.device) if seen is not None else None
        score = torch.zeros(size, dtype=dtype, device=g.device)
        height = max(1, _BLOCK // size)
        for start in few(range(0, g.shape[0], height)):
            part = slice(start, start + height)
            score += self._score(cosine_products(g[part].to(dtype), transposed, None if whole is None else whole[part]))
        places = _beside(g, _places, size, transposed, dtype)
        chosen = top(score.index_select(0, places), rank)
        if seen is not None:
            assert whole is not None
            seen.append(_columns(whole, places.index_select(0, chosen), side))
        return chosen

    def _score(self, products: Tensor) -> Tensor:
        return products.abs().sum(-2) if self.norm == 1 else products.square().sum(-2)

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        size = g.shape[-2] if side == "left" else g.shape[-1]
        table = self._matrix(size, g, dtype)
        if kept.ndim == 1:
            p = table.index_select(1, kept)
        else:
            p = table.mT[kept.long()].mT  # [E, s, r]
        return Matrix(p, side, orthonormal=True)

    def _matrix(self, size: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Q beside `like`."""
        d = _beside(like, _blank if is_fake(like) else dct_matrix, size, dtype or like.dtype)
        return d if self.transform == "matmul" else d.mT

    def turn(self, old: Tensor, fresh: Tensor) -> Turn:
        return gathered(old, fresh)

    def shared(self, length: int) -> dict[str, int]:
        return {f"dct {length}": 4 * length * length}

    def describe(self) -> str:
        return "dct"


@dataclass(frozen=True)
class _Watching(DCTBasis):
    """The same basis for one refresh, which keeps R: its columns are among the products that are scored."""

    found: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        return self._chosen(grad, side, self.found)

    @property
    def seen(self) -> Tensor | None:
        return self.found[0] if self.found else None


def _columns(products: Tensor, numbers: Tensor, side: Side) -> Tensor:
    """R from G Q by the numbers of its columns: [l, r], or [r, l] on the left."""
    r = products.index_select(-1, numbers)
    return r if side == "right" else r.mT.contiguous()
