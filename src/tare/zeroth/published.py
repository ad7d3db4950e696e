"""The arithmetic of MeZO's published code (princeton-nlp/MeZO) in 16 bits, with its two rounding faults: to reproduce tables only.

Weights do not return to where they were after +eps, -2 eps, +eps, and updates below half a unit in the last place are lost.
"""

from dataclasses import dataclass

from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec, Step, Transform
from tare.zeroth.directions import Draw, spans
from tare.zeroth.wrapped import Wrapped


@dataclass(frozen=True)
class RoundedTwice(Wrapped):
    """`law`, whose directions are rounded to the dtype of what they are added to, multiplied, rounded, added, and rounded again."""

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        flat = target.view(-1) if target.is_contiguous() and self.partial else None
        if flat is None:
            z = self.draw(draw, state, weight)[start : start + target.numel()]
            target.add_(z.to(weight.dtype).mul(scale).to(target.dtype).view(target.shape))
            return
        for first, last in spans(flat.numel()):
            z = self.draw(draw, state, weight, start + first, start + last)
            flat[first:last].add_(z.to(weight.dtype).mul(scale).to(flat.dtype))

    def describe(self) -> str:
        return f"{self.law.describe()}, rounded as published"


@dataclass(frozen=True)
class PublishedSGD(Transform):
    """W <- W - lr (g + wd W), where every product and sum is rounded to the dtype of W.

    undecayed: words of names for which there is no decay.
    """

    weight_decay: float = 0.0
    undecayed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay, 0.0, inclusive=True)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        weight = step.weight.detach()
        weight = weight.view(-1)[state.window] if state.window is not None else weight
        u = grad.to(weight.dtype)
        if self.weight_decay and not any(word in step.leaf.name.lower() for word in self.undecayed):
            u = u + self.weight_decay * weight.view_as(u)
        return Dense(step.lr * u, lr_inside=True)

    def describe(self) -> str:
        return "sgd, rounded as published"
