"""Norm balls and their linear minimisation oracles (Pethick et al. 2025, arXiv 2502.07529): which direction descends fastest in a norm.

`direction` is what is subtracted. W is [out, in]; a convolution [out, in, k, k]; experts [E, out, in], each a matrix of its own.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tare.core.errors import InputError, nearest
from tare.core.leaf import Leaf
from tare.core.random import normal
from tare.rules.maps import Orthogonal, Sign
from tare.rules.matrices import as_matrix, inner_product
from tare.rules.orthogonal import PUBLISHED

GUARD = 1e-8  # added to root mean squares in the published code


@dataclass(frozen=True)
class Norm:
    """Base. `radius(leaf) * map_of(x)` is the oracle's answer; the factor is kept apart because the write can carry it."""

    elementwise: ClassVar[bool] = False  # whether `map_of` may be asked for any part of x, and leaves that alone

    def lmo(self, x: Tensor, leaf: Leaf) -> Tensor:
        """The direction for x in the shape of its leaf; x is kept."""
        return self.map_of(x.clone(), leaf).to(x.dtype).mul_(self.radius(leaf))

    def map_of(self, x: Tensor, leaf: Leaf) -> Tensor:
        """The direction without its shape factor; may take the memory of x, and be narrower."""
        raise NotImplementedError

    def radius(self, leaf: Leaf) -> float:
        """The shape factor."""
        return 1.0

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what dtype x is best built when it is given away."""
        return dtype

    @property
    def workspace(self) -> float:
        """As of a `PostMap`."""
        return 1.0

    def dual(self, x: Tensor, leaf: Leaf) -> Tensor:
        """The dual norm <lmo(x), x>, 0-d: nuclear for spectral, l1 for sign."""
        u = self.map_of(x.to(self.working_dtype(x.dtype), copy=True), leaf)
        return inner_product(u.view_as(x), x) * self.radius(leaf)

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        """A random weight on the unit ball of this norm, float32; from the counter-based generator."""
        raise NotImplementedError

    def describe(self) -> str:
        return type(self).__name__.lower()


def _sides(leaf: Leaf) -> tuple[int, int]:
    """(out, in) of a leaf; a vector is out x 1."""
    if leaf.matrix is None:
        return leaf.numel, 1
    return leaf.matrix


@dataclass(frozen=True)
class Spectral(Norm):
    """Largest singular value as a map from RMS to RMS: Newton-Schulz times (out / in)^(1/2). Vectors are taken by `BiasRMS`.

    normalized: False leaves out 1 / in. maximum: the factor is at least 1. A convolution counts as its out x (in * k * k) matrix.
    """

    maximum: bool = False
    normalized: bool = True
    post: Orthogonal = PUBLISHED

    def map_of(self, x: Tensor, leaf: Leaf) -> Tensor:
        if leaf.matrix is None:
            return _over_rms(x)
        return self.post.consume(as_matrix(x, leaf)).reshape(x.shape)

    def radius(self, leaf: Leaf) -> float:
        if leaf.matrix is None:
            return 1.0
        rows, columns = leaf.matrix
        factor = math.sqrt(rows / columns if self.normalized else rows)
        return max(1.0, factor) if self.maximum else factor

    @property
    def workspace(self) -> float:
        return self.post.workspace

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.post.working_dtype(dtype)

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        return _semi_orthogonal(leaf, key).mul_(self.radius(leaf)) if leaf.matrix else torch.zeros(leaf.shape)


@dataclass(frozen=True)
class SpectralConv(Spectral):
    """The same for convolutions, per kernel position: factor (out / in)^(1/2) / k^2 (or the kernel's product), in = input channels."""

    def radius(self, leaf: Leaf) -> float:
        if leaf.stack or len(leaf.shape) < 3:
            return super().radius(leaf)
        out, channels = leaf.shape[:2]
        return math.sqrt(out / channels) / math.prod(leaf.shape[2:])

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        if leaf.stack or len(leaf.shape) < 3:
            return super().initial(leaf, key)
        out, channels = leaf.shape[:2]
        positions = math.prod(leaf.shape[2:])
        one = Leaf(leaf.name, (positions, out, channels), leaf.dtype, "expert")
        each = _semi_orthogonal(one, key)  # [k k, out, in]
        return each.permute(1, 2, 0).reshape(leaf.shape).contiguous().mul_(self.radius(leaf))


@dataclass(frozen=True)
class SignNorm(Norm):
    """Largest entry (l1 to l-infinity): sign(x), over `in` when normalized. zero_init: `initial` gives zeros."""

    zero_init: bool = False
    normalized: bool = True
    elementwise: ClassVar[bool] = True

    def map_of(self, x: Tensor, leaf: Leaf) -> Tensor:
        return Sign()(x)

    def radius(self, leaf: Leaf) -> float:
        return 1.0 / _sides(leaf)[1] if self.normalized else 1.0

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        w = normal(key, leaf.shape)
        return torch.where(w < 0, -1.0, 1.0).mul_(0.0 if self.zero_init else self.radius(leaf))


@dataclass(frozen=True)
class _Lines(Norm):
    """Lines of a matrix over their length; which lines and which length is told by the kinds."""

    normalized: bool = False
    transpose: bool = False
    along: ClassVar[int] = -2

    def _dim(self, leaf: Leaf) -> int:
        return (-3 - self.along) if self.transpose else self.along  # -1 <-> -2

    def map_of(self, x: Tensor, leaf: Leaf) -> Tensor:
        if leaf.matrix is None:
            return _over_rms(x)
        y = as_matrix(x, leaf)
        dim = self._dim(leaf)
        length = torch.linalg.vector_norm(y, dim=dim, keepdim=True).mul_(self._length(y.shape[dim], y.shape[-3 - dim]))
        return y.div_(length.add_(GUARD)).reshape(x.shape)

    def _length(self, along: int, across: int) -> float:
        """What the l2 norm of a line is multiplied by to give its length."""
        raise NotImplementedError

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        if leaf.matrix is None:
            return torch.zeros(leaf.shape)
        return self.map_of(normal(key, leaf.shape), leaf)


@dataclass(frozen=True)
class ColNormBall(_Lines):
    """Columns over their root mean square, and over `in` when normalized. transpose: rows, as for a table of embeddings."""

    along: ClassVar[int] = -2

    def _length(self, along: int, across: int) -> float:
        return along**-0.5 * (across if self.normalized else 1.0)


@dataclass(frozen=True)
class RowNormBall(_Lines):
    """Rows over their l2 norm, and over in^(1/2) when normalized. transpose: columns."""

    normalized: bool = True
    along: ClassVar[int] = -1

    def _length(self, along: int, across: int) -> float:
        return along**0.5 if self.normalized else 1.0


@dataclass(frozen=True)
class BiasRMS(Norm):
    """The whole tensor over its root mean square; starts at zero."""

    def map_of(self, x: Tensor, leaf: Leaf) -> Tensor:
        return _over_rms(x)

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        return torch.zeros(leaf.shape)


@dataclass(frozen=True)
class Auto(Norm):
    """`Spectral` for matrices, `SpectralConv` for convolutions, `BiasRMS` for vectors and scalars."""

    post: Orthogonal = PUBLISHED

    def of(self, leaf: Leaf) -> Norm:
        if leaf.matrix is None:
            return BiasRMS()
        conv = len(leaf.shape) > 2 and not leaf.stack
        return SpectralConv(post=self.post) if conv else Spectral(post=self.post)

    def map_of(self, x: Tensor, leaf: Leaf) -> Tensor:
        return self.of(leaf).map_of(x, leaf)

    def radius(self, leaf: Leaf) -> float:
        return self.of(leaf).radius(leaf)

    @property
    def workspace(self) -> float:
        return self.post.workspace

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.post.working_dtype(dtype)

    def initial(self, leaf: Leaf, key: int) -> Tensor:
        return self.of(leaf).initial(leaf, key)


NORMS: dict[str, type[Norm]] = {
    "auto": Auto, "spectral": Spectral, "spectral-conv": SpectralConv, "sign": SignNorm, "col-norm": ColNormBall,
    "row-norm": RowNormBall, "bias-rms": BiasRMS,
}  # fmt: skip


def make_norm(name: str, norm: str | Norm, post: Orthogonal) -> Norm:
    """A norm from itself or its name; those that orthogonalise do it as `post` says. name: of the option, for the message."""
    if isinstance(norm, Norm):
        return norm
    if not isinstance(norm, str) or norm not in NORMS:
        words = tuple(NORMS)
        raise InputError(f"Invalid {name}: {norm!r}; expected one of {', '.join(words)}{nearest(str(norm), words)}")
    kind = NORMS[norm]
    return kind(post=post) if issubclass(kind, Spectral | Auto) else kind()


def _over_rms(x: Tensor) -> Tensor:
    return x.div_(torch.linalg.vector_norm(x).div_(max(1, x.numel()) ** 0.5).add_(GUARD))


def _semi_orthogonal(leaf: Leaf, key: int) -> Tensor:
    """Haar-distributed semi-orthogonal matrices in the shape of a leaf: QR of normals, signs of R's diagonal taken out."""
    x = as_matrix(normal(key, leaf.shape).double(), leaf)
    tall = x.shape[-2] >= x.shape[-1]
    q, r = torch.linalg.qr(x if tall else x.mT)
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    return (q if tall else q.mT).reshape(leaf.shape).float().contiguous()
