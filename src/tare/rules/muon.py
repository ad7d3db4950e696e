"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon): orthogonalised momentum; also scaled as in Moonlight (Liu et al. 2025, arXiv
2502.16982).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.rules.maps import PostMap
from tare.rules.matrices import as_matrix, interpolate
from tare.rules.orthogonal import PUBLISHED

Factor = Literal["original", "matrix", "moonlight"]


@dataclass(frozen=True)
class Muon(Transform):
    """M = b M + (1-b) G; U = factor * post((1-b) G + b M), or factor * post(M) without nesterov.

    factor: `original` max(1, rows / columns)^(1/2), where a convolution counts its kernel's two sides (so 1 for square
    kernels) as the published code does; `matrix` the same with the convolution's out x (in * kernel) matrix; `moonlight`
    0.2 max(rows, columns)^(1/2), which gives the update the RMS of AdamW's.
    """

    momentum: float = 0.95
    nesterov: bool = True
    post: PostMap = PUBLISHED
    factor: Factor = "original"

    sharding: ClassVar[Sharding] = "matrix"

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, 0.0, inclusive=True, below=1.0)
        check_choice("factor", self.factor, ("original", "matrix", "moonlight"))

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.post.workspace

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(leaf.shape)}

    def factor_for(self, leaf: Leaf) -> float:
        """The multiplier that the shape of a leaf asks for; 1 for what is no matrix."""
        if leaf.matrix is None:
            return 1.0
        rows, columns = leaf.matrix
        if self.factor == "moonlight":
            return 0.2 * math.sqrt(max(rows, columns))
        if self.factor == "original" and not leaf.stack:
            rows, columns = leaf.shape[-2:]
        return math.sqrt(max(1.0, rows / columns))

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        m = state["momentum_buffer"]
        m.mul_(self.momentum).add_(grad, alpha=1.0 - self.momentum)
        dtype = self.post.working_dtype(step.leaf.compute_dtype)
        m, g = as_matrix(m, step.leaf), as_matrix(grad, step.leaf)
        u = self.post.consume(interpolate(m, g, self.momentum, dtype) if self.nesterov else m.to(dtype, copy=True))
        return Dense(u.view(grad.shape), scale=self.factor_for(step.leaf))

    def describe(self) -> str:
        return f"muon, {self.post.describe()}"
