"""Planes: Newton steps in random two-dimensional planes, whose curvature is read off a fitted quadratic (ZO-SAH, arXiv 2507.06125).

Planes are never stored: their vectors are combinations of drawn directions, and only the coefficients that make them orthonormal are kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tare.core.checks import check_number, check_whole
from tare.core.errors import InputError
from tare.zeroth.directions import Draw, spans
from tare.zeroth.memory import Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import THETA, Asking, Estimate, Point, Term
from tare.zeroth.wrapped import Redrawn

Pair = tuple[float, float]
Rows = tuple[tuple[float, ...], ...]
REMEMBERED = 18  # points of a plane that are fitted at most: the latest
SPREAD: tuple[Pair, ...] = ((-1.0, 0.0), (0.0, -1.0), (1.0, 1.0))  # with 0, e1 and e2 they settle a quadratic


@dataclass(frozen=True)
class Held(Redrawn):
    """`law`, whose directions stay for `period` steps; 0: for good."""

    period: int = 1

    def meant(self, draw: Draw) -> Draw:
        return replace(draw, step=draw.step // self.period if self.period else 0)

    def describe(self) -> str:
        return f"{self.law.describe()}, held for {self.period} steps" if self.period != 1 else self.law.describe()


# -- one plane ---------------------------------------------------------------------------------------------------------------


def fit(points: Sequence[Pair], values: Sequence[float], ridge: float) -> tuple[float, float, float]:
    """(H11, H12, H22) of the quadratic c + b.u + u.H u / 2 nearest to the values, by ridge least squares in coordinates over their
    largest.

    >>> points = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 1.0)]
    >>> [round(h, 6) for h in fit(points, [3 * u * u + u * v - 2 * v * v + u for u, v in points], 1e-12)]
    [6.0, 1.0, -4.0]
    """
    scale = max(abs(x) for point in points for x in point)
    scaled = [(u / scale, v / scale) for u, v in points]
    root = math.sqrt(ridge)
    rows = [[1.0, a, b, a * a / 2, a * b, b * b / 2] for a, b in scaled]
    rows += [[root if i == j else 0.0 for j in range(6)] for i in range(6)]
    found = least_squares(rows, [*values, *[0.0] * 6])
    return found[3] / scale**2, found[4] / scale**2, found[5] / scale**2


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """x with the least ||rows x - values||, by modified Gram-Schmidt in plain numbers: the same bits everywhere. Small systems only."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    rest, count = list(values), len(columns)
    upper = [[0.0] * count for _ in range(count)]
    right = [0.0] * count
    for k, column in enumerate(columns):
        length = math.sqrt(math.fsum(x * x for x in column))
        upper[k][k] = length
        q = [x / length for x in column] if length else column
        for j in range(k + 1, count):
            upper[k][j] = math.fsum(a * b for a, b in zip(q, columns[j], strict=True))
            columns[j] = [b - upper[k][j] * a for a, b in zip(q, columns[j], strict=True)]
        right[k] = math.fsum(a * b for a, b in zip(q, rest, strict=True))
        rest = [b - right[k] * a for a, b in zip(q, rest, strict=True)]
    found = [0.0] * count
    for k in reversed(range(count)):
        if upper[k][k]:
            found[k] = (right[k] - math.fsum(upper[k][j] * found[j] for j in range(k + 1, count))) / upper[k][k]
    return found


def floored(h: tuple[float, float, float], floor: float) -> tuple[float, float, Pair]:
    """(f1, f2, (n1, n2)): magnitudes of the eigenvalues, none below `floor` times the larger, and N = [[n1, n2], [n2, -n1]] for which the
    floored matrix is (f1 + f2) / 2 I + (f1 - f2) / 2 N. The same of H and -H, bit for bit."""
    mean, half = (h[0] + h[2]) / 2, (h[0] - h[2]) / 2
    r = math.hypot(half, h[1])
    one, two = abs(mean + r), abs(mean - r)
    least = floor * max(one, two)
    way = (half / r, h[1] / r) if r else (0.0, 0.0)
    return max(one, least), max(two, least), way


def newton(g: Pair, h: tuple[float, float, float], floor: float) -> Pair:
    """Floored |H|^-1 g; g itself where H is 0."""
    f1, f2, (n1, n2) = floored(h, floor)
    if not f1 or not f2:
        return g
    half, rest = (1 / f1 + 1 / f2) / 2, (1 / f1 - 1 / f2) / 2
    return half * g[0] + rest * (n1 * g[0] + n2 * g[1]), half * g[1] + rest * (n2 * g[0] - n1 * g[1])


