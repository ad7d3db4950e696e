"""Recorded bases: feed the projections of a golden trace to any subspace method, in place of what it would compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tare.core.errors import InputError
from tare.subspace.bases import Basis, Side


@dataclass(frozen=True, init=False)
class RecordedBasis(Basis):
    """`RecordedBasis({step: P, ...})`: P [s, r] takes effect at the 0-based `step`; (P_left, P_right) for two-sided.

    >>> import torch
    >>> RecordedBasis({0: torch.eye(4)[:, :2]}).rank
    2
    """

    bases: Mapping[int, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)

    needs_gradient: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def __init__(self, bases: Mapping[int, Tensor | tuple[Tensor, Tensor]]):
        if 0 not in bases:
            raise InputError("RecordedBasis: no basis for step 0; steps are counted from 0")
        first = bases[0]
        object.__setattr__(self, "rank", (first[0] if isinstance(first, tuple) else first).shape[1])
        object.__setattr__(self, "bases", dict(bases))

    def recorded(self, index: int) -> bool | None:
        return index in self.bases

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        entry = self.bases[index]
        p = entry if isinstance(entry, Tensor) else entry[0 if side == "left" else 1]
        size = grad.shape[0] if side == "left" else grad.shape[1]
        if p.shape[0] != size:
            raise InputError(f"RecordedBasis: step {index} has {p.shape[0]} rows, the {side} side of G has {size}")
        return p.to(grad.device)
