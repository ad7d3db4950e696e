"""Low-rank directions: E = A B^T / sqrt(r), A [m, r] and B [n, r] standard normal (EGGROLL, arXiv 2511.16652).

All members of a population are drawn from one key per leaf and step, one after another, so that many are drawn in one call and any of
them alone. `SideBySide` applies the factors inside a forward without ever forming E; here are the factors, and sums of many E.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.core.leaf import Leaf
from tare.core.random import make_key
from tare.core.state import State
from tare.zeroth.directions import CHUNK, Draw, Law
from tare.zeroth.drawn import write_sum

GATHERED = 1 << 22  # numbers of noise at once where the noise of many members is summed (16 MiB of fp32)


@dataclass(frozen=True)
class LowRank(Law):
    """E = A B^T / sqrt(rank) for a leaf that is a matrix, standard normal numbers for any other.

    A convolution is the matrix [out, in * kernel]; experts are matrices each of their own. Entries of E are uncorrelated, with mean 0 and
    variance 1, whatever the rank; V = ((m + 2)(n + 2) + (r - 1)(m n + 2)) / r falls from (m + 2)(n + 2) to the Gaussian's m n + 2.

    Args:
        rank: r, at least 1; may exceed m and n. 1 is the paper's.
        reuse: steps that share their noise; 0: the first step's for ever.

    >>> law = LowRank(2)
    >>> law.factor(Leaf("w", (3, 4), torch.float32, "linear"))
    22.0
    """

    rank: int = 1
    reuse: int = 1

    cuts: ClassVar[bool] = True
    partial: ClassVar[bool] = False  # all rows of a leaf in one product with B: pieces would draw B anew

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        check_whole("reuse", self.reuse, 0)

    def period(self, step: int) -> int:
        """The step whose noise step `step` uses."""
        return step // self.reuse if self.reuse else 0

    # -- what is drawn ---------------------------------------------------------------------------------------------

    def noise(self, draw: Draw, members: Sequence[int], device: torch.device) -> Tensor:
        """The numbers of several members, [len(members), as many as one needs]: first B, then A; fp32. `draw.member` is not read."""
        each = self._numbers(draw.leaf)
        out = torch.empty(len(members), each, device=device)
        key = make_key(draw.seed, f"{draw.name}/low-rank", self.period(draw.step))
        for at, first, count in runs(members):
            write_sum(
                out[at : at + count], keys=[key], coefficients=[1.0], law="gaussian", decay=0.0, start=first * each
            )
        return out

    def _numbers(self, leaf: Leaf) -> int:
        if leaf.matrix is None:
            return leaf.numel
        return sum(leaf.matrix) * self.rank * math.prod(leaf.stack)

    def factors(self, draw: Draw, members: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(A [M, m, r], B [M, n, r]) of M members, in the leaf's compute dtype; with experts [M, experts, m, r]."""
        assert draw.leaf.matrix is not None
        m, n = draw.leaf.matrix
        numbers = self.noise(draw, members, device).view(len(members), *draw.leaf.stack, n + m, self.rank)
        numbers = numbers.to(draw.leaf.compute_dtype)
        return numbers[..., n:, :], numbers[..., :n, :]

    def vectors(self, draw: Draw, members: Sequence[int], device: torch.device) -> Tensor:
        """The noise of a leaf that is no matrix, [M, *shape], in its compute dtype."""
        return self.noise(draw, members, device).view(len(members), *draw.leaf.shape).to(draw.leaf.compute_dtype)

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        leaf, stop = draw.leaf, draw.leaf.numel if stop is None else stop
        if leaf.matrix is None:
            return self.vectors(draw, (draw.member,), weight.device).view(-1)[start:stop]
        a, b = (factor.squeeze(0) for factor in self.factors(draw, (draw.member,), weight.device))
        a, n = a / math.sqrt(self.rank), leaf.matrix[1]
        if leaf.stack:
            return torch.matmul(a, b.mT).reshape(-1)[start:stop]
        first = start // n
        rows = a[first : -(-stop // n)] @ b.mT  # the rows of E that the elements lie in
        return rows.reshape(-1)[start - first * n : stop - first * n]

    # -- what is added ---------------------------------------------------------------------------------------------

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        if target.numel() == draw.leaf.numel:
            self.gather_(target, [(draw, scale)], state, weight)
        else:
            super().add_(target, draw, state, weight, scale, start)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        """target += sum of coefficient E_member, over chunks of members: for a matrix one product [m, chunk r] [chunk r, n] each."""
        if not terms or target.numel() != terms[0][0].leaf.numel:
            super().gather_(target, terms, state, weight, start)
            return
        leaf = terms[0][0].leaf
        dtype = leaf.compute_dtype
        target = target.view(leaf.shape) if target.is_contiguous() else target
        size = max(1, GATHERED // max(1, self._numbers(leaf)))
        for start in range(0, len(terms), size):
            part = terms[start : start + size]
            weights = torch.tensor([c for _, c in part], dtype=dtype, device=target.device)
            self._add_part(target, part[0][0], [draw.member for draw, _ in part], weights)

    def _add_part(self, target: Tensor, draw: Draw, members: Sequence[int], weights: Tensor) -> None:
        leaf = draw.leaf
        if leaf.matrix is None:
            noise = self.vectors(draw, members, target.device).view(len(members), -1)
            added(target, (weights @ noise).view(leaf.shape))
            return
        a, b = self.factors(draw, members, target.device)  # [M, (experts,) m, r]
        a = a * (weights / math.sqrt(self.rank)).view(-1, *[1] * (a.ndim - 1))
        if leaf.stack:
            left, right = beside(a.transpose(0, 1)), beside(b.transpose(0, 1))  # [experts, m, M r]
            added(target, torch.bmm(left, right.mT).view(leaf.shape))
            return
        left, right = beside(a), beside(b)  # [m, M r]
        if target.dtype == a.dtype and target.is_contiguous():
            target.view(leaf.matrix).addmm_(left, right.mT)
            return
        width = leaf.matrix[1]
        rows = max(1, CHUNK // width)
        for first in range(0, leaf.matrix[0], rows):  # in 16 bits the sum is rounded once, and no whole E is formed
            piece = left[first : first + rows] @ right.mT
            added(target[first : first + rows], piece.view(-1, *leaf.shape[1:]))

    # -- what tables say -------------------------------------------------------------------------------------------

    def factor(self, leaf: Leaf) -> float:
        if leaf.matrix is None:
            return leaf.numel + 2.0
        if leaf.stack:  # independent matrices: the others' share of V is their number of elements
            m, n = leaf.matrix
            return self.factor(replace(leaf, shape=(m, n), role="linear")) + leaf.numel - m * n
        m, n = leaf.matrix
        return ((m + 2.0) * (n + 2.0) + (self.rank - 1.0) * (m * n + 2.0)) / self.rank

    def describe(self) -> str:
        return f"rank {self.rank} gaussian"


def added(target: Tensor, what: Tensor) -> None:
    """target += what, rounded once."""
    target.copy_(target.to(what.dtype).add_(what))


def beside(factors: Tensor) -> Tensor:
    """[..., M, s, r] -> [..., s, M r]: the columns of all members next to one another."""
    return factors.transpose(-3, -2).flatten(-2)


def runs(members: Sequence[int]) -> list[tuple[int, int, int]]:
    """(place of the first, first, count) of runs of consecutive numbers.

    >>> runs([0, 1, 2, 5, 4])
    [(0, 0, 3), (3, 5, 1), (4, 4, 1)]
    """
    found: list[tuple[int, int, int]] = []
    for at, member in enumerate(members):
        if found and member == found[-1][1] + found[-1][2]:
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + 1)
        else:
            found.append((at, member, 1))
    return found