# -- all of them -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planes:
    """v = sum over planes of e s, s = |H|^-1 g in each: g by forward differences, H of the fitted quadratic.

    Args:
        planes: two-dimensional and orthogonal to one another; their steps are summed.
        eps: how far points stand off.
        curvature: False: H = 1, plain descent in random planes, without the further points.
        ridge: of the fit. floor: eigenvalues of |H| are at least this share of the larger one.
        cap: longest s of a plane; None: any.
        reuse: values of former steps in the same plane take part in the fit: one plane, and one batch for a period.
        period: steps that the planes stay.
        ascends: whether the optimizer adds the step.
        extra: further points (u1, u2), one triple for each plane, by step; None: -e1, -e2, e1 + e2.
        basis: coefficients of the drawn directions in e1, e2 of each plane; told by the optimizer.
    """

    planes: int = 4
    eps: float = 1e-2
    curvature: bool = True
    ridge: float = 1e-9
    floor: float = 1e-2
    cap: float | None = 1.0
    reuse: bool = False
    period: int = 1
    ascends: bool = False
    extra: Mapping[int, Any] | None = None
    basis: Rows = ()

    def __post_init__(self) -> None:
        check_whole("planes", self.planes, 1)
        check_whole("period", self.period, 0)
        check_number("eps", self.eps, 0.0)
        check_number("ridge", self.ridge, 0.0, inclusive=True)
        check_number("eigen_floor", self.floor, 0.0, below=1.0 + 1e-12)
        if self.cap is not None:
            check_number("cap", self.cap, 0.0)
        if self.reuse and self.planes != 1:
            raise InputError(
                "reuse: with several planes the weights leave each of them, so its values are of no more use; use planes=1"
            )
        if self.reuse and not self.curvature:
            raise InputError("reuse: values are kept for the fit of the curvature; use curvature=True")

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        if self.reuse and "lr" not in kept:
            raise InputError(
                "reuse: values are kept by how far the weights went, which takes one learning rate for all groups"
            )
        former = self._former(step, kept)
        own = [self._points(step, j, former) for j in range(self.planes)]
        values = yield [THETA, *(self._at(j, u) for j, points in enumerate(own) for u in points)]
        here, place = values[0], 1
        total, slopes = [0.0] * (2 * self.planes), list[float]()
        keep: dict[str, float] | None = {} if self.reuse else None
        for j, points in enumerate(own):
            found = values[place : place + len(points)]
            place += len(points)
            g = (found[0] - here) / self.eps, (found[1] - here) / self.eps
            slopes += g
            known = [((0.0, 0.0), here), *zip(points, found, strict=True), *former]
            s = self._step(g, known, here)
            for k in range(2 * self.planes):
                total[k] += s[0] * self.basis[2 * j][k] + s[1] * self.basis[2 * j + 1][k]
            if self.reuse:
                keep = self._remember(step, known, s, kept["lr"])
        return Estimate([Term(k, c) for k, c in enumerate(total)], slopes, keep)

    def _step(self, g: Pair, known: Sequence[tuple[Pair, float]], here: float) -> Pair:
        s = g
        if self.curvature:
            points = [u for u, _ in known]
            reach = max(abs(x) for point in points for x in point)
            ridge = (
                self.ridge * min(1.0, (self.eps / reach) ** 4) if self.reuse else self.ridge
            )  # it must not outweigh near points
            h = fit(points, [value - here for _, value in known], ridge)
            s = newton(g, h, self.floor)
        length = math.hypot(*s)
        if self.cap is not None and length > self.cap:
            s = s[0] * self.cap / length, s[1] * self.cap / length
        return s

    def _points(self, step: int, plane: int, former: Sequence[tuple[Pair, float]]) -> list[Pair]:
        """Where plane `plane` is evaluated besides theta."""
        points = [(self.eps, 0.0), (0.0, self.eps)]
        if not self.curvature or len(former) >= 3:
            return points
        if self.extra is not None:
            return points + [(float(u[0]), float(u[1])) for u in self.extra[step][plane]]
        return points + [(self.eps * a, self.eps * b) for a, b in SPREAD]

    def _at(self, plane: int, u: Pair) -> Point:
        first, second = self.basis[2 * plane], self.basis[2 * plane + 1]
        return Point(
            tuple((k, u[0] * a + u[1] * b) for k, (a, b) in enumerate(zip(first, second, strict=True)) if a or b)
        )

    # -- values of former steps ----------------------------------------------------------------------------------------------

    def index(self, step: int) -> int:
        """Number of the period."""
        return step // self.period if self.period else 0

    def _former(self, step: int, kept: Mapping[str, float]) -> list[tuple[Pair, float]]:
        if not self.reuse or kept.get("period") != self.index(step):
            return []
        count = int(kept["points"])
        return [((kept[f"{i}/u1"], kept[f"{i}/u2"]), kept[f"{i}/f"]) for i in range(count)]

    def _remember(self, step: int, known: Sequence[tuple[Pair, float]], s: Pair, lr: float) -> dict[str, float]:
        """The values with their points seen from where the weights go now."""
        sign = lr if self.ascends else -lr
        found = {"period": float(self.index(step)), "points": float(min(len(known), REMEMBERED))}
        for i, ((a, b), value) in enumerate(known[:REMEMBERED]):
            found |= {f"{i}/u1": a - sign * s[0], f"{i}/u2": b - sign * s[1], f"{i}/f": value}
        return found

    @property
    def evaluations(self) -> float:
        each = 5.0 if self.curvature else 2.0
        if not self.reuse:
            return 1.0 + each * self.planes
        return 3.0 + 3.0 / self.period if self.period else 3.0

    def describe(self) -> str:
        how = "Newton steps" if self.curvature else "steps"
        return f"{how} in {self.planes} random planes, eps {self.eps:g}" + (", values reused" if self.reuse else "")


