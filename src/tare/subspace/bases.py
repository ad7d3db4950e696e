"""Bases: what projects a gradient. Each computes P [s, r] for the left side (R = P^T G) or the right side (R = G P).

SVD (GaLore), the Gram matrix in float64 (the same basis, faster), a randomized range finder (warm-started), a Gaussian (APOLLO).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_whole
from tare.core.errors import InputError
from tare.core.random import normal
from tare.core.transform import StateSpec
from tare.kernels import gemm
from tare.subspace.projection import Matrix, Projection, Side

if TYPE_CHECKING:
    from tare.core.leaf import Leaf


@dataclass(frozen=True)
class Basis:
    """What selects a subspace. rank: columns of P, or a share in (0, 1] of the projected side.

    What is *kept* between refreshes is a matrix P [s, r] for most, the numbers of the chosen rows or columns for some;
    `at` turns it into the `Projection` of a step. `needs_gradient` bases keep the old one when the gradient is zero or
    not finite; `moves` says that `follow` changes it at every step.
    """

    rank: int | float

    needs_gradient: ClassVar[bool] = True
    seedable: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    within_shorter: ClassVar[bool] = (
        True  # whether the rank is bounded by the shorter side, not only by the projected one
    )
    comparable: ClassVar[bool] = True  # whether two bases have principal angles: they are kept as matrices
    two_sided: ClassVar[bool] = True  # whether it also makes sense on both sides at once

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def rank_of(self, length: int) -> int:
        """Columns of P on a side of `length`; for matrices too small for an integer rank this exceeds `length`."""
        return self.rank if isinstance(self.rank, int) else max(1, round(self.rank * length))

    def side_for(self, side: Side) -> Side:
        """The side really projected; bases that are tied to one override this."""
        return side

    def kept(self, length: int, stack: tuple[int, ...] = (), other: int = 0) -> StateSpec:
        """Spec of what is kept for a projected side of `length` (the other side has `other`)."""
        return StateSpec((*stack, length, self.rank_of(length)), "basis", seedable=self.seedable)

    def inner_shape(self, m: int, n: int, side: Side) -> tuple[int, ...]:
        """Shape of R for one matrix."""
        return (self.rank_of(m), n) if side == "left" else (m, self.rank_of(n))

    def extra(self, length: int, stack: tuple[int, ...] = ()) -> dict[str, StateSpec]:
        """Further state of the basis itself."""
        return {}

    def check(self, leaf: "Leaf", storage: Any) -> None:
        """Raise InputError where this basis cannot serve `leaf`."""

    def fallback(self, spec: StateSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What serves until a usable gradient comes: unit vectors."""
        return torch.eye(*spec.shape[-2:], dtype=dtype, device=device).expand(spec.shape).clone()

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        """What is kept, P [s, r] in the dtype of the arithmetic, or None when the factorisation failed.

        grad: [m, n], or a batch. previous: the basis until now, for warm starts. key: of the counter-based generator.
        index: 0-based update.
        """
        raise NotImplementedError

    def watching(self) -> "Basis":
        """What stands for this basis in one refresh, where R comes along with it (`seen`): itself, where it does not."""
        return self

    @property
    def seen(self) -> Tensor | None:
        """R of the gradient that the basis was just computed from, if it came along."""
        return None

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        """The projection of one step. exact: False when the storage has rounded what is kept."""
        return Matrix(kept, side, self.orthonormal and exact)

    def turn(self, old: Tensor, fresh: Tensor) -> "Turn":
        """What carries coordinates in the old basis to the new one."""
        q = fresh.mT @ old.to(fresh.dtype)  # [r, r]
        return lambda x, side, signed: _rotated(x, q if signed else q.square(), side)

    def follow(self, g: Tensor, projected: Tensor, at: Projection, state: Any, step: Any) -> None:
        """Move the basis after a step; only where `moves`."""

    def recorded(self, index: int) -> bool | None:
        """Whether a basis was recorded for the 0-based update `index`; None when this basis keeps no calendar."""
        return None

    def standing_for(self, other: "Basis") -> "Basis":
        """This basis in the place of `other`; recorded ones take over its kind."""
        return self

    def shared(self, length: int) -> dict[str, int]:
        """Bytes kept once for all leaves and optimizers, by name: constants such as a table of cosines."""
        return {}

    def describe(self) -> str:
        return type(self).__name__.removesuffix("Basis").lower()


Turn = Callable[[Tensor, Side, bool], Tensor]


def _rotated(x: Tensor, q: Tensor, side: Side) -> Tensor:
    x = x.to(q.dtype)
    return q @ x if side == "left" else x @ q.mT


def check_rank(rank: object) -> None:
    """A whole number >= 1, or a share in (0, 1]."""
    if isinstance(rank, float) and 0.0 < rank <= 1.0:
        return
    if isinstance(rank, float | bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"rank: expected a whole number >= 1, or a share in (0, 1], got {rank!r}")


