"""Lion-K (Chen, Liu, Liang, Liu 2024, arXiv 2310.05898): Lion with the gradient of any convex function K in the place of the sign."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tare.core.checks import check_betas, check_choice
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.rules.maps import Orthogonal, PostMap, UnitNorm
from tare.rules.matrices import as_matrix, interpolate

Size = Literal["rms", "unit"]


@dataclass(frozen=True)
class LionKappa(Transform):
    """U = size * post(b1 M + (1-b1) G), post the gradient of K; then M = b2 M + (1-b2) G.

    With decay wd the iterates solve min f(W) + K*(wd W) / wd: post sign keeps |W|_inf, unit norm |W|_F, orthogonal the
    spectral norm at or below size / wd.

    size: `unit`: the bare gradient of K; `rms`: K times the constant that gives a full-rank U entries of root mean square 1, as
    a sign has, so that one learning rate serves every K.
    """

    post: PostMap
    betas: tuple[float, float] = (0.9, 0.99)
    size: Size = "rms"
    sharding: Sharding = "matrix"  # type: ignore[misc]  # of the map, see below

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_choice("size", self.size, ("rms", "unit"))
        object.__setattr__(self, "sharding", self.post.sharding)

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.post.workspace

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(leaf.shape)}

    def size_for(self, leaf: Leaf) -> float:
        """What the map's result is multiplied by on this leaf."""
        if self.size == "unit":
            return 1.0
        rows, columns = leaf.matrix or (1, leaf.numel)
        if isinstance(self.post, UnitNorm):
            return float(rows * columns) ** 0.5
        return float(max(rows, columns)) ** 0.5 if isinstance(self.post, Orthogonal) else 1.0

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        b1, b2 = step.betas(self.betas)
        m = state["exp_avg"]
        g = grad.view_as(m) if grad.is_contiguous() else grad.reshape(m.shape)
        dtype = self.post.working_dtype(step.leaf.compute_dtype)
        u = self.post.consume(interpolate(as_matrix(m, step.leaf), as_matrix(g, step.leaf), b1, dtype))
        m.mul_(b2).add_(g, alpha=1.0 - b2)
        return Dense(u.view(grad.shape), scale=self.size_for(step.leaf))

    def describe(self) -> str:
        return f"lion, {self.post.describe()}"
