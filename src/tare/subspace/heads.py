"""Cross-head projection (GaLore+, Liao et al. 2024, arXiv 2412.19820): the basis of one randomly drawn attention head serves all heads."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.random import bits
from tare.core.transform import StateSpec
from tare.subspace.bases import Basis, RandomizedBasis
from tare.subspace.projection import Heads, Projection, Side


@dataclass(frozen=True)
class HeadBasis(Basis):
    """P [d, r] from one head's gradient [d, n], applied to every head of a query or key weight [h d, n].

    head_dim: d, rows that make a head. of: finds the basis on that head (default: randomized subspace iteration with two
    power steps and eight extra columns). The head is drawn by the counter-based generator, alike on every rank.
    """

    head_dim: int = 64
    of: Basis | None = None

    two_sided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("head_dim", self.head_dim)

    def rank_of(self, length: int) -> int:
        return super().rank_of(self.head_dim)

    def side_for(self, side: Side) -> Side:
        return "left"  # heads live on the rows of query and key weights

    def check(self, leaf: Leaf, storage: Any) -> None:
        assert leaf.matrix is not None
        rows = leaf.matrix[0]
        if leaf.stack or rows % self.head_dim:
            raise InputError(
                f"head_dim: {leaf.name} has {rows} rows, which are no whole number of heads of {self.head_dim}"
            )
        if self.rank_of(rows) > self.head_dim:
            raise InputError(
                f"rank: {self.rank} is above head_dim {self.head_dim} of {leaf.name}; choose a smaller rank"
            )

    def kept(self, length: int, stack: tuple[int, ...] = (), other: int = 0) -> StateSpec:
        return StateSpec((self.head_dim, self.rank_of(length)), "basis")

    def inner_shape(self, m: int, n: int, side: Side) -> tuple[int, ...]:
        return (m // self.head_dim * self.rank_of(m), n)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        heads = grad.view(-1, self.head_dim, grad.shape[-1])
        chosen = int(bits(key, 0, 1)[0]) % heads.shape[0]
        finder = self.of or RandomizedBasis(self.rank, power=2, warm=False, oversample=8)
        return finder.compute(heads[chosen], "left", previous, key, index)

    def at(self, kept: Tensor, g: Tensor, side: Side, dtype: torch.dtype, exact: bool = True) -> Projection:
        return Heads(kept, g.shape[-2] // self.head_dim, exact)

    def describe(self) -> str:
        return "one head for all"
