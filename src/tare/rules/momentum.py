"""SGD with momentum (Polyak 1964; Nesterov 1983) as torch.optim.SGD defines it: the buffer starts from the first gradient."""

from dataclasses import dataclass

from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta, Dense
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec, Step, Transform


@dataclass(frozen=True)
class Momentum(Transform):
    """b = momentum b + (1 - dampening) g (b = g at the first step); U = b, or g + momentum b when nesterov.

    momentum 0 is plain SGD and keeps no state.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, 0.0, inclusive=True)
        check_number("dampening", self.dampening, 0.0, inclusive=True)
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise InputError("Invalid nesterov: Nesterov momentum requires a momentum > 0 and zero dampening")

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(leaf.shape)} if self.momentum else {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        if not self.momentum:
            return Dense(grad)
        buffer = state["momentum_buffer"]
        g = grad.to(buffer.dtype).view_as(buffer)
        buffer.mul_(self.momentum).add_(g, alpha=1.0 if step.count == 1 else 1.0 - self.dampening)
        return Dense(g.add(buffer, alpha=self.momentum) if self.nesterov else buffer)
