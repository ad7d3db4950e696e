"""Coordinates: one element of one leaf at a time, by finite differences (DeepZero, arXiv 2310.02025, and KWSA, arXiv 1810.03233).

All trained leaves in a row are one vector; member i is its coordinate i. A mask says which of a leaf's are looked at.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tare.core.checks import check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.random import bits, make_key
from tare.core.recipe import Match, matches
from tare.core.state import State
from tare.core.transform import StateSpec
from tare.zeroth.directions import Draw, Law
from tare.zeroth.probes import THETA, Asking, Estimate, Term, away

FIRST, KEPT_COUNT = "coordinates_first", "coordinates_kept"
UNKNOWN = -1  # of KEPT_COUNT: not measured yet


class Mask:
    """Which coordinates of a leaf are looked at, step by step. Base: all of them."""

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        """What it keeps for a leaf."""
        return {}

    def masks(self, leaf: Leaf) -> bool:
        """Whether anything of a leaf is ever left out."""
        return False

    def active(self, draw: Draw, state: State) -> Tensor | None:
        """Numbers of the elements, ascending, int64 on the CPU; None: all."""
        return None

    def describe(self) -> str:
        return "coordinates"


@dataclass(frozen=True)
class All(Mask):
    """Every coordinate at every step."""


@dataclass(frozen=True)
class RandomMask(Mask):
    """A share of each leaf, drawn anew from (seed, name, step // period): exactly as many as `coordinates_kept` of its state says.

    Args:
        period: steps that a mask stays.
        leaves: which leaves have one; the others are looked at whole.
    """

    period: int = 1000
    leaves: Match = "*"

    def __post_init__(self) -> None:
        check_whole("mask_every", self.period, 1)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {KEPT_COUNT: StateSpec((), "count", init=UNKNOWN)} if self.masks(leaf) else {}

    def masks(self, leaf: Leaf) -> bool:
        return leaf.numel > 0 and matches(self.leaves, leaf)

    def active(self, draw: Draw, state: State) -> Tensor | None:
        if KEPT_COUNT not in state:
            return None
        count = state[KEPT_COUNT]
        if count == UNKNOWN or count >= draw.leaf.numel:
            return None
        order = bits(make_key(draw.seed, f"{draw.name}/mask", draw.step // self.period), 0, draw.leaf.numel)
        return torch.argsort(order, stable=True)[:count].sort().values

    def describe(self) -> str:
        return f"coordinates of a random mask, drawn anew every {self.period} steps"


@dataclass(frozen=True)
class Coordinates(Law):
    """z_i = e_i. With all members the sum over them is exact: V = 1.

    Where the leaf's first coordinate lies in the row is a count in its state, set before each step.
    16-bit weights: an evaluation moves them to the number nearest to w + mu, and by at least one unit in the last place.
    """

    mask: Mask = All()  # frozen

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {FIRST: StateSpec((), "count"), **self.mask.spec(leaf)}

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = draw.leaf.numel if stop is None else stop
        z = torch.zeros(stop - start, dtype=draw.leaf.compute_dtype, device=weight.device)
        self.gather_(z, [(draw, 1.0)], state, weight, start)
        return z

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        self.gather_(target, [(draw, scale)], state, weight, start)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        first, count = state[FIRST] + start, target.numel()
        own = [(draw.member - first, scale) for draw, scale in terms if 0 <= draw.member - first < count]
        if not own:
            return
        at = subscripts([place for place, _ in own], target)
        dtype = torch.promote_types(target.dtype, torch.float32)
        values = torch.tensor([scale for _, scale in own], dtype=dtype, device=target.device)
        target[at] = moved_by(target[at], values)

    def factor(self, leaf: Leaf) -> float:
        return 1.0

    def describe(self) -> str:
        return self.mask.describe()


def subscripts(places: Sequence[int], target: Tensor) -> tuple[Tensor, ...]:
    """Row-major numbers of elements, as what indexes a tensor of any strides."""
    if not target.ndim:
        return (torch.ones((), dtype=torch.bool, device=target.device),)
    numbers = torch.tensor(places, dtype=torch.int64, device=target.device)
    return tuple(torch.unravel_index(numbers, target.shape)) if target.ndim > 1 else (numbers,)


def moved_by(weights: Tensor, by: Tensor) -> Tensor:
    """weights + by, in their own dtype; in 16 bits never where it was, unless `by` is 0."""
    found = (weights.to(by.dtype) + by).to(weights.dtype)
    if weights.dtype.itemsize > 2:
        return found
    wide = weights.to(by.dtype)
    least = wide + by.sign() * wide.abs() * torch.finfo(weights.dtype).eps
    return torch.where((found == weights) & (by != 0), least.to(weights.dtype), found)


def reached(weights: Tensor, by: float, two_sided: bool) -> Tensor:
    """How much of the distance `by` (or of 2 by) an evaluation really spans, as a share; float64."""
    step = torch.full(weights.shape, by, dtype=torch.promote_types(weights.dtype, torch.float32), device=weights.device)
    ahead = moved_by(weights, step).double()
    behind = moved_by(weights, -step).double() if two_sided else weights.double()
    return (ahead - behind) / (by * (2.0 if two_sided else 1.0))


@dataclass(frozen=True)
class CoordinateWise:
    """g_i = (f(theta + mu e_i) - f(theta)) / mu for the active coordinates, 0 for others (CGE): biased by mu / 2 times the curvature.

    Args:
        mu: how far; `lr`: the learning rate of the step.
        two_sided: (f(theta + mu e_i) - f(theta - mu e_i)) / (2 mu) instead: exact for quadratic functions, twice the evaluations.
        active: the members; told by the optimizer before each step.
    """

    mu: float | Literal["lr"] = 5e-3
    two_sided: bool = False
    active: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mu != "lr":
            check_number("mu", self.mu, 0.0)

    def width(self, step: int, kept: Mapping[str, float]) -> float:
        """mu at a step."""
        if self.mu != "lr":
            return float(self.mu)
        if "lr" not in kept:
            raise InputError("mu: 'lr' needs one learning rate for all groups; use one group, or give a number")
        return kept["lr"]

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        mu = self.width(step, kept)
        if not mu:
            yield [THETA]
            return Estimate([], [], moves=False)
        if self.two_sided:
            values = yield [away(i, sign * mu) for i in self.active for sign in (1.0, -1.0)]
            found = [(a - b) / (2.0 * mu) for a, b in zip(values[::2], values[1::2], strict=True)]
        else:
            here, *values = yield [THETA, *(away(i, mu) for i in self.active)]
            found = [(value - here) / mu for value in values]
        return Estimate([Term(i, g) for i, g in zip(self.active, found, strict=True)], found)

    @property
    def evaluations(self) -> float:
        return 2.0 * len(self.active) if self.two_sided else 1.0 + len(self.active)

    def describe(self) -> str:
        sides = "two-sided" if self.two_sided else "one-sided"
        width = self.mu if isinstance(self.mu, str) else f"{self.mu:g}"
        return f"{sides} along {len(self.active)} coordinates, mu {width}"


def counts_from(ratios: Mapping[str, float], leaves: Iterable[Leaf]) -> dict[str, int]:
    """Coordinates that leaves keep, from the share of each that is left out; at least one. Leaves without a share keep all.

    >>> counts_from({"w": 0.75}, [Leaf("w", (4, 4), torch.float32, "linear")])
    {'w': 4}
    """
    found = {}
    for leaf in leaves:
        share = check_number(
            f"ratio of {leaf.name}", ratios.get(leaf.name, 0.0), 0.0, inclusive=True, below=1.0 + 1e-12
        )
        found[leaf.name] = max(1, leaf.numel - round(share * leaf.numel))
    return found


def places_of(members: Any, state: State, numel: int) -> list[int]:
    """Which of some members lie in a leaf, as numbers of its elements."""
    first = state[FIRST]
    return [member - first for member in members if 0 <= member - first < numel]
