"""Residuals: what is done with the part of the gradient outside the subspace. Dropped (none), scaled by norms (Fira), mapped by a sign
or a normalisation (FRUGAL, SinkGD), fed back into the next gradient (DCT-AdamW, Trion), or corrected on a few entries (GaLore+).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.delta import Delta, Dense, Scaled, Sum
from tare.core.errors import InputError
from tare.core.lazy import Mapped, squared_norm
from tare.core.leaf import Leaf
from tare.core.tensors import column_norms
from tare.core.transform import StateSpec
from tare.rules.maps import PostMap
from tare.subspace.limiter import NormGrowth
from tare.subspace.projection import Matrix, Projection

_GUARD = 1e-8  # added to |R_j| in the published codes of Fira and APOLLO


def norm_ratio(direction: Tensor, length: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """phi_j = scale |N_j| / (|R_j| + 1e-8) over `dim`, broadcastable against G. length: |R_j|."""
    return column_norms(direction, dim).mul_(scale).div_(length + _GUARD)


@dataclass
class Parts:
    """One step's pieces: G [.., m, n], R, the inner direction N, and what turned one into the other."""

    g: Tensor
    at: Projection
    projected: Tensor
    direction: Dense
    alpha: float
    state: Any
    limiter: NormGrowth | None
    stack: int
    lr: float

    def limited(self, norm: Tensor) -> Tensor | None:
        """The limiter's factor for a norm, 0-d or one for each matrix of a batch; None without a limiter."""
        if self.limiter is None:
            return None
        return self.limiter.factor(norm, self.state["limiter_norm"])


@dataclass(frozen=True)
class Residual:
    """What becomes of G - lift(R)."""

    accumulates: ClassVar[bool] = False
    keeps_projected: ClassVar[bool] = True  # whether R must survive the inner rule

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        """Further state."""
        return {}

    def check(self, leaf: Leaf, channels: bool) -> None:
        """Raise InputError where it makes no sense. channels: whether the basis has channels."""

    def intake(self, g: Tensor, state: Any) -> Tensor:
        """The gradient that is projected."""
        return g

    def update(self, parts: Parts, lifted: Callable[[], Delta]) -> Delta:
        """The whole direction: the lifted part, and what this makes of the rest."""
        raise NotImplementedError


@dataclass(frozen=True)
class NormRatioResidual(Residual):
    """Fira's residual, S = (G - a lift(R)) * phi.

    `code` (the repository, default): a = alpha, phi from N before bias correction, so the limiter sees S without it.
    `paper` (Algorithm 1): a = 1, phi from the corrected N, and alpha multiplies S too. Equal at alpha = 1 but for the
    place of the bias correction.
    """

    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        check_choice("residual form", self.form, ("code", "paper"))

    def check(self, leaf: Leaf, channels: bool) -> None:
        if not channels:
            raise InputError(
                "residual: the norm ratio needs channels, but single entries have none; use 'sign' or 'sgd'"
            )

    def update(self, parts: Parts, lifted: Callable[[], Delta]) -> Delta:
        p, direction = parts, parts.direction
        paper = self.form == "paper"
        a = 1.0 if paper else p.alpha
        dim = p.at.channel
        assert dim is not None
        length = column_norms(p.projected, dim, direction.u.dtype)
        phi = norm_ratio(direction.u, length, dim, abs(direction.scale if paper else direction.uncorrected))
        scale = p.alpha if paper else direction.correction
        if isinstance(p.at, Matrix) and (1.0 - a) ** 2 > 0.05:
            return self._folded(p, a, dim, phi, scale, length)
        rest = p.at.outside(p.g, p.projected, a)
        outside = rest.rows(0, p.g.shape[0])
        if outside.dtype != phi.dtype:
            outside = outside.to(phi.dtype)
        if p.limiter is not None:
            sizes = column_norms(outside, dim) * phi
            _times(phi, p.limited(_norm(sizes, p.stack)))
        return Sum((lifted(), Scaled(outside, phi, scale)))

    @staticmethod
    def _folded(p: Parts, a: float, dim: int, phi: Tensor, scale: float, length: Tensor) -> Delta:
        """The same without forming G - a lift(R): alpha lift(N) + (G - a lift(R)) phi = lift(alpha N - a R phi) + G phi.

        Its column norms come from |G_j|^2 - 2 a |R_j|^2 + a^2 |lift(R)_j|^2, which is accurate only while a is not near 1:
        there the difference cancels, and the residual is formed. length: |R_j|, which is |lift(R)_j| too if P is orthonormal.
        """
        if p.limiter is not None:
            inside = length.square()
            lifted = inside if p.at.orthonormal else p.at.squared_lengths(p.projected)
            sizes = column_norms(p.g, dim, phi.dtype).square_().sub_(inside, alpha=2.0 * a).add_(lifted, alpha=a * a)
            _times(phi, p.limited(_norm(sizes.clamp_(min=0.0).sqrt_().mul_(phi), p.stack)))
        direction, share = p.direction, phi * (-a * scale)
        same = p.projected.dtype == direction.u.dtype  # then R, which nobody reads any more, gives its memory
        joint = p.projected.mul_(share) if same else p.projected * share
        joint.add_(direction.u, alpha=p.alpha * direction.scale)
        return Sum((p.at.lift(Dense(joint, lr_inside=direction.lr_inside)), Scaled(p.g, phi, scale)))


