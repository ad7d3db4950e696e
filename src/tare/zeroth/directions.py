"""Directions: random tensors that are never stored. Each is a pure function of (seed, leaf name, step, member, element).

A law says how they are distributed (more of them are in `laws`); `Directed` gives a leaf its law and the rule that its estimated
gradient goes through.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.delta import Delta
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.random import make_key
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform, Work
from tare.kernels import directions
from tare.zeroth.drawn import CHUNK, write_sum


@dataclass(frozen=True)
class Draw:
    """Which direction: of which leaf, at which step of the run (from 0), for which member of a population.

    name: the leaf's name for randomness. seed: of the optimizer.
    """

    leaf: Leaf
    name: str
    seed: int
    step: int
    member: int = 0

    @cached_property
    def key(self) -> int:
        """Key of the counter-based generator."""
        return make_key(self.seed, f"{self.name}/direction/{self.member}", self.step)


@dataclass(frozen=True)
class Law:
    """How directions are distributed. E[z z^T] = I on the support, unless a law says otherwise.

    `partial`: whether elements can be drawn apart from one another, so that a large leaf needs no direction of its size.
    `reads_weight`: whether the direction depends on the unperturbed weight: such laws cannot perturb in place.
    `fuses`: whether `write_` exists.
    `cuts`: whether a piece of a leaf can be moved from the whole leaf's `Draw` and the piece's `start` alone, weights and state aside: so
    each of several ranks can draw its own rows.
    """

    partial: ClassVar[bool] = True
    cuts: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    fuses: ClassVar[bool] = False

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        """What the law keeps for a leaf, such as a threshold."""
        return {}

    def prepare(self, draw: Draw, state: State, weight: Tensor) -> None:
        """Called once before each step, with the unperturbed weight."""

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The direction, flat, elements `start` to `stop`, in the leaf's compute dtype.

        weight: the whole unperturbed weight, for laws that read it.
        """
        raise NotImplementedError

    def learn(self, leaf: Leaf, state: State, kept: Mapping[str, float]) -> None:
        """Called after each step that asked to keep numbers (`Estimate.keep`), for laws that depend on them."""

    def perturbation(self, leaf: Leaf, state: State) -> float:
        """A factor on the direction where a loss is evaluated."""
        return 1.0

    def update(self, leaf: Leaf, state: State) -> float:
        """A factor on the direction where the gradient is put together."""
        return 1.0

    def factor(self, leaf: Leaf) -> float:
        """V in E||(z . g) z||^2 = V ||g||^2 for this leaf alone."""
        raise NotImplementedError

    def describe(self) -> str:
        """A word for tables."""
        return type(self).__name__.lower()

    # -- what memory plans and the engine call -------------------------------------------------------------------------

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        """target += scale z, in place: the product and the sum in the leaf's compute dtype, then rounded to that of `target`.

        target: the whole leaf in any shape of as many elements, or the elements from `start` on, flat. weight: the whole leaf.
        """
        flat = target.view(-1) if target.is_contiguous() else None
        if flat is None or not self.partial:
            whole = self.draw(draw, state, weight)
            part = whole if target.numel() == whole.numel() else whole[start : start + target.numel()]
            _add_product(target, part.view(target.shape), scale)
            return
        for first, last in spans(flat.numel()):
            z = self.draw(draw, state, weight, start + first, start + last)
            _add_product(flat[first:last], z, scale)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        """target += sum of coefficient z over `terms`, as `add_` does for one. Laws that can add many at once override it."""
        for draw, scale in terms:
            self.add_(target, draw, state, weight, scale, start)

    def moved(self, source: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor) -> Tensor:
        """A fresh copy of `source`, the whole leaf, with what `gather_` adds."""
        target = source.clone()
        self.gather_(target, terms, state, weight)
        return target

    def write_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, *, decay: float, alpha: float,
        scale: float = 1.0, start: int = 0, low: Tensor | None = None, key: int | None = None,
    ) -> None:  # fmt: skip
        """target <- decay target - alpha scale (sum of coefficient z over `terms`), in one pass; only where `fuses`.

        target: elements of the leaf from `start` on, of any shape. weight: the whole leaf, which may be what is written. low, key: how a
        bf16 weight is kept and rounded (see `kernels.directions.write_`).
        """
        raise NotImplementedError


def _add_product(target: Tensor, z: Tensor, scale: float) -> None:
    """target += scale z. Not `add_(alpha=)`, which rounds product and sum together on some devices only."""
    dtype = torch.promote_types(target.dtype, z.dtype)
    target.copy_(target.to(dtype).add_(z.to(dtype) * scale))


