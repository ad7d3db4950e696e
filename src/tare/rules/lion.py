"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum. One moment, no epsilon, no bias correction."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tare.core.checks import check_betas
from tare.core.delta import Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.storage import LOW
from tare.core.transform import StateSpec, Step, Work
from tare.kernels import native, native_fourbit, native_light
from tare.rules.one_pass import OnePass, direction, one_pass


@dataclass(frozen=True)
class Lion(OnePass):
    """U = sign(b1 m + (1-b1) g); then m = b2 m + (1-b2) g. b1 reads out, b2 averages: they do not swap.

    sign: False leaves the interpolation as it is, for methods that take the sign elsewhere (after lifting it, say).
    """

    betas: tuple[float, float] = (0.9, 0.99)
    sign: bool = True

    fuses: ClassVar[tuple[str, ...]] = ("stochastic", "split24")

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(leaf.shape)}

    def _direction(self, grad: Tensor, state: State, step: Step, spent: bool) -> Dense:
        b1, b2 = step.betas(self.betas)
        m = state["exp_avg"]
        fused = direction(native_light.lion_, grad.view_as(m), (m,), spent, **self._numbers(step))
        if fused is not None:
            return Dense(fused)
        g = grad.to(m.dtype).view_as(m)
        x = (m * b1).add_(g, alpha=1.0 - b1)
        # sign(NaN) is 0 in torch: a NaN would freeze its weight unseen.
        u = x.sign().addcmul_(x, x.new_zeros(())) if self.sign else x
        m.mul_(b2).add_(g, alpha=1.0 - b2)
        return Dense(u)

    def _numbers(self, step: Step) -> dict[str, Any]:
        b1, b2 = step.betas(self.betas)
        return {"beta1": b1, "beta2": b2, "kind": "sign" if self.sign else "none"}

    def update_many(self, batch: list[Work]) -> list[Work]:
        return [work for work in super().update_many(batch) if not self._quantised(work)]

    def _native(self, work: Work) -> bool:
        return one_pass(native_light.lion_, work, ("exp_avg",), **self._numbers(work.step))

    def _quantised(self, work: Work) -> bool:
        slot = work.state.slots["exp_avg"]
        if slot.form not in ("int8", "int4") or work.maximize or not self.sign or LOW in work.state.raw:
            return False
        b1, b2 = work.step.betas(self.betas)
        fused = native.lion8bit_ if slot.form == "int8" else native_fourbit.lion4bit_
        return fused(
            work.weight, work.grad, work.state.raw["exp_avg_codes"], work.state.raw["exp_avg_absmax"],
            alpha=work.gain, decay=work.shrink, beta1=b1, beta2=b2, block=slot.block, key=work.noise,
        )  # fmt: skip
