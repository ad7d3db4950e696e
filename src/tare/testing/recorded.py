"""Recorded bases: feed the projections of a golden trace to any subspace method, in place of what it would compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.transform import StateSpec
from tare.subspace.bases import Basis, Turn
from tare.subspace.projection import Projection, Side


@dataclass(frozen=True, init=False)
class RecordedBasis(Basis):
    """`RecordedBasis({step: P, ...})`: P [s, r] takes effect at the 0-based `step`; (P_left, P_right) for two-sided.

    Steps are a leaf's own updates: those at which it had no gradient are not counted. The recording is the calendar and
    the rank: period, rank and density of the method have no say.

    Integer vectors are numbers of columns, rows, entries or cosines; `like` then says of what kind of basis (methods that
    have only one such kind set it themselves).

    >>> import torch
    >>> RecordedBasis({0: torch.eye(4)[:, :2]}).rank
    2
    """

    bases: Mapping[int, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    like: Basis | None = None

    needs_gradient: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def __init__(self, bases: Mapping[int, Tensor | tuple[Tensor, Tensor]], like: Basis | None = None):
        if 0 not in bases:
            raise InputError("RecordedBasis: no basis for step 0; steps are counted from 0")
        first = bases[0]
        object.__setattr__(self, "rank", (first[0] if isinstance(first, tuple) else first).shape[-1])
        object.__setattr__(self, "bases", dict(bases))
        object.__setattr__(self, "like", like)

    @property
    def of_numbers(self) -> bool:
        """Whether it holds numbers of columns and the like instead of matrices."""
        first = self.bases[0]
        return isinstance(first, Tensor) and not first.is_floating_point()

    def recorded(self, index: int) -> bool | None:
        return index in self.bases

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        entry = self.bases[index]
        p = entry if isinstance(entry, Tensor) else entry[0 if side == "left" else 1]
        if self.of_numbers:
            if self.like is None:
                raise InputError(
                    "RecordedBasis: numbers need a kind of basis; pass like=CoordinateBasis(...) or DCTBasis(...)"
                )
            flat = p[0] * grad.shape[-1] + p[1] if p.ndim == 2 else p  # (row numbers, column numbers) of entries
            return flat.to(grad.device, torch.int32)
        size = grad.shape[-2] if side == "left" else grad.shape[-1]
        if p.shape[-2] != size:
            raise InputError(f"RecordedBasis: step {index} has {p.shape[-2]} rows, the {side} side of G has {size}")
        return p.to(grad.device)

    def standing_for(self, other: Basis) -> Basis:
        """Its kind, with as many numbers as were recorded: rank or density of the method have no say then."""
        if self.like is not None or not self.of_numbers:
            return self
        return RecordedBasis(self.bases, replace(other, rank=int(self.rank)))

    @property
    def within_shorter(self) -> bool:  # type: ignore[override]
        return self.like is not None and self.like.within_shorter  # a matrix has the columns that it has

    # What is kept, and what projects, is the business of the basis it stands for.

    def _kind(self) -> Basis:
        return self.like if self.like is not None else Basis(self.rank)

    def rank_of(self, length: int) -> int:
        return self.like.rank_of(length) if self.like is not None else int(self.rank)

    def side_for(self, side: Side) -> Side:
        return self._kind().side_for(side)

    def kept(self, length: int, stack: tuple[int, ...] = (), other: int = 0) -> StateSpec:
        # Never as a seed: what was recorded cannot be drawn again.
        return replace(self._kind().kept(length, stack, other), seedable=False)

    def inner_shape(self, m: int, n: int, side: Side) -> tuple[int, ...]:
        return self._kind().inner_shape(m, n, side)

    def check(self, leaf: Leaf, storage: Any) -> None:
        if storage.basis == "seed":
            raise InputError("storage.basis: 'seed' cannot draw a recorded basis again; use 'fp32' or 'bf16'")
        self._kind().check(leaf, storage)

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        return self._kind().at(kept, g, side, dtype, exact and self.like is not None)

    def turn(self, old: Tensor, fresh: Tensor) -> Turn:
        return self._kind().turn(old, fresh)

    def describe(self) -> str:
        return "recorded"
