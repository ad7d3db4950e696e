"""CutOptimizer: the frame of forward-only methods around one backward: gradients are estimated at a black box and carried on from there.

A step runs the closure once, with gradients; boxes in it (`zeroth.cut`) are told the optimizer's seed and step. What is skipped, counted,
rounded and saved is as in `ForwardOptimizer`.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.recipe import Recipe
from tare.core.state import State
from tare.core.tensors import is_fake
from tare.zeroth.assembly import Assembly
from tare.zeroth.closure import loss_from
from tare.zeroth.cut import Frame
from tare.zeroth.directions import Draw, Law
from tare.zeroth.log import SeedLog
from tare.zeroth.memory import Memory, Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import THETA, Asking, Estimate, Point
from tare.zeroth.record import Record


@dataclass(frozen=True)
class Carried(Law):
    """The law of leaves in front of a cut: they have no directions of their own."""

    partial: ClassVar[bool] = True

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        raise InputError(f"{draw.leaf.name}: a leaf in front of a cut has no directions; they are drawn at the cut")

    def factor(self, leaf: Leaf) -> float:
        return math.nan

    def describe(self) -> str:
        return "what the cut carries back"


@dataclass(frozen=True)
class Here:
    """One evaluation, where the weights stand."""

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        yield [THETA]
        return Estimate([], [])

    @property
    def evaluations(self) -> float:
        return 1.0

    def describe(self) -> str:
        return "one forward and backward; black boxes in it ask for what they need"


class Unmoved(Memory):
    """No leaf is perturbed: what is, is at the cut."""

    name = "at the cut"

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        yield


class Found(Assembly):
    """A gradient that is there already."""

    def __init__(self, leaf: Moved, gradient: Tensor | None):
        super().__init__(leaf, ())
        self.gradient = gradient

    def __call__(self, start: int, stop: int) -> Tensor:
        p, dtype = self.leaf.parameter, self.leaf.draw(0).leaf.compute_dtype
        if self.gradient is None:
            return torch.zeros(stop - start, dtype=dtype, device=p.device)
        return self.gradient.reshape(-1)[start:stop].to(dtype, copy=True)


class CutOptimizer(ForwardOptimizer):
    """A `ForwardOptimizer` whose gradients come through black boxes. Arguments as there, without probe, memory and exchange.

    Raises:
        InputError: weights without numbers, as of plans; and as there.
    """

    shares: ClassVar[bool] = False

    def __init__(self, params: Any, recipe: Recipe, lr: float | Tensor, **rest: Any):
        self._carried: dict[Tensor, Tensor | None] = {}
        self._told: set[str] = set()
        super().__init__(params, recipe, lr, probe=Here(), memory=Unmoved(), **rest)
        if any(p.is_meta or is_fake(p) for p in self._entries):
            raise InputError(
                "params: what a black box and the way back from it need is not known on paper; build the model, and train it in a loop of "
                "your own with the box in the closure"
            )

    def _ask(self, leaves: list[Moved], closure: Callable[[], Any], losses: list[float]) -> Estimate | None:
        wanted = [leaf.parameter for leaf in leaves]
        seed = int(self.param_groups[0]["seed"])

        def run() -> Any:
            before = [p.grad for p in wanted]
            frame = Frame(seed, self.steps)
            with torch.enable_grad(), frame.entered():
                value = closure()
                if any(p.grad is not had for p, had in zip(wanted, before, strict=True)):
                    for p, had in zip(wanted, before, strict=True):
                        p.grad = had
                    raise InputError(
                        "closure: it must not call backward(), step does; return the loss and nothing else"
                    )
                if math.isfinite(loss_from(value)):
                    self._carry(value, wanted)
            if not frame.calls:
                self._once("no BlackBox took part in the loss: this was ordinary backpropagation")
            return value

        self._carried = {}
        try:
            return super()._ask(leaves, run, losses)
        except BaseException:
            self._carried = {}
            raise

    def _carry(self, value: Any, wanted: list[Tensor]) -> None:
        if not isinstance(value, Tensor) or not value.requires_grad:
            if isinstance(value, Tensor):
                self._once("the loss has no gradient: wrap what has none in tare.zeroth.cut.BlackBox")
            return
        found = torch.autograd.grad(value.reshape(()), wanted, allow_unused=True)
        self._carried = dict(zip(wanted, found, strict=True))

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=7)

    def _assembled(self, leaf: Moved, record: Record) -> Assembly:
        return Found(leaf, self._carried.get(leaf.parameter))

    def _take(self, leaves: list[Moved], record: Record) -> None:
        try:
            super()._take(leaves, record)
        finally:
            self._carried = {}

    def _begin(self) -> None:
        if isinstance(self.on_step, SeedLog):
            raise InputError(
                "on_step: gradients in front of a cut are of the data, and no list of numbers holds them; leave the log out"
            )
        super()._begin()

    def replay(self, record: Record) -> None:
        """Refused: a record does not hold gradients."""
        raise InputError("replay: gradients in front of a cut are of the data, and no record holds them")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_carried": {}}
