"""Rules without state: the gradient itself, or a map of it (sign, normalisation, whitening: signSGD, SinkGD, SWAN), times a constant."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform, Work
from tare.kernels import native_light
from tare.rules.matrices import as_matrix
from tare.rules.one_pass import map_numbers, one_pass
from tare.rules.postmap import PostMap


@dataclass(frozen=True)
class Stateless(Transform):
    """U = scale * map(G), G as the matrix of its leaf (experts: each its own). map: None is plain SGD. scale: multiplies lr.

    The gradient must be that of the whole batch: nothing averages it afterwards.
    """

    map: PostMap | None = None
    scale: float = 1.0

    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

    def __post_init__(self) -> None:
        check_number("scale", self.scale, 0.0, inclusive=True)

    @property
    def sharding(self) -> Sharding:  # type: ignore[override]
        return "elementwise" if self.map is None else self.map.sharding

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return 1.0 if self.map is None else self.map.workspace

    @property
    def proportional(self) -> float | None:  # type: ignore[override]
        return self.scale if self.map is None else None

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        g = as_matrix(grad, step.leaf)
        g = g.to(torch.promote_types(g.dtype, step.leaf.compute_dtype))
        if self.map is None:
            return Dense(g.reshape(grad.shape), self.scale)
        u = self.map(g) if g.dtype == grad.dtype else self.map.consume(g)
        return Dense(u.reshape(grad.shape), scale=self.scale)

    def update_many(self, batch: list[Work]) -> list[Work]:
        numbers = map_numbers(self.map)
        if numbers is None:
            return batch
        return [work for work in batch if not one_pass(native_light.mapped_, work, (), self.scale, **numbers)]

    def describe(self) -> str:
        return "sgd" if self.map is None else self.map.describe()
