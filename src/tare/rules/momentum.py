"""SGD with momentum (Polyak 1964; Nesterov 1983) as torch.optim.SGD defines it: the buffer starts from the first gradient."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tare.core.checks import check_number
from tare.core.delta import Delta, Dense
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec, Step, Transform, Work
from tare.kernels import native_light
from tare.rules.one_pass import one_pass


@dataclass(frozen=True)
class Momentum(Transform):
    """b = momentum b + (1 - dampening) g (b = g at the first step); U = b, or g + momentum b when nesterov.

    momentum 0 is plain SGD and keeps no state.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, 0.0, inclusive=True)
        check_number("dampening", self.dampening, 0.0, inclusive=True)
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise InputError("Invalid nesterov: Nesterov momentum requires a momentum > 0 and zero dampening")

    @property
    def proportional(self) -> float | None:  # type: ignore[override]
        return 1.0 if self.momentum == 0.0 else None

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(leaf.shape)} if self.momentum else {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        if not self.momentum:
            return Dense(grad)
        buffer = state["momentum_buffer"]
        g = grad.to(buffer.dtype).view_as(buffer)
        buffer.mul_(self.momentum).add_(g, alpha=self._rest(step))
        return Dense(g.add(buffer, alpha=self.momentum) if self.nesterov else buffer)

    def _rest(self, step: Step) -> float:
        """What the gradient is multiplied by; the buffer is 0 at the first step."""
        return 1.0 if step.count == 1 else 1.0 - self.dampening

    def update_many(self, batch: list[Work]) -> list[Work]:
        return [work for work in batch if not self._native(work)]

    def _native(self, work: Work) -> bool:
        if not self.momentum:
            return one_pass(native_light.mapped_, work, ())
        own = {"beta": self.momentum, "rest": self._rest(work.step), "nesterov": self.nesterov}
        return one_pass(native_light.momentum_, work, ("momentum_buffer",), **own)
