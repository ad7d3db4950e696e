"""Lion-K (Chen, Liu, Liang, Liu 2024, arXiv 2310.05898): Lion with the gradient of any convex function K in the place of the sign."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tare.core.checks import check_betas, check_choice
from tare.core.delta import Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Work
from tare.kernels import native_light
from tare.rules.maps import Orthogonal, PostMap, UnitNorm
from tare.rules.matrices import as_matrix, interpolate
from tare.rules.one_pass import OnePass, direction, map_numbers, one_pass

Size = Literal["rms", "unit"]


@dataclass(frozen=True)
class LionKappa(OnePass):
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

    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

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

    def _native(self, work: Work) -> bool:
        own = self._numbers(work.step)
        size = self.size_for(work.step.leaf)
        return own is not None and one_pass(native_light.lion_, work, ("exp_avg",), size, **own)

    def _numbers(self, step: Step) -> dict[str, Any] | None:
        """What the kernel is told; None for a map that it does not know."""
        b1, b2 = step.betas(self.betas)
        own = map_numbers(self.post)
        return None if own is None else {"beta1": b1, "beta2": b2, **own}

    def _direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Dense:
        b1, b2 = step.betas(self.betas)
        m, own, size = state["exp_avg"], self._numbers(step), self.size_for(step.leaf)
        if own is not None:
            fused = direction(native_light.lion_, grad.reshape(m.shape), (m,), spent, **own)
            if fused is not None:
                return Dense(fused.view(grad.shape), scale=size)
        g = grad.view_as(m) if grad.is_contiguous() else grad.reshape(m.shape)
        dtype = self.post.working_dtype(step.leaf.compute_dtype)
        u = self.post.consume(interpolate(as_matrix(m, step.leaf), as_matrix(g, step.leaf), b1, dtype))
        m.mul_(b2).add_(g, alpha=1.0 - b2)
        return Dense(u.view(grad.shape), scale=size)

    def describe(self) -> str:
        return f"lion, {self.post.describe()}"
