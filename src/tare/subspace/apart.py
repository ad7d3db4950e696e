"""Apart: a subspace step from row shards G_i [m_i, n] of a gradient, exact but for the order of sums.

Left side: R = sum_i P_i^T G_i [r, n]. Right side: R_i = G_i P [m_i, r]. The rule runs on R alone; then U_i = P_i N, or N_i P^T, or
G_i times factors of channels (APOLLO), whose limiter needs the norms of G's channels and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tare.core.delta import Delta, Dense, LowRank, Scaled
from tare.core.leaf import Leaf
from tare.core.shard.apart import Piece
from tare.core.state import State
from tare.core.storage import Slot
from tare.core.tensors import column_norms
from tare.core.transform import Step
from tare.subspace.bases import Basis
from tare.subspace.projection import Matrix, Side

if TYPE_CHECKING:
    from tare.subspace.wrapper import Subspace


def taken_apart(subspace: "Subspace", leaf: Leaf, slots: dict[str, Slot]) -> "RowSteps | None":
    """How a leaf is stepped apart; None where more of the gradient is needed than R and norms of channels."""
    whole = subspace.residual is not None or subspace.post is not None or subspace.side == "both"
    whole = whole or subspace.basis.moves or subspace.rule.reads_weight
    if whole or leaf.stack or leaf.matrix is None or type(subspace.basis).at is not Basis.at:
        return None
    slot = slots["basis"]
    dtype = (
        slot.dtype if slot.form == "plain" else torch.float32 if slot.affine else leaf.compute_dtype
    )  # as it is decoded
    return RowSteps(subspace, leaf, subspace.side_of(*leaf.matrix)) if dtype == leaf.compute_dtype else None


@dataclass(frozen=True)
class RowSteps:
    """See `core.shard.apart.Apart`. leaf: whole."""

    subspace: "Subspace"
    leaf: Leaf
    side: Side

    @property
    def _sizes(self) -> tuple[int, int, int]:
        assert self.leaf.matrix is not None
        m, n = self.leaf.matrix
        return m, n, self.subspace.basis.rank_of(m if self.side == "left" else n)

    @property
    def basis(self) -> Piece:
        """P: of a left one each rank needs its rows."""
        m, n, r = self._sizes
        dtype = self.leaf.compute_dtype
        return Piece((m, r), dtype, "rows") if self.side == "left" else Piece((n, r), dtype, "same")

    def _along(self, r: int) -> Piece:
        """R or N, or with r = 1 a number for each channel."""
        m, n, _ = self._sizes
        dtype = self.leaf.compute_dtype
        return Piece((r, n), dtype, "same") if self.side == "left" else Piece((m, r), dtype, "rows")

    @property
    def _measures(self) -> bool:
        """Whether the owner needs the norms of G's channels."""
        return self.subspace.lift != "back" and self.subspace.limiter is not None

    @property
    def up(self) -> tuple[Piece, ...]:
        projected = self._along(self._sizes[2])
        return (projected, self._along(1)) if self._measures else (projected,)

    @property
    def down(self) -> tuple[Piece, ...]:
        numbers = Piece((2,), torch.float64, "same")  # scale, and whether lr is inside
        if self.subspace.lift == "back":
            return self._along(self._sizes[2]), numbers
        return (
            self._along(1) if self.subspace.lift == "channel" else Piece((), self.leaf.compute_dtype, "same")
        ), numbers

    def hold(self, state: State, step: Step) -> Tensor:
        return self._at(state, step).p

    def _at(self, state: State, step: Step) -> Matrix:
        at = self.subspace._at(self._nothing(step), self.side, state, step)
        assert isinstance(at, Matrix)
        return at

    def _nothing(self, step: Step) -> Tensor:
        """In the place of a gradient that nobody reads: its shape, in no memory."""
        assert self.leaf.matrix is not None
        return torch.ones((), dtype=self.leaf.compute_dtype, device=step.weight.device).expand(self.leaf.matrix)

    def tell(self, rows: Tensor, basis: Tensor) -> Sequence[Tensor]:
        g = rows.reshape(rows.shape[0], self._sizes[1])
        told = [Matrix(basis, self.side).project(g).to(self.leaf.compute_dtype)]
        if self._measures:
            told.append(column_norms(g, -2 if self.side == "left" else -1, self.leaf.compute_dtype).square())
        return told

    def decide(self, told: Sequence[Tensor], state: State, step: Step) -> Sequence[Tensor]:
        subspace, at = self.subspace, self._at(state, step)
        projected, inner = told[0], subspace._inner_step(step, state)
        if subspace.lift == "back":
            direction = subspace._spend(projected, state, inner)
            if subspace.limiter is not None:
                direction = subspace._limited(direction, at, state, step)
            return direction.u, self._numbers(subspace.scale * direction.scale, direction.lr_inside, told[0])
        before = subspace._sizes(projected, at)
        lengths = told[1].sqrt() if self._measures else None
        found = subspace._rescale(
            self._nothing(step), before, subspace._spend(projected, state, inner), at, state, lengths
        )
        return found.factor, self._numbers(found.scale, found.lr_inside, told[0])

    @staticmethod
    def _numbers(scale: float, lr_inside: bool, like: Tensor) -> Tensor:
        return torch.tensor([scale, float(lr_inside)], dtype=torch.float64, device=like.device)

    def form(self, rows: Tensor, basis: Tensor, decided: Sequence[Tensor]) -> Delta:
        found, (scale, inside) = decided[0], decided[1].tolist()
        if self.subspace.lift == "back":
            lifted: LowRank = Matrix(basis, self.side).lift(Dense(found), scale)
            return replace(lifted, lr_inside=bool(inside))
        return Scaled(rows.reshape(rows.shape[0], self._sizes[1]), found, scale, bool(inside))
