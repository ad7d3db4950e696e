"""Laws of directions besides the Gaussian and signs: the sphere, one coordinate, a subspace; and all of them by name.

V, the second-moment factor, says what an estimate along one random direction costs: E||(z . g) z||^2 = V ||g||^2. A mean over n of them has
(V + n - 1) / n.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.core.errors import InputError, nearest
from tare.core.leaf import Leaf
from tare.core.random import make_key, normal
from tare.core.state import State
from tare.core.transform import StateSpec
from tare.zeroth.directions import Draw, Elementwise, Gaussian, Law, Rademacher, spans
from tare.zeroth.drawn import write_sum
from tare.zeroth.lowrank import LowRank

# ---- the sphere


@dataclass(frozen=True)
class Sphere(Elementwise):
    """Uniform on the sphere of radius sqrt(d), each leaf on its own: V = d, with no spread of the length.

    A normal direction times sqrt(d) / its norm, so each use draws the direction twice.

    >>> Sphere().factor(Leaf("w", (3, 4), torch.float32, "linear"))
    12.0
    """

    def gain(self, draw: Draw, device: torch.device) -> float:
        return math.sqrt(draw.leaf.numel / max(squared_norm(draw.key, draw.leaf.numel, device), 2.0**-56))

    def factor(self, leaf: Leaf) -> float:
        return float(leaf.numel)


@functools.lru_cache(maxsize=4096)
def squared_norm(key: int, numel: int, device: torch.device) -> float:
    """||z||^2 of the normal direction of a key: the same number on every device, because squares are summed as whole numbers.

    The square of an fp32 number is exact in fp64, and is cut to 2^-56 or, for sums of many, as finely as int64 can hold them.
    """
    total, digits = 0, 0
    for start, stop in spans(numel):
        z = torch.empty(stop - start, device=device)
        write_sum(z, [key], [1.0], law="gaussian", decay=0.0, start=start)
        if start == 0:
            digits = 56 - math.ceil(math.log2(stop))  # squares are below 2^6
        total += int(z.to(torch.float64).square_().mul_(2.0**digits).to(torch.int64).sum())
    return math.ldexp(float(total), -digits)


# ---- one coordinate


@dataclass(frozen=True)
class Coordinate(Law):
    """One element of each leaf, drawn anew for each direction, times sqrt(d) and a random sign: V = d.

    The sign makes the mean zero, as of every other law here.
    """

    cuts: ClassVar[bool] = True

    def place(self, draw: Draw) -> tuple[int, float]:
        """The element, and its value."""
        numel = draw.leaf.numel
        word = make_key(draw.key, "coordinate", numel)  # 64 well mixed bits
        return (word >> 1) * numel >> 63, math.copysign(math.sqrt(numel), 0.5 - (word & 1))

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = draw.leaf.numel if stop is None else stop
        z = torch.zeros(stop - start, dtype=draw.leaf.compute_dtype, device=weight.device)
        self.add_(z, draw, state, weight, 1.0, start)
        return z

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        at, value = self.place(draw)
        if start <= at < start + target.numel():
            element = target[_subscript(at - start, target.shape)]
            element.add_(scale * value)

    def factor(self, leaf: Leaf) -> float:
        return float(leaf.numel)


def _subscript(at: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Where the row-major element number `at` is."""
    found: list[int] = []
    for size in reversed(shape):
        at, rest = divmod(at, size)
        found.append(rest)
    return tuple(reversed(found))


# ---- a subspace

LEFT, RIGHT, INDEX = "span_left", "span_right", "span_index"


