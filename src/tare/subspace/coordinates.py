"""Coordinate bases: some rows, columns or entries of the gradient, by number (FRUGAL, Zmushko et al. 2025, arXiv 2411.07837).

Nothing but int32 numbers is kept, or only the seed they come from; projecting is a gather, lifting a scatter.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice
from tare.core.errors import InputError
from tare.core.lazy import take
from tare.core.leaf import Leaf
from tare.core.random import bits
from tare.core.transform import StateSpec
from tare.subspace.bases import Basis, Turn, length_of
from tare.subspace.projection import Coordinates, Projection, Side

Order = Literal["random", "greedy"]


def gathered(old: Tensor, fresh: Tensor) -> Turn:
    """Coordinates that stay chosen keep their moments, new ones start from zero: an exact gather. Numbers [.., r]."""
    numbers, places = old.sort(-1)
    found = torch.searchsorted(numbers, fresh).clamp_(max=old.shape[-1] - 1)
    lost = numbers.gather(-1, found) != fresh
    place = places.gather(-1, found)

    def turn(x: Tensor, side: Side, signed: bool) -> Tensor:
        if x.ndim == 1:
            return x.index_select(0, place).masked_fill_(lost, 0.0)
        dim = -2 if side == "left" else -1
        mask = lost.unsqueeze(-1) if dim == -2 else lost.unsqueeze(-2)
        return take(x, place, dim).masked_fill_(mask, 0.0)

    return turn


@dataclass(frozen=True)
class CoordinateBasis(Basis):
    """Whole rows or columns. axis: `columns`, `rows`, or `side` (whichever side the wrapper projects).

    order: `random` (a permutation from the counter-based generator), or `greedy`: the largest norms, which maximises the
    Gauss-Southwell decrease (Nutini, Laradji & Schmidt 2022, arXiv 1712.08859) for equal curvature. A share is rounded
    down, as in FRUGAL's code for `columns` and `rows`; nearest rounds it as that does for `randperm`.
    """

    axis: Literal["columns", "rows", "side"] = "side"
    order: Order = "random"
    nearest: bool = False

    two_sided: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    within_shorter: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("axis", self.axis, ("columns", "rows", "side"))
        check_choice("order", self.order, ("random", "greedy"))

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        return self.order == "greedy"

    @property
    def seedable(self) -> bool:  # type: ignore[override]
        return self.order == "random"

    def rank_of(self, length: int) -> int:
        if isinstance(self.rank, int):
            return self.rank
        return max(1, round(self.rank * length) if self.nearest else int(self.rank * length))

    def side_for(self, side: Side) -> Side:
        return {"columns": "right", "rows": "left"}.get(self.axis, side)  # type: ignore[return-value]

    def kept(self, length: int, stack: tuple[int, ...] = (), other: int = 0) -> StateSpec:
        return StateSpec((*stack, self.rank_of(length)), "basis", dtype=torch.int32, seedable=self.seedable)

    def fallback(self, spec: StateSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.arange(spec.shape[-1], dtype=torch.int32, device=device).expand(spec.shape).clone()

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        length = length_of(grad, side)
        if self.order == "greedy":
            score = grad.float().square().sum(-1 if side == "left" else -2)  # [.., length]
            return top(score, self.rank_of(length))
        return shuffled(key, grad.shape[:-2], length, self.rank_of(length), grad.device)

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        return Coordinates(kept, side, tuple(g.shape), dtype)

    def turn(self, old: Tensor, fresh: Tensor) -> Turn:
        return gathered(old, fresh)

    def describe(self) -> str:
        return ("top " if self.order == "greedy" else "random ") + ("lines" if self.axis == "side" else self.axis)


@dataclass(frozen=True)
class EntryBasis(Basis):
    """Single entries, `rank` a share of m n or a number of entries (FRUGAL's `randk`). R is a vector.

    # differs from the published code, which keeps two int64 an entry (16 bytes; the moments it saves are 8): one int32 here.
    """

    two_sided: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    seedable: ClassVar[bool] = True

    def check(self, leaf: Leaf, storage: Any) -> None:
        if leaf.stack:
            raise InputError(
                f"basis: entries of a batch of experts ({leaf.name}) are not offered; use 'columns' or 'rows'"
            )
        if leaf.numel >= 2**31:
            raise InputError(f"basis: {leaf.name} has {leaf.numel:,} entries; entry numbers are int32; use 'columns'")

    def _count(self, m: int, n: int) -> int:
        return min(m * n, self.rank) if isinstance(self.rank, int) else max(1, int(self.rank * m * n))

    def rank_of(self, length: int) -> int:
        return 1  # fits any matrix

    def kept(self, length: int, stack: tuple[int, ...] = (), other: int = 0) -> StateSpec:
        return StateSpec((self._count(length, other),), "basis", dtype=torch.int32, seedable=True)

    def inner_shape(self, m: int, n: int, side: Side) -> tuple[int, ...]:
        return (self._count(m, n),)

    def fallback(self, spec: StateSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.arange(spec.shape[0], dtype=torch.int32, device=device)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        return shuffled(key, (), grad.numel(), self._count(*grad.shape), grad.device)

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        return Coordinates(kept, side, tuple(g.shape), dtype, entries=True)

    def turn(self, old: Tensor, fresh: Tensor) -> Turn:
        def turn(x: Tensor, side: Side, signed: bool) -> Tensor:
            # Both are sorted, so a search finds what stayed.
            place = torch.searchsorted(old, fresh).clamp_(max=old.numel() - 1)
            return torch.where(old[place] == fresh, x[place], 0.0)

        return turn

    def describe(self) -> str:
        return "random entries"


def shuffled(key: int, stack: tuple[int, ...], length: int, count: int, device: torch.device) -> Tensor:
    """`count` of `length` numbers without repetition, sorted, int32: those with the smallest hashes."""
    batch = math.prod(stack)
    order = bits(key, 0, batch * length, device).view(*stack, length)
    # Ties of 32-bit hashes are broken by the number itself, so that every device draws alike.
    order = (order << 31) | torch.arange(length, device=device)
    return torch.topk(order, count, dim=-1, largest=False).indices.sort(-1).values.to(torch.int32)


def top(score: Tensor, count: int) -> Tensor:
    """Numbers of the `count` largest scores, sorted, int32; the lower number wins a tie."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]
    return order.sort(-1).values.to(torch.int32)