def _norm(sizes: Tensor, stack: int) -> Tensor:
    """Euclidean norm of all sizes, or of each matrix's."""
    return torch.linalg.vector_norm(sizes.flatten(stack), dim=-1)


def _times(phi: Tensor, factor: Tensor | None) -> None:
    if factor is not None:
        phi.mul_(factor.view(-1, 1, 1) if factor.ndim else factor)


@dataclass(frozen=True)
class MappedResidual(Residual):
    """kappa * map(G - lift(R)): FRUGAL with a sign (arXiv 2411.07837), plain SGD without a map, SinkGD with its normalisation.

    scale: kappa, times the learning rate of the step. map: None leaves the residual as it is.
    """

    map: PostMap | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("residual scale", self.scale, 0.0, inclusive=True)

    @property
    def keeps_projected(self) -> bool:  # type: ignore[override]
        return self.scale > 0.0

    def update(self, parts: Parts, lifted: Callable[[], Delta]) -> Delta:
        p = parts
        rest = p.at.outside(p.g, p.projected, 1.0)
        shape = tuple(p.g.shape)
        by_rows = self.map is None or self.map.sharding == "elementwise"
        # Where the rule has multiplied its direction by lr already, the residual must carry it too.
        scale = self.scale * (p.lr if p.direction.lr_inside else 1.0)
        mapped = Mapped(rest, self.map or _same, shape, scale, by_rows=by_rows)
        if p.limiter is None:
            return Sum((lifted(), mapped))
        whole = mapped.rows(0, shape[0])
        factor = p.limited(squared_norm(Dense(whole), shape, p.stack).sqrt())
        assert factor is not None
        return Sum((lifted(), Scaled(whole, factor.view(-1, 1, 1) if factor.ndim else factor)))


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class FeedbackResidual(Residual):
    """Error feedback: the next gradient is G + E, with E = (G + E) - share * lift(R) (Seide et al. 2014; arXiv 2505.17967).

    share: 1 for DCT-AdamW; 1 - mu for Trion and Dion, where E is the momentum. storage: how E is kept: `moment` (as the
    moments), `int8` or `int4` (affine groups that round-trip; the published 4-bit form is scrambled).
    """

    share: float = 1.0
    storage: Literal["moment", "int8", "int4"] = "moment"

    def __post_init__(self) -> None:
        check_number("feedback share", self.share, 0.0)
        check_choice("feedback storage", self.storage, ("moment", "int8", "int4"))

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        form = {"moment": None, "int8": "affine8", "int4": "affine4"}[self.storage]
        return {"feedback": StateSpec(leaf.view, "moment" if form is None else "exact", form=form)}

    def intake(self, g: Tensor, state: Any) -> Tensor:
        # In place: no full-size temporary. What stands there until `update` is G + E.
        total: Tensor = state["feedback"].view(g.shape)
        return total.add_(g)

    def update(self, parts: Parts, lifted: Callable[[], Delta]) -> Delta:
        p = parts
        p.at.subtract_(p.g, p.projected, self.share)
        return lifted()
