"""Bases: what projects a gradient. Each computes P [s, r] for the left side (R = P^T G) or the right side (R = G P).

SVD (GaLore), the Gram matrix in float64 (the same basis, faster), a randomized range finder (warm-started), a Gaussian (APOLLO).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.core.random import normal
from tare.kernels import gemm

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Basis:
    """rank: columns of P. `needs_gradient` bases keep the old P when the gradient is zero or not finite."""

    rank: int

    needs_gradient: ClassVar[bool] = True
    seedable: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        """P [s, r] in the dtype of the arithmetic, or None when the factorisation failed.

        previous: the basis until now, for warm starts. key: of the counter-based generator. index: 0-based update.
        """
        raise NotImplementedError

    def recorded(self, index: int) -> bool | None:
        """Whether a basis was recorded for the 0-based update `index`; None when this basis keeps no calendar."""
        return None

    def describe(self) -> str:
        return type(self).__name__.removesuffix("Basis").lower()


def _right(grad: Tensor, side: Side) -> Tensor:
    """The gradient [l, s] such that its right singular vectors span the wanted side."""
    g = grad if side == "right" else grad.mT
    return g if g.dtype in (torch.float32, torch.float64) else g.float()


@dataclass(frozen=True)
class SVDBasis(Basis):
    """The top-r singular vectors of G, computed in fp32 (fp64 for fp64). Falls back to the fp64 Gram matrix."""

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        # G as it stands, never its transpose (which would be faster for wide ones): kept moments meet the new basis in
        # the signs that LAPACK gives, so the orientation of this call is part of the published algorithm.
        g = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
        try:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
        except torch.linalg.LinAlgError:
            return gram_basis(_right(grad, side), self.rank)
        return u[:, : self.rank].contiguous() if side == "left" else vh[: self.rank].mT.contiguous()


@dataclass(frozen=True)
class GramBasis(Basis):
    """The same vectors from eigh(G^T G), accumulated and decomposed in float64: as accurate as an fp32 SVD, faster.

    In fp32 the Gram matrix would lose directions below sqrt(eps) of the largest, where rank 128 sits early in training.
    """

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        return gram_basis(_right(grad, side), self.rank)


def gram_basis(g: Tensor, rank: int) -> Tensor | None:
    wide = g.double()
    try:
        vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors
    except torch.linalg.LinAlgError:
        return None
    return vectors[:, -rank:].flip(1).to(g.dtype).contiguous()


@dataclass(frozen=True)
class RandomizedBasis(Basis):
    """Range finder (Halko, Martinsson & Tropp 2011): `power` products with G^T G, then QR. warm: start from the old P.

    A warm start keeps the columns in place, so that moments stay meaningful across a refresh.
    """

    power: int = 1
    warm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("power", self.power)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        g = _right(grad, side)
        if self.warm and previous is not None:
            p = previous.to(g.dtype)
        else:
            p = normal(key, (g.shape[1], self.rank), g.device).to(g.dtype)
        with gemm.fast_matmul():
            for number in range(self.power):
                p = g.mT @ (g @ p)
                if number + 1 < self.power:
                    p = torch.linalg.qr(p).Q
        # Gradients have entries of 1e-8: squared by the power step they would underflow in QR's norms. The scale of P
        # does not matter, so take it out first.
        p = p / p.abs().amax().clamp_min_(torch.finfo(p.dtype).tiny)
        q, r = torch.linalg.qr(p)
        # QR fixes columns only up to sign; a positive diagonal makes warm columns continuous.
        return q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)


@dataclass(frozen=True)
class GaussianBasis(Basis):
    """P ~ N(0, 1 / rank), from the counter-based generator: the same on every device, rank and resume."""

    needs_gradient: ClassVar[bool] = False
    seedable: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        size = grad.shape[0] if side == "left" else grad.shape[1]
        return normal(key, (size, self.rank), grad.device, scale=1.0 / math.sqrt(self.rank))


BASES: dict[str, type[Basis]] = {
    "svd": SVDBasis,
    "gram": GramBasis,
    "randomized": RandomizedBasis,
    "gaussian": GaussianBasis,
}


def make_basis(choice: "str | Basis", rank: int) -> Basis:
    """A basis from its name, or the given one."""
    from tare.core.checks import check_choice

    if isinstance(choice, Basis):
        return choice
    return BASES[check_choice("basis", choice, tuple(BASES))](rank)
