"""Weights in 24 bits: the codec over all bit patterns, and writes that follow it exactly."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.kernels import native16, split24

PATTERNS = st.integers(0, 2**32 - 1)
LARGEST = 3.3895313892515355e38  # the largest bf16
STEP = 2.0**-16  # half a unit of a significand of 16 bits


def number(pattern: int) -> float:
    return struct.unpack("<f", struct.pack("<I", pattern))[0]


def as_float(patterns: list[int]) -> torch.Tensor:
    return torch.tensor([p - (1 << 32) if p >> 31 else p for p in patterns], dtype=torch.int32).view(torch.float32)


def reference(x: float) -> float:
    """The nearest number with 24 bits of pattern, ties to even; in Python integers."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    whole, rest = divmod(bits, 256)
    whole += rest > 128 or (rest == 128 and whole % 2 == 1)
    return number(whole * 256)


@settings(max_examples=300, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=40))
def test_a_number_is_kept_in_24_bits_and_the_bf16_is_the_nearest(patterns):
    x = as_float(patterns)
    high, low = split24.split(x)
    back = split24.join(high, low)
    for i, pattern in enumerate(patterns):
        exact = number(pattern)
        if math.isnan(exact):
            assert back[i].isnan()
            assert high[i].isnan()
            continue
        kept = reference(exact)
        assert math.copysign(1, float(back[i])) == math.copysign(1, exact)
        if abs(kept) > LARGEST * (1 + 2.0**-9):
            assert float(high[i]) == math.copysign(math.inf, exact)
            assert low[i] == 0
            continue
        if math.isinf(float(high[i])):  # the half step above the largest bf16
            assert abs(kept) > LARGEST
            continue
        assert float(back[i]) == kept
        if abs(exact) > 1e-37:
            assert abs(kept - exact) <= STEP * abs(exact)
        # the nearest bf16: no neighbour is nearer
        gap = abs(float(high[i]) - kept)
        bits = int(high.view(torch.int16)[i]) & 0xFFFF
        for other in (bits - 1, bits + 1):
            if (other ^ bits) >> 15 == 0:
                assert gap <= abs(number((other & 0xFFFF) << 16) - kept) or math.isnan(number((other & 0xFFFF) << 16))


@settings(max_examples=100, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=40))
def test_splitting_what_was_joined_changes_nothing(patterns):
    high, low = split24.split(as_float(patterns))
    again = split24.split(split24.join(high, low))
    assert torch.equal(again[0].view(torch.int16), high.view(torch.int16))
    assert torch.equal(again[1], low)


def test_noise_makes_the_mean_exact():
    """All 256 noises once each: of a number 77 parts of 256 above a kept one, 77 go up."""
    x = as_float([0x3F801100 + 77]).repeat(256)
    high, low = split24.split(x, torch.arange(256, dtype=torch.int32))
    joined = split24.join(high, low)
    assert int((joined > x).sum()) == 77
    assert abs(float(joined.double().mean()) - float(x[0].double())) < 1e-15


def test_any_pair_of_parts_is_a_number_beside_the_bf16():
    """A bf16 changed from outside meets a correction that was another's: nothing but a small shift comes of it."""
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for value in (-128, -1, 0, 1, 127):
        joined = split24.join(high, torch.full(high.shape, value, dtype=torch.int8))
        assert torch.equal(joined.isnan(), high.isnan())
        assert torch.equal(joined.isinf(), high.isinf())
        assert torch.equal(joined.signbit(), high.signbit())
        finite = high.isfinite() & (high.abs() < LARGEST)
        up = torch.nextafter(high.abs(), torch.tensor(math.inf, dtype=torch.bfloat16)).float() - high.abs().float()
        assert bool(((joined - high.float()).abs() <= up / 2)[finite].all())


@pytest.mark.parametrize("key", [None, 11])
@pytest.mark.parametrize("n", [1, 7, 16, 1003, 300_001])
def test_the_native_write_is_the_twin(n, key, compiler):
    g = torch.Generator().manual_seed(n)
    ours = torch.randn(n, generator=g).bfloat16()
    low = torch.randint(-128, 128, (n,), generator=g, dtype=torch.int32).to(torch.int8)
    update = torch.randn(n, generator=g)
    theirs, rest = ours.clone(), low.clone()
    assert native16.write_split_(ours, low, update, decay=0.99, alpha=1e-3, key=key, start=5)
    split24.write_split_(theirs, rest, update, decay=0.99, alpha=1e-3, key=key, start=5)
    assert torch.equal(ours, theirs)
    assert torch.equal(low, rest)


def test_a_strided_weight_is_written_in_place():
    plain = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    strided = plain.t().contiguous().t()
    low, other = (torch.zeros(6, 5, dtype=torch.int8) for _ in range(2))
    update = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    split24.write_split_(plain, low, update, decay=0.9, alpha=0.1)
    split24.write_split_(strided, other, update, decay=0.9, alpha=0.1)
    assert torch.equal(strided, plain)
    assert torch.equal(other, low)


def test_wrong_tensors_are_refused():
    w, low, u = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int8), torch.zeros(4)
    with pytest.raises(ValueError, match="bfloat16"):
        split24.write_split_(w.float(), low, u, decay=1.0, alpha=1.0)
    with pytest.raises(ValueError, match="sizes"):
        split24.write_split_(w, low[:3], u, decay=1.0, alpha=1.0)
    assert not native16.write_split_(w.float(), low, u, decay=1.0, alpha=1.0)
    assert not native16.write_split_(w[::2], low[:2], u[:2], decay=1.0, alpha=1.0)
