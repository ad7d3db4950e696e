"""The post-maps by name: sign, dead zone, Huber, unit norm, row and column norms here; the larger ones handed on from their own files.

Those of this file are gradients of convex functions K (Chen et al. 2023, arXiv 2310.05898) or norm-ball steps (Pethick et al. 2025, arXiv
2502.07529).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_number
from tare.core.errors import InputError, nearest
from tare.core.transform import Sharding
from tare.rules.orthogonal import Orthogonal
from tare.rules.postmap import PostMap, safe_divide_
from tare.rules.sinkhorn import Sinkhorn
from tare.rules.whiten import Whiten

__all__ = [
    "MAPS", "ColNorm", "DeadZone", "Huber", "Orthogonal", "PostMap", "RowNorm", "Sign", "Sinkhorn", "UnitNorm",
    "Whiten", "make_map",
]  # fmt: skip


@dataclass(frozen=True)
class Sign(PostMap):
    """sign(x), the gradient of the l1 norm: every entry moves by the same amount."""

    sharding: ClassVar[Sharding] = "elementwise"

    def __call__(self, x: Tensor) -> Tensor:
        return x.sign().addcmul_(x, x.new_zeros(()))  # sign(NaN) is 0 in torch: a NaN would freeze its weight unseen


@dataclass(frozen=True)
class DeadZone(PostMap):
    """sign(x) where |x| > e, else 0: the gradient of sum max(|x| - e, 0). e = 0 is `Sign`.

    e: half-width of the zone, in units of x; small entries are taken for noise.
    """

    e: float = 1e-3
    sharding: ClassVar[Sharding] = "elementwise"

    def __post_init__(self) -> None:
        check_number("e", self.e, 0.0, inclusive=True)

    def __call__(self, x: Tensor) -> Tensor:
        u = x.sign().mul_(x.abs() > self.e)
        return u.addcmul_(x, x.new_zeros(()))

    def describe(self) -> str:
        return f"sign outside {self.e:g}"


@dataclass(frozen=True)
class Huber(PostMap):
    """clip(x / delta, -1, 1), the gradient of Huber's function over delta: linear near zero, a sign far from it.

    delta: where it turns flat, in units of x. delta -> 0 is `Sign`.
    """

    delta: float = 1e-3
    sharding: ClassVar[Sharding] = "elementwise"

    def __post_init__(self) -> None:
        check_number("delta", self.delta)

    def __call__(self, x: Tensor) -> Tensor:
        return (x / self.delta).clamp_(-1.0, 1.0)

    def describe(self) -> str:
        return f"huber {self.delta:g}"


@dataclass(frozen=True)
class UnitNorm(PostMap):
    """x / |x|_F, the gradient of the l2 norm of all entries of a matrix."""

    def __call__(self, x: Tensor) -> Tensor:
        dims = (-2, -1) if x.ndim > 1 else None
        return safe_divide_(x.clone(), torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 0))


@dataclass(frozen=True)
class RowNorm(PostMap):
    """Every row over its root mean square: rows of norm sqrt(n). A vector is one row."""

    sharding: ClassVar[Sharding] = "rows"

    def __call__(self, x: Tensor) -> Tensor:
        return _over_rms(x, -1)


@dataclass(frozen=True)
class ColNorm(PostMap):
    """Every column over its root mean square: columns of norm sqrt(m). A vector is one column."""

    def __call__(self, x: Tensor) -> Tensor:
        return _over_rms(x, -2 if x.ndim > 1 else -1)


def _over_rms(x: Tensor, dim: int) -> Tensor:
    if x.ndim == 0:
        return safe_divide_(x.clone(), x.abs())
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True).div_(x.shape[dim] ** 0.5)
    return safe_divide_(x.clone(), norm)


MAPS: dict[str, Callable[[], PostMap]] = {
    "sign": Sign, "dead-zone": DeadZone, "huber": Huber, "unit-norm": UnitNorm, "row-norm": RowNorm,
    "col-norm": ColNorm, "orthogonal": Orthogonal, "sinkhorn": Sinkhorn, "whiten": Whiten,
}  # fmt: skip


def make_map(post: str | PostMap | None) -> PostMap | None:
    """A map from itself or its name with that map's defaults; None and "none" are no map.

    >>> make_map("sinkhorn").iterations
    5

    Raises:
        InputError: for an unknown name, with the nearest one.
    """
    if post is None or post == "none":
        return None
    if isinstance(post, PostMap):
        return post
    if not isinstance(post, str) or post not in MAPS:
        names = ["none", *MAPS]
        raise InputError(f"post: {post!r} is not one of {', '.join(names)}{nearest(str(post), names)}; or a PostMap")
    return MAPS[post]()
