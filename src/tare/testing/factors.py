"""Recorded factors: feed A and B of a golden trace to any method with low-rank directions, in place of what it would draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tare.core.leaf import Leaf
from tare.zeroth.directions import Draw
from tare.zeroth.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class RecordedFactors(LowRank):
    """Numbers by leaf name and 0-based step.

    pairs: leaf name -> (A [steps, members, m, r], B [steps, members, n, r]). singles: leaf name -> [steps, members, *shape].

    >>> law = RecordedFactors(1, pairs={"w": (torch.ones(1, 2, 3, 1), torch.ones(1, 2, 4, 1))})
    >>> law.factors(Draw(Leaf("w", (3, 4), torch.float32, "linear"), "w", 0, 0), [1], torch.device("cpu"))[0].shape
    torch.Size([1, 3, 1])
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]] | None = None
    singles: Mapping[str, Tensor] | None = None

    def factors(self, draw: Draw, members: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        a, b = (self.pairs or {})[draw.leaf.name]
        step = self.period(draw.step)
        return a[step][list(members)].to(device), b[step][list(members)].to(device)

    def vectors(self, draw: Draw, members: Sequence[int], device: torch.device) -> Tensor:
        return (self.singles or {})[draw.leaf.name][self.period(draw.step)][list(members)].to(device)

    def _numbers(self, leaf: Leaf) -> int:
        return sum(leaf.matrix or (leaf.numel,)) * self.rank
