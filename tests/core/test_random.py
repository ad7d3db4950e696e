"""Counter-based randomness: distribution, independence of keys, and that neither pieces nor chunks nor global state matter."""

import math

import pytest
import torch

from tare.core import random
from tare.kernels import rounding

N = 1 << 18


def test_bits_are_uniform() -> None:
    """Chi-square of the low and of the high byte over 256 cells: within 5 sigma of its mean 255."""
    word = random.bits(random.make_key(1, "w"), 0, N)
    assert word.min() >= 0
    assert word.max() < 1 << 32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((word >> shift) & 255, minlength=256).double()
        chi = ((counts - N / 256).square() / (N / 256)).sum().item()
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255), f"byte {shift // 8}: {chi}"


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1, random.make_key(0, "layer.weight", 3)])
def test_normal_moments_and_tails(key: int) -> None:
    """Mean, variance, skew, kurtosis within 5 standard errors; one and three sigma quantiles too."""
    x = random.normal(key, (N,)).double()
    for power, exact, spread in (
        (1, 0.0, 1.0),
        (2, 1.0, math.sqrt(2)),
        (3, 0.0, math.sqrt(15)),
        (4, 3.0, math.sqrt(96)),
    ):
        assert abs((x**power).mean().item() - exact) < 5 * spread / math.sqrt(N), f"moment {power}"
    for edge in (0.5, 1.0, 2.0, 3.0):
        p = math.erfc(edge / math.sqrt(2))
        found = (x.abs() > edge).double().mean().item()
        assert abs(found - p) < 5 * math.sqrt(p / N) + 0.02 * p, f"beyond {edge}: {found} against {p}"


def test_neighbours_are_uncorrelated() -> None:
    """Of one stream at small lags, and of the streams of neighbouring keys, names and numbers."""
    x = random.normal(random.make_key(0, "w", 1), (N,)).double()
    others = {
        f"lag {lag}": x.roll(lag) for lag in (1, 2, 3, 64, 256, 1024)
    } | {
        "next number": random.normal(random.make_key(0, "w", 2), (N,)).double(),
        "next seed": random.normal(random.make_key(1, "w", 1), (N,)).double(),
        "other name": random.normal(random.make_key(0, "v", 1), (N,)).double(),
        "key + 1": random.normal(random.make_key(0, "w", 1) ^ 1, (N,)).double(),
    }  # fmt: skip
    for what, y in others.items():
        assert abs((x * y).mean().item()) < 5 / math.sqrt(N), what


def test_keys_are_no_shifts_of_each_other() -> None:
    """Among many keys no window of one stream appears in another: 200 keys x 512 words, all different but by chance."""
    words = torch.cat([random.bits(random.make_key(0, "w", k), 0, 512) for k in range(200)])
    distinct = len(set(words.tolist()))
    expected = words.numel() ** 2 / 2 / 2**32  # birthday
    assert words.numel() - distinct <= 5 + 5 * expected


def test_pieces_equal_the_whole() -> None:
    key = random.make_key(3, "x")
    whole = random.bits(key, 0, 1000)
    parts = torch.cat([random.bits(key, start, 137 if start < 959 else 41) for start in range(0, 1000, 137)])
    assert torch.equal(parts[:1000], whole)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    key = random.make_key(3, "x")
    wanted = random.normal(key, (50, 41))
    monkeypatch.setattr(random, "_CHUNK", 64)
    assert torch.equal(random.normal(key, (50, 41)), wanted)
    assert torch.equal(random.normal(key, (2050,)), wanted.view(-1))


def test_scale_and_shape() -> None:
    assert torch.allclose(random.normal(5, (40, 3), scale=0.5), 0.5 * random.normal(5, (40, 3)))
    assert random.normal(5, ()).shape == ()
    assert random.normal(5, (0, 3)).shape == (0, 3)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    a, before = random.normal(5, (100,)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(random.normal(5, (100,)), a)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_depend_on_every_part() -> None:
    keys = {random.make_key(s, n, k) for s in (0, 1, 10) for n in ("", "a", "a0", "0") for k in (0, 1, 10)}
    assert len(keys) == 3 * 4 * 3
    assert all(0 <= key < 1 << 64 for key in keys)


@pytest.mark.parametrize("value", [1.0 + 0.3 / 128, -3.3e-5, 0.1, 255.7])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    """The mean of many roundings is the value: within 5 standard errors of a two-point distribution; nearest is not."""
    x = torch.full((N,), value)
    out = torch.zeros(N, dtype=torch.bfloat16)
    rounding.round_stochastic_(out, x, random.make_key(0, "r"), 0)
    low, high = out.double().min().item(), out.double().max().item()
    exact = x[0].double().item()
    assert low <= exact <= high
    assert len(set(out.tolist())) == 2
    spread = (high - low) / 2
    assert abs(out.double().mean().item() - exact) < 5 * spread / math.sqrt(N)


def test_stochastic_rounding_of_what_needs_none() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan])
    out = torch.zeros(7, dtype=torch.bfloat16)
    rounding.round_stochastic_(out, x, 7, 0)
    assert torch.equal(out[:6].float(), x[:6])
    assert out[6].isnan()
