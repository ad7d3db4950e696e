"""Whether directions are random: distribution, independence within a leaf, and of leaves, steps, members and seeds.

All seeds are fixed, so nothing here is flaky: a bound says what a true generator exceeds with the probability given, counted over all
numbers that the test looks at.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tare.core.leaf import Leaf
from tare.core.state import State
from tare.kernels import directions
from tare.zeroth.directions import Draw, Gaussian, Law, Rademacher
from tare.zeroth.drawn import write_sum

N = 1 << 22
LAWS = ("gaussian", "signs")


@pytest.fixture(scope="module")
def normals() -> Tensor:
    return sample("gaussian", 2024, N)


def sample(law: directions.Law, key: int, count: int, start: int = 0) -> Tensor:
    """Elements of one direction, in fp64."""
    z = torch.empty(count)
    write_sum(z, [key], [1.0], law=law, decay=0.0, start=start)
    return z.double()


def direction(law: Law, name: str = "w", seed: int = 0, step: int = 0, member: int = 0, n: int = 1 << 14) -> Tensor:
    leaf = Leaf(name, (n,), torch.float32, "linear")
    draw = Draw(leaf, name, seed, step, member)
    return law.draw(draw, State({}, {}), torch.empty(n)).double()


def above_diagonal(x: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*x.shape, 1)
    return x[rows, columns]


def test_moments_are_those_of_the_normal_law(normals):
    """Standard deviations of the sample moments of N(0, 1): sqrt(m_2k - m_k^2) over sqrt(N). Bound: 4 of them (p 3e-4 for all six)."""
    moments = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0}
    twice = {1: 1.0, 2: 3.0, 3: 15.0, 4: 105.0, 5: 945.0, 6: 10395.0}
    for k, want in moments.items():
        sigma = math.sqrt((twice[k] - want**2) / N)
        assert abs(float(normals.pow(k).mean()) - want) < 4 * sigma, k


def test_the_distribution_function_is_the_normal_one(normals):
    """Kolmogorov-Smirnov: sqrt(N) D exceeds 1.95 with probability 1e-3. The polynomials' 1e-6 would show from 1e11 numbers on."""
    ordered = normals.sort().values
    expected = torch.special.ndtr(ordered)
    at = torch.arange(1, N + 1, dtype=torch.float64) / N
    d = max(float((at - expected).max()), float((expected - at + 1.0 / N).max()))
    assert math.sqrt(N) * d < 1.95


def test_cosines_and_sines_are_alike(normals):
    """Every place in a group is standard normal by itself: chi-squared over 16 cells of equal probability."""
    groups = normals.view(-1, 32)
    edges = torch.special.ndtri(torch.arange(1, 16, dtype=torch.float64) / 16)
    worst = 0.0
    for place in range(32):
        counts = torch.bucketize(groups[:, place].contiguous(), edges).bincount(minlength=16).double()
        expected = groups.shape[0] / 16
        chi = float(((counts - expected) ** 2 / expected).sum())
        worst = max(worst, (chi - 15) / math.sqrt(30))
    assert worst < 5  # chi-squared of 15 degrees beyond 42: 2e-4, of 32 places 7e-3


def test_tails_have_their_share():
    """Numbers beyond 4, 4.5 and 5 among 2^25: binomial counts within 4 standard deviations; none beyond the end of the support."""
    beyond = dict.fromkeys((4.0, 4.5, 5.0), 0)
    largest = 0.0
    for block in range(8):
        z = sample("gaussian", 77, N, start=block * N).abs()
        largest = max(largest, float(z.max()))
        for limit in beyond:
            beyond[limit] += int((z > limit).sum())
    for limit, count in beyond.items():
        expected = 8 * N * math.erfc(limit / math.sqrt(2))
        assert abs(count - expected) < 4 * math.sqrt(expected), (limit, count, expected)
    assert largest < 6.56


@pytest.mark.parametrize("law", LAWS)
def test_neighbours_are_independent(law):
    """Correlations at lags 1 to 70 and powers of two, of the numbers, of their squares and of their signs, each N(0, 1) times 1/sqrt(N).

    Bound 4.5 on 3 x 84 of them: p 2e-3. Lag 16 is that of cosine and sine of one radius.
    """
    z = sample(law, 99, 1 << 20)
    kinds = [z, z.sign()] if law == "signs" else [z, z.square() - 1.0, z.sign()]
    for x in kinds:
        x = x / x.std()
        for lag in [*range(1, 71), *(1 << k for k in range(7, 20))]:
            r = float((x[:-lag] * x[lag:]).mean()) * math.sqrt(x.numel() - lag)
            assert abs(r) < 4.5, lag


