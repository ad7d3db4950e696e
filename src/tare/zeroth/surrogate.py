"""Surrogates: the gradient of a Gaussian process through what was queried, and random features that carry it in a few numbers.

Everything is fp64 on the CPU: a query is a point of d numbers, d at most about a thousand (FZooS, arXiv 2308.04077).
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.random import bits, make_key, normal

KERNELS = ("matern-5/2", "rbf")


@dataclass(frozen=True)
class Kernel:
    """k(x, x') of unit variance, by the distance over `lengthscale`.

    `matern-5/2`: (1 + s + s^2 / 3) exp(-s), s = sqrt(5) r / l. `rbf`: exp(-r^2 / (2 l^2)).
    """

    kind: Literal["matern-5/2", "rbf"] = "matern-5/2"
    lengthscale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kernel", self.kind, KERNELS)
        check_number("lengthscale", self.lengthscale, 0.0)

    def value(self, r: Tensor) -> Tensor:
        return _value(self.kind, r, self.lengthscale)

    def pull(self, r: Tensor) -> Tensor:
        """w(r) in dk/dx = -w (x - x')."""
        if self.kind == "rbf":
            return self.value(r) / self.lengthscale**2
        s = r * (math.sqrt(5.0) / self.lengthscale)
        return (1.0 + s) * torch.exp(-s) * (5.0 / (3.0 * self.lengthscale**2))

    @property
    def prior(self) -> float:
        """Variance of one partial derivative where nothing is known."""
        return (1.0 if self.kind == "rbf" else 5.0 / 3.0) / self.lengthscale**2


def _value(kind: str, r: Tensor, lengthscale: float | Tensor) -> Tensor:
    s = r / lengthscale
    if kind == "rbf":
        return torch.exp(-0.5 * s.square())
    s = s * math.sqrt(5.0)
    return (1.0 + s + s.square() / 3.0) * torch.exp(-s)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """[len(a), len(b)], from differences: nothing is lost where points are close."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(x: Tensor, places: Tensor, most: int) -> Tensor:
    """Numbers of the `most` places nearest to x, the nearest first."""
    return torch.argsort(distances(x[None], places)[0], stable=True)[:most]


def scaled(values: Tensor) -> tuple[Tensor, float]:
    """Values from 0 to 1, and what a unit of them is; 0 where all are equal."""
    low, high = values.min(), values.max()
    spread = float(high - low)
    return (values - low) / spread if spread else torch.zeros_like(values), spread


class Posterior:
    """A Gaussian process of mean 0 through values that are scaled to [0, 1].

    Args:
        places: [q, d]. values: [q]. noise: on the diagonal of K.
    """

    def __init__(self, kernel: Kernel, places: Tensor, values: Tensor, noise: float = 1e-6):
        y, self.spread = scaled(values)
        self.kernel, self.places = kernel, places
        k = kernel.value(distances(places, places))
        k.diagonal().add_(noise)
        self._root = torch.linalg.cholesky(k)
        self.alpha = torch.cholesky_solve(y[:, None], self._root)[:, 0]

    def gradient(self, x: Tensor) -> Tensor:
        """Of the posterior mean at x [d], in units of the values."""
        way = x - self.places  # [q, d]
        weight = self.kernel.pull(torch.linalg.vector_norm(way, dim=1)) * self.alpha
        return (weight @ way) * -self.spread

    def uncertainty(self, xs: Tensor) -> Tensor:
        """Variance of the gradient at each of [n, d], summed over coordinates; of the scaled values."""
        inverse = torch.cholesky_inverse(self._root)
        middle = self.places.mean(0)
        a, c = self.places - middle, xs - middle
        w = self.kernel.pull(distances(xs, self.places))  # [n, q]
        p = c @ a.T
        through = w @ inverse
        known = c.square().sum(1) * (through * w).sum(1) - 2.0 * (through * (w * p)).sum(1)
        known = known + ((w @ (inverse * (a @ a.T))) * w).sum(1)
        return self.kernel.prior * xs.shape[1] - known


def best_lengthscale(kind: str, places: Tensor, values: Tensor, noise: float = 1e-6) -> float:
    """The length-scale of the greatest marginal likelihood, from a tenth to a thousand times the median distance.

    Twenty-four are tried, and then between the neighbours of the best one (to 1 %). 1 where all places or all values are one.
    """
    r = distances(places, places)
    apart = r[r > 0]
    y, spread = scaled(values)
    if not len(apart) or not spread:
        return 1.0
    median = float(apart.median())
    low, high = math.log(0.1 * median), math.log(1000.0 * median)
    for count in (24, 9, 9):
        tried = torch.linspace(low, high, count, dtype=torch.float64)
        at = int(_likelihood(kind, r, y, tried.exp(), noise).argmax())
        low, high = float(tried[max(at - 1, 0)]), float(tried[min(at + 1, count - 1)])
    return math.exp(float(tried[at]))


def _likelihood(kind: str, r: Tensor, y: Tensor, lengthscales: Tensor, noise: float) -> Tensor:
    """Log marginal likelihood for each length-scale, up to a constant."""
    k = _value(kind, r, lengthscales[:, None, None])
    k.diagonal(dim1=1, dim2=2).add_(noise)
    root, failed = torch.linalg.cholesky_ex(k)
    half = torch.linalg.solve_triangular(root, y[None, :, None].expand(len(root), -1, 1), upper=False)
    found = -0.5 * half.square().sum((1, 2)) - root.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.where(failed == 0, found, torch.full_like(found, -math.inf)).nan_to_num(nan=-math.inf)


# -- random features ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """phi(x) = sqrt(2 / M) cos(x W + b): phi(x) . phi(x') is near the RBF kernel, by about M^(-1/2) (Rahimi & Recht 2007).

    w: [d, M]. b: [M].
    """

    w: Tensor
    b: Tensor

    def __call__(self, xs: Tensor) -> Tensor:
        """[n, d] -> [n, M]."""
        return math.sqrt(2.0 / len(self.b)) * torch.cos(xs @ self.w + self.b)

    def fit(self, places: Tensor, values: Tensor, ridge: float = 1e-6) -> Tensor:
        """nu [M]: phi . nu goes through the values, up to a constant; in their units."""
        y, spread = scaled(values)
        phi = self(places)
        if phi.shape[1] >= phi.shape[0]:
            k = phi @ phi.T
            k.diagonal().add_(ridge)
            return phi.T @ torch.cholesky_solve(y[:, None], torch.linalg.cholesky(k))[:, 0] * spread
        k = phi.T @ phi
        k.diagonal().add_(ridge)
        return torch.cholesky_solve((phi.T @ y)[:, None], torch.linalg.cholesky(k))[:, 0] * spread

    def gradient(self, x: Tensor, nu: Tensor) -> Tensor:
        """Of phi(x) . nu."""
        return self.w @ (-torch.sin(x @ self.w + self.b) * nu) * math.sqrt(2.0 / len(self.b))


@functools.lru_cache(maxsize=2)
def features(seed: int, d: int, components: int, lengthscale: float) -> Features:
    """Those of a seed: every client draws the same, and none are sent."""
    w = normal(make_key(seed, "features", 0), (d, components)).double() / lengthscale
    b = bits(make_key(seed, "features", 1), 0, components).double() * (2.0 * math.pi / 2.0**32)
    return Features(w, b)


def around(x: Tensor, radius: float, count: int, key: int) -> Tensor:
    """`count` points uniform in the cube x +- radius, [count, d]."""
    u = bits(key, 0, count * len(x)).double() * 2.0**-31 - 1.0
    return x + radius * u.view(count, -1)