@dataclass(frozen=True)
class Subspace(Law):
    """Normal in k random dimensions of each leaf: z = U Xi V^T, Xi [a, b] standard normal, U [m, a] and V [n, b] orthonormal, k = a b.

    a = min(rank, m), b = min(rank, n); a side that the rank covers needs no basis, and where it covers both z is the Gaussian. Leaves that
    are no matrix have z = U xi. E[z z^T] is the projection on the subspace, and V = k + 2 of the gradient's projection, so the part of
    the gradient outside is not seen until the bases are drawn anew (random subspaces in this form: SubZero, arXiv 2410.08989).

    Bases are kept in the state by the storage's policy, or drawn again where that is `seed`; they come from LAPACK on the CPU, and so
    are the same wherever it is the same.

    Args:
        rank: of both bases, at least 1.
        period: steps after which they are drawn anew; 0: never.

    Raises:
        InputError: values out of range.

    >>> Subspace(2).factor(Leaf("w", (6, 4), torch.float32, "linear"))
    6.0
    """

    rank: int = 32
    period: int = 1000

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        check_whole("period", self.period, 0)

    def sides(self, leaf: Leaf) -> dict[str, tuple[int, int]]:
        """(length, columns) of the bases that a leaf needs."""
        lengths = dict(zip((LEFT, RIGHT), leaf.matrix or (leaf.numel,), strict=False))
        return {name: (length, self.rank) for name, length in lengths.items() if length > self.rank}

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        sides = self.sides(leaf)
        specs = {name: StateSpec((*leaf.stack, *shape), "basis", seedable=True) for name, shape in sides.items()}
        return {**specs, INDEX: StateSpec((), "count")} if sides else {}

    def index(self, draw: Draw) -> int:
        """1-based number of the bases at a step."""
        return draw.step // self.period + 1 if self.period else 1

    def prepare(self, draw: Draw, state: State, weight: Tensor) -> None:
        if INDEX in state and state[INDEX] != self.index(draw):
            for name in self.sides(draw.leaf):
                if state.kept(name):
                    state[name] = self._basis(draw, name, weight.device)
            state[INDEX] = self.index(draw)
            state.flush()

    def basis(self, draw: Draw, state: State, name: str, device: torch.device) -> Tensor | None:
        """[(experts,) length, columns]; None where the whole side is spanned."""
        if name not in self.sides(draw.leaf):
            return None
        if name in state and state.kept(name) and state[INDEX] == self.index(draw):
            kept: Tensor = state[name]
            return kept.to(draw.leaf.compute_dtype)
        return self._basis(draw, name, device)

    def _basis(self, draw: Draw, name: str, device: torch.device) -> Tensor:
        shape = (*draw.leaf.stack, *self.sides(draw.leaf)[name])
        numbers = normal(make_key(draw.seed, f"{draw.name}/{name}", self.index(draw)), shape).double()
        q, r = torch.linalg.qr(numbers)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over all bases, and defined
        return q.to(draw.leaf.compute_dtype).to(device)

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        leaf, stop = draw.leaf, draw.leaf.numel if stop is None else stop
        left, right = (self.basis(draw, state, name, weight.device) for name in (LEFT, RIGHT))
        if left is None and right is None:
            return Gaussian().draw(draw, state, weight, start, stop)
        m, n = leaf.matrix or (leaf.numel, 1)
        inner = (*leaf.stack, m if left is None else self.rank, n if right is None else self.rank)
        xi = torch.empty(inner, dtype=leaf.compute_dtype, device=weight.device)
        write_sum(xi, [draw.key], [1.0], law="gaussian", decay=0.0)
        if leaf.stack:
            z = xi if left is None else left @ xi
            return (z if right is None else z @ right.mT).reshape(-1)[start:stop]
        first = start // n
        rows = slice(first, -(-stop // n))  # those that the elements lie in
        z = xi[rows] if left is None else left[rows] @ xi
        z = z if right is None else z @ right.mT
        return z.reshape(-1)[start - first * n : stop - first * n]

    def factor(self, leaf: Leaf) -> float:
        return self.dimensions(leaf) + 2.0

    def dimensions(self, leaf: Leaf) -> int:
        """k."""
        sides = [min(self.rank, length) for length in leaf.matrix or (leaf.numel,)]
        return math.prod(sides) * math.prod(leaf.stack)

    def describe(self) -> str:
        return f"gaussian in subspaces of rank {self.rank}"


# ---- by name

LAWS: dict[str, type[Law]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "coordinate": Coordinate,
    "low-rank": LowRank,
    "subspace": Subspace,
}


def law(name: str, **options: Any) -> Law:
    """A law of directions by its name, with the arguments of its class.

    >>> law("low-rank", rank=2).describe()
    'rank 2 gaussian'

    Raises:
        InputError: a name or an argument that does not exist, or a value out of range.
    """
    if name not in LAWS:
        raise InputError(f"directions: {name!r} is not one of {', '.join(LAWS)}{nearest(name, list(LAWS))}")
    known = [field.name for field in fields(LAWS[name])]
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise InputError(f"directions: {name} {takes}, not {option!r}")
    return LAWS[name](**options)