@pytest.mark.parametrize("law", [Gaussian(), Rademacher()])
def test_leaves_steps_members_and_seeds_are_independent(law):
    """256 directions that differ in one of the four by one: all 32,640 cosines N(0, 1/n).

    Their largest exceeds 5.5 sigma with probability 1.2e-3, and their mean square has a standard deviation of sqrt(2 / 32640): 4.5 of it.
    Squares likewise for normals: equal radii would show there.
    """
    n = 1 << 14
    made = [direction(law, f"layers.{k}.weight", n=n) for k in range(64)]
    made += [direction(law, seed=k, n=n) for k in range(64)]
    made += [direction(law, step=k, n=n) for k in range(1, 65)]
    made += [direction(law, member=k, n=n) for k in range(1, 65)]
    z = torch.stack(made)
    for x in [z] if isinstance(law, Rademacher) else [z, (z.square() - 1.0) / math.sqrt(2.0)]:
        cosines = above_diagonal(x @ x.T / math.sqrt(n))
        assert float(cosines.abs().max()) < 5.5
        assert abs(float(cosines.square().mean()) - 1.0) < 4.5 * math.sqrt(2.0 / cosines.numel())


@pytest.mark.parametrize("law", LAWS)
def test_counters_that_overlap_give_unrelated_numbers(law):
    """Of 30,000 keys some pairs count from nearly the same number. A generator of one word and no second key gives those shifted copies.

    Compared where both have the same counts: correlations of 2^15 numbers beyond 5 sigma have probability 6e-7 each.
    """
    per = 16 if law == "gaussian" else 1  # counts of a group
    starts = sorted((directions.words(key)[0], key) for key in range(30_000))
    pairs = [(b[0] - a[0], a[1], b[1]) for a, b in itertools.pairwise(starts) if b[0] - a[0] < 100 * per]
    aligned = [(gap // per, first, second) for gap, first, second in pairs if gap % per == 0]
    assert len(aligned) > 5
    n = 1 << 15
    for groups, first, second in aligned[:20]:
        x, y = sample(law, first, n, start=32 * groups), sample(law, second, n)
        assert abs(float((x * y).mean())) * math.sqrt(n) < 5
        assert abs(float((x.abs() * y).mean())) * math.sqrt(n) < 5
        if law == "gaussian":
            assert abs(float(((x.square() - 1) * (y.square() - 1)).mean())) / 2 * math.sqrt(n) < 5


def test_segments_of_a_huge_leaf_are_unrelated():
    """Elements 2^32 apart, and a leaf's first segment against all shifts of the second within 64."""
    n = 1 << 16
    x = sample("gaussian", 5, n + 64)
    y = sample("gaussian", 5, n, start=1 << 32)
    for shift in range(64):
        assert abs(float((x[shift : shift + n] * y).mean())) * math.sqrt(n) < 4.5


def test_adjacent_seeds_draw_other_numbers_and_not_the_same_in_another_order():
    """Hashing `key xor index` would give two small seeds the same set of numbers."""
    sets = [set(direction(Gaussian(), seed=seed).tolist()) for seed in range(8)]
    # 2^14 of some 2^25 values each: 8 common ones are expected; 60 has a probability below 1e-12
    assert max(len(a & b) for a, b in itertools.combinations(sets, 2)) < 60


def test_signs_are_balanced_at_every_place():
    """Means of the 32 bits of a word, and of the exclusive or of any two: N(0, 1 / words); 528 of them within 4.5 (p 4e-3)."""
    z = sample("signs", 3, 1 << 21).view(-1, 32)
    means = torch.cat([z.mean(0), above_diagonal(z.T @ z / z.shape[0])])
    assert float(means.abs().max()) * math.sqrt(z.shape[0]) < 4.5


def test_a_random_walk_of_block_sums_has_the_variance_of_a_sum():
    """Sums over blocks of 2^12 elements: a chi-squared of their number of blocks, within 4 sigma."""
    sums = sample("gaussian", 12, N).view(-1, 1 << 12).sum(1) / 64.0
    assert abs(float(sums.square().mean()) - 1.0) < 4 * math.sqrt(2.0 / sums.numel())


def test_projections_of_a_leaf_are_normal():
    """Kolmogorov-Smirnov of 4,096 estimates z . g for one fixed g, over steps: their law is exactly N(0, ||g||^2)."""
    g = torch.linspace(-1.0, 2.0, 500, dtype=torch.float64)
    values = torch.stack([direction(Gaussian(), step=t, n=500) @ g for t in range(4096)]) / g.norm()
    at = torch.arange(1, 4097, dtype=torch.float64) / 4096
    expected = torch.special.ndtr(values.sort().values)
    assert 64 * float((at - expected).abs().max()) < 1.95