class PlaneOptimizer(ForwardOptimizer):
    """A `ForwardOptimizer` whose probe is told by which coefficients its drawn directions become orthonormal."""

    _orthonormal: tuple[Any, Rows] | None = None

    def _ask(self, leaves: list[Moved], closure: Any, losses: list[float]) -> Estimate | None:
        assert isinstance(self.probe, Planes)
        count = 2 * self.probe.planes
        keys = tuple(_held(leaf, 0).key for leaf in leaves)
        if self._orthonormal is None or self._orthonormal[0] != keys:
            self._orthonormal = keys, orthonormal(gram(leaves, count))
        self.probe = replace(self.probe, basis=self._orthonormal[1])
        return super()._ask(leaves, closure, losses)


def _held(leaf: Moved, member: int) -> Draw:
    law = leaf.directed.law
    return law.meant(leaf.draw(member)) if isinstance(law, Held) else leaf.draw(member)


def gram(leaves: Sequence[Moved], count: int) -> Tensor:
    """Inner products of the directions over all leaves, [count, count] float64; the order of leaves does not matter."""
    found = []
    for leaf in leaves:
        weight, law, numel = leaf.parameter.detach(), leaf.directed.law, leaf.draw(0).leaf.numel
        own = torch.zeros(count, count, dtype=torch.float64)
        size = numel if not law.partial else max(1, (1 << 15) // count)
        for start, stop in spans(numel, size):
            z = torch.stack([law.draw(leaf.draw(i), leaf.state, weight, start, stop) for i in range(count)]).double()
            for i in range(count):  # not a matrix product, whose sums may depend on where its memory lies
                own[i, i:] += (z[i] * z[i:]).sum(1).cpu()
        found.append((own + own.triu(1).T).flatten().tolist())
    return torch.tensor([math.fsum(entry) for entry in zip(*found, strict=True)], dtype=torch.float64).view(
        count, count
    )


def orthonormal(products: Tensor) -> Rows:
    """Rows of coefficients that make directions with these inner products orthonormal, each from those before it.

    Raises:
        InputError: the directions do not span as many dimensions as there are.
    """
    given, rows = products.tolist(), list[list[float]]()
    lower: list[list[float]] = []  # of Cholesky's decomposition; rows are those of its inverse
    for i, line in enumerate(given):
        own: list[float] = []
        for j in range(i):
            own.append((line[j] - math.fsum(a * b for a, b in zip(own, lower[j], strict=False))) / lower[j][j])
        square = line[i] - math.fsum(x * x for x in own)
        if not square > 1e-12 * line[i]:
            raise InputError(
                f"planes: {len(given)} directions do not span as many dimensions of the trained weights; use fewer planes"
            )
        lower.append([*own, math.sqrt(square)])
        inverse = [-math.fsum(own[k] * rows[k][j] for k in range(j, i)) / lower[i][i] for j in range(i)]
        rows.append([*inverse, 1.0 / lower[i][i], *[0.0] * (len(given) - i - 1)])
    return tuple(tuple(row) for row in rows)
