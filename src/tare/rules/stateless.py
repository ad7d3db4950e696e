"""Rules without state: the gradient itself, or a map of it (sign, normalisation, whitening), times a constant."""

from dataclasses import dataclass

from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.rules.postmap import PostMap


@dataclass(frozen=True)
class Stateless(Transform):
    """U = scale * map(g). map: None is plain SGD, `Sign()` is signSGD. scale: multiplies lr."""

    map: PostMap | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale, 0.0, inclusive=True)

    @property
    def sharding(self) -> Sharding:  # type: ignore[override]
        return "elementwise" if self.map is None else self.map.sharding

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        g = grad if grad.dtype == step.leaf.compute_dtype else grad.to(step.leaf.compute_dtype)
        if self.map is None:
            return Dense(g, self.scale)
        whole = g.shape == step.leaf.shape and step.leaf.matrix is not None  # not a chunk of an element-wise rule
        return Dense(self.map(g.reshape(step.leaf.view) if whole else g), self.scale)

    def describe(self) -> str:
        return "sgd" if self.map is None else self.map.describe()