def _right(grad: Tensor, side: Side) -> Tensor:
    """The gradient [l, s] such that its right singular vectors span the wanted side."""
    g = grad if side == "right" else grad.mT
    return g if g.dtype in (torch.float32, torch.float64) else g.float()


@dataclass(frozen=True)
class SVDBasis(Basis):
    """The top-r singular vectors of G, computed in fp32 (fp64 for fp64). Falls back to the fp64 Gram matrix.

    zero: at a refresh on an all-zero gradient, `skip` keeps the old basis and tries again at the next update; `legacy`
    decomposes the zeros as the published codes do: unit vectors, kept for the whole period.
    """

    zero: Literal["skip", "legacy"] = field(default="skip", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("zero", self.zero, ("skip", "legacy"))

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        return self.zero == "skip"

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        # G as it stands, never its transpose (which would be faster for wide ones): kept moments meet the new basis in
        # the signs that LAPACK gives, so the orientation of this call is part of the published algorithm.
        g = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
        try:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
        except torch.linalg.LinAlgError:
            return gram_basis(_right(grad, side), _rank(self, grad, side))
        r = _rank(self, grad, side)
        return u[..., :r].contiguous() if side == "left" else vh[..., :r, :].mT.contiguous()


@dataclass(frozen=True)
class GramBasis(Basis):
    """The same vectors from eigh(G^T G), accumulated and decomposed in float64: as accurate as an fp32 SVD, faster.

    In fp32 the Gram matrix would lose directions below sqrt(eps) of the largest, where rank 128 sits early in training.
    """

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        return gram_basis(_right(grad, side), _rank(self, grad, side))


def gram_basis(g: Tensor, rank: int) -> Tensor | None:
    wide = g.double()
    try:
        vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors
    except torch.linalg.LinAlgError:
        return None
    return vectors[..., -rank:].flip(-1).to(g.dtype).contiguous()


@dataclass(frozen=True)
class RandomizedBasis(Basis):
    """Range finder (Halko, Martinsson & Tropp 2011): `power` products with G^T G, then QR. warm: start from the old P.

    A warm start keeps the columns in place, so that moments stay meaningful across a refresh. oversample: further
    columns while searching; then the best r of them are taken by a small eigenproblem, in order of singular value.
    """

    power: int = 1
    warm: bool = True
    oversample: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("power", self.power)
        check_whole("oversample", self.oversample, 0)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        g = _right(grad, side)
        rank = self.rank_of(g.shape[-1])
        width = min(g.shape[-1], rank + self.oversample)
        if self.warm and previous is not None:
            p = previous.to(g.dtype)
        else:
            p = normal(key, (*g.shape[:-2], g.shape[-1], width), g.device).to(g.dtype)
        with gemm.fast_matmul():
            for number in range(self.power):
                p = g.mT @ (g @ p)
                if number + 1 < self.power:
                    p = torch.linalg.qr(p).Q
        # Gradients have entries of 1e-8: squared by the power step they would underflow in QR's norms. The scale of P
        # does not matter, so take it out first.
        p = p / p.abs().amax((-2, -1), keepdim=True).clamp_min_(torch.finfo(p.dtype).tiny)
        q = orthonormalised(p)
        if q.shape[-1] == rank:
            return q
        with gemm.fast_matmul():
            seen = g @ q  # [l, r + oversample]
            small = gram_basis(seen, rank)
            return None if small is None else q @ small


@dataclass(frozen=True)
class GaussianBasis(Basis):
    """P ~ N(0, 1 / rank), from the counter-based generator: the same on every device, rank and resume."""

    needs_gradient: ClassVar[bool] = False
    seedable: ClassVar[bool] = True
    within_shorter: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        size, r = length_of(grad, side), _rank(self, grad, side)
        return normal(key, (*grad.shape[:-2], size, r), grad.device, scale=1.0 / math.sqrt(r))


@dataclass(frozen=True)
class OrthonormalBasis(Basis):
    """A random orthonormal P (FRUGAL's `random`): QR of a Gaussian, signs fixed, so that it is uniformly distributed."""

    needs_gradient: ClassVar[bool] = False
    seedable: ClassVar[bool] = True
    within_shorter: ClassVar[bool] = False

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        shape = (*grad.shape[:-2], length_of(grad, side), _rank(self, grad, side))
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        return orthonormalised(normal(key, shape, grad.device).to(dtype))


def orthonormalised(p: Tensor) -> Tensor:
    """Q of P's QR. QR fixes columns only up to sign; a positive diagonal makes warm columns continuous."""
    q, r = torch.linalg.qr(p)
    signs = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs.unsqueeze(-2)


def length_of(grad: Tensor, side: Side) -> int:
    """Length of the projected side."""
    return grad.shape[-2] if side == "left" else grad.shape[-1]


def _rank(basis: Basis, grad: Tensor, side: Side) -> int:
    return basis.rank_of(length_of(grad, side))