def spans(numel: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Cuts of a flat leaf."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


@dataclass(frozen=True)
class Elementwise(Law):
    """Laws whose elements are drawn apart from one another, each from its number alone (`kernels.directions`): bit for bit the same on
    every device, however a leaf is cut. Sums of many are one pass over what they are added to, formed in fp32 (fp64 for fp64) and
    rounded once."""

    fuses: ClassVar[bool] = True
    cuts: ClassVar[bool] = True
    stream: ClassVar[directions.Law] = "gaussian"  # of the generator

    def gain(self, draw: Draw, device: torch.device) -> float:
        """What its numbers are multiplied by."""
        return 1.0

    def total(self, terms: Sequence[tuple[Draw, float]], device: torch.device) -> dict[str, Any]:
        """The sum over `terms` as `write_sum` takes it."""
        coefficients = [scale * self.gain(draw, device) for draw, scale in terms]
        return {"keys": [draw.key for draw, _ in terms], "coefficients": coefficients, "law": self.stream}

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = draw.leaf.numel if stop is None else stop
        z = torch.empty(stop - start, dtype=draw.leaf.compute_dtype, device=weight.device)
        write_sum(z, **self.total([(draw, 1.0)], weight.device), decay=0.0, start=start)
        return z

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        write_sum(target, **self.total([(draw, scale)], target.device), start=start)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        write_sum(target, **self.total(terms, target.device), start=start)

    def moved(self, source: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor) -> Tensor:
        target = torch.empty_like(source)
        write_sum(target, **self.total(terms, target.device), source=source)
        return target

    def write_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, *, decay: float, alpha: float,
        scale: float = 1.0, start: int = 0, low: Tensor | None = None, key: int | None = None,
    ) -> None:  # fmt: skip
        how = self.total(terms, target.device)
        write_sum(target, **how, decay=decay, alpha=alpha, scale=scale, start=start, low=low, key=key)


@dataclass(frozen=True)
class Gaussian(Elementwise):
    """z ~ N(0, I): V = d + 2. What MeZO and most others draw.

    >>> Gaussian().factor(Leaf("w", (3, 4), torch.float32, "linear"))
    14.0
    """

    def factor(self, leaf: Leaf) -> float:
        return leaf.numel + 2.0


@dataclass(frozen=True)
class Rademacher(Elementwise):
    """Signs: V = d, the least that independent entries of unit variance can have; a third of the time of normals."""

    stream: ClassVar[directions.Law] = "signs"

    def factor(self, leaf: Leaf) -> float:
        return float(leaf.numel)


@dataclass(frozen=True)
class Directed(Transform):
    """A leaf of a forward-only method: its law of directions, and the rule that steps it with the estimated gradient.

    decays: False: weight decay passes the leaf by. undecayed: words of names for which it does.
    """

    law: Law
    rule: Transform
    decays: bool = True
    undecayed: tuple[str, ...] = ()

    @property
    def sharding(self) -> Sharding:  # type: ignore[override]
        return self.rule.sharding

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return 1.0 + self.rule.workspace

    @property
    def fuses(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.rule.fuses

    @property
    def proportional(self) -> float | None:  # type: ignore[override]
        return self.rule.proportional

    @property
    def rate(self) -> float:  # type: ignore[override]
        return self.rule.rate

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {**self.rule.spec(leaf), **self.law.spec(leaf)}

    def check(self, leaf: Leaf, storage: Any) -> None:
        self.rule.check(leaf, storage)
        if self.rule.recalls != 0 and (self.law.reads_weight or self.law.spec(leaf)):
            raise InputError(
                f"{leaf.name}: {self.rule.describe()} draws former directions again, but {self.law.describe()} ones depend on weights or "
                "state that have changed since; keep the moments instead"
            )

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        rule, why = self.rule.resolve(leaf)
        decays = self.decays and not any(word in leaf.name.lower() for word in self.undecayed)
        return replace(self, rule=rule, decays=decays, undecayed=()), why

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        return self.rule.update(grad, state, step, compressed)

    def consume(self, grad: Tensor, state: State, step: Step) -> Delta:
        return self.rule.consume(grad, state, step)

    def update_many(self, batch: list[Work]) -> list[Work]:
        return self.rule.update_many(batch)

    def describe(self) -> str:
        return f"{self.rule.describe()} on {self.law.describe()}"


@dataclass(frozen=True)
class Untouched(Transform):
    """A leaf that a forward-only method leaves alone."""

    rests: ClassVar[bool] = True

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        raise AssertionError("a leaf that rests is not stepped")

    def describe(self) -> str:
        return "untouched"


def zeros_like(p: Tensor, leaf: Leaf) -> Tensor:
    """A gradient to gather in: the leaf's shape, its compute dtype."""
    return torch.zeros(leaf.shape, dtype=leaf.compute_dtype, device=p.device)
