"""The block-wise 4-bit codec: its maps, exactness, bounds, special numbers, tails; and the native kernels against their twins."""

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tare.kernels import fourbit, native, native_fourbit, nibbles, plain

few = settings(max_examples=30, deadline=None, derandomize=True)
SIGNS = pytest.mark.parametrize("signed", [True, False])
SEEDS = st.integers(0, 2**31)
SIZES = st.sampled_from([1, 2, 31, 32, 33, 127, 128, 129, 255, 1001])
FP32, BF16 = torch.float32, torch.bfloat16


def numbers(seed: int, n: int, signed: bool, decades: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))
    return x if signed else x.square()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


# -- the maps


def test_signed_map_is_the_dynamic_one_with_three_decades():
    # midpoints of 1, 2 and 4 equal cells of [0.1, 1], times 0.01, 0.1 and 1
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    wanted = [-x for x in reversed(positive)] + [0.0, *positive, 1.0]
    assert torch.allclose(fourbit.dynamic_map(True).double(), torch.tensor(wanted, dtype=torch.float64), atol=5e-8)


def test_unsigned_map_is_linear_without_a_zero():
    assert fourbit.dynamic_map(False).tolist() == [k / 16 for k in range(1, 17)]


@SIGNS
def test_codes_are_the_nearest_values_at_every_threshold_and_its_neighbours(signed, reference):
    values = fourbit.dynamic_map(signed)
    fixed = torch.tensor([*fourbit.map_thresholds(signed), *fourbit.map_values(signed)])
    up, down = torch.full_like(fixed, torch.inf), torch.full_like(fixed, -torch.inf)
    y = torch.cat([fixed, fixed.nextafter(up), fixed.nextafter(down), numbers(1, 5000, signed)]).clamp(-1, 1)
    # blocks of two with a 1 in each keep the scale at 1, so that y reaches the look-up unchanged
    packed, absmax = fourbit.encode(torch.stack([y, torch.ones_like(y)], dim=1), signed, block=2)
    assert bool((absmax == 1).all())
    assert torch.equal((packed & 15).long(), reference.nearest_by_midpoints(y, values))
    assert torch.equal((packed & 15).long(), reference.nearest_by_distance(y, values))


@SIGNS
def test_no_key_covers_two_thresholds(signed):
    bits = torch.tensor(fourbit.map_thresholds(signed)).view(torch.int32) >> 16
    assert bits.unique().numel() == 15


# -- the codec


@SIGNS
@few
@given(seed=SEEDS, n=SIZES, block=st.sampled_from([2, 6, 64, 128]))
def test_codes_are_those_of_the_slow_twin(signed, reference, seed, n, block):
    x = numbers(seed, n, signed)
    packed, absmax = fourbit.encode(x, signed, block)
    want, scales = reference.encode(x, fourbit.dynamic_map(signed), block)
    assert nibbles.unpack(packed, n, block).tolist() == want
    assert absmax.tolist() == scales


@SIGNS
@few
@given(seed=SEEDS, scale=st.floats(1e-30, 1e30), n=st.integers(1, 700))
def test_round_trip_stays_within_half_a_local_cell(signed, seed, scale, n):
    x = numbers(seed, n, signed) * scale
    packed, absmax = fourbit.encode(x, signed)
    peak = absmax.repeat_interleave(128)[:n].double()
    y = x.double() / peak
    error = (x - fourbit.decode(packed, absmax, n, signed)).abs().double() / peak
    values = fourbit.dynamic_map(signed).double()
    # both maps stop half a cell above the lower end of their range
    edges = torch.cat([values[:1] * 2 - values[1:2] if signed else torch.zeros(1, dtype=torch.float64), values])
    above = torch.bucketize(y, edges).clamp(1, 16)
    half = (edges[above] - edges[above - 1]) / (2 if signed else 1)  # from 0 to a sixteenth the whole cell
    assert bool((error <= half + 4e-7).all())


@few
@given(seed=SEEDS, n=st.integers(2, 700), zeros=st.integers(1, 9))
def test_a_second_moment_never_comes_back_as_zero_beside_a_larger_one(seed, n, zeros):
    v = numbers(seed, n, False, decades=12.0)
    v[::zeros] = 0.0
    v[n // 2] = 1.0
    packed, absmax = fourbit.encode(v, False)
    back = fourbit.decode(packed, absmax, n, False)
    peak = absmax.repeat_interleave(128)[:n]
    assert bool((back >= peak / 16).all())
    assert bool((back[peak > 0] > 0).all())


@SIGNS
@few
@given(seed=SEEDS, scale=st.floats(1e-28, 1e38))
def test_every_code_survives_decode_and_encode(signed, seed, scale):
    codes = torch.randint(0, 16, (128,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    codes[seed % 128] = 15  # the largest magnitude is the value 1, hence the scale the same again
    packed, absmax = nibbles.pack(codes, 128), torch.tensor([scale], dtype=torch.float32)
    again, peak = fourbit.encode(fourbit.decode(packed, absmax, 128, signed), signed)
    assert torch.equal(again, packed)
    assert torch.equal(peak, absmax)


@SIGNS
def test_chunks_and_slices_do_not_change_anything(signed, monkeypatch):
    n = 5001
    x = numbers(3, n, signed)
    packed, absmax = fourbit.encode(x, signed)
    y = fourbit.decode(packed, absmax, n, signed)
    monkeypatch.setattr(fourbit, "chunk_elements", lambda device: 512)
    for found, want in zip(fourbit.encode(x, signed), (packed, absmax), strict=True):
        assert torch.equal(found, want)
    assert torch.equal(fourbit.decode(packed, absmax, n, signed), y)
    cut = 20 * 128
    for rows, count in ((slice(0, cut), cut), (slice(cut, n), n - cut)):
        half, of = slice(rows.start // 2, -(-rows.stop // 2)), slice(rows.start // 128, -(-rows.stop // 128))
        assert torch.equal(fourbit.decode(packed[half], absmax[of], count, signed), y[rows])


@SIGNS
def test_zero_and_subnormal_blocks_decode_to_exact_zeros(signed):
    x = numbers(5, 384, signed)
    x[128:256] = 0
    x[256:] = 1e-40
    packed, absmax = fourbit.encode(x, signed)
    assert absmax[1:].tolist() == [0.0, 0.0]
    assert bool((packed[64:] == fourbit.zero_byte(signed)).all())
    assert bool((fourbit.decode(packed, absmax, 384, signed)[128:] == 0).all())


@SIGNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_number_marks_its_block_and_no_other(signed, bad):
    x = numbers(6, 384, signed)
    clean, _ = fourbit.encode(x, signed)
    x[200] = bad
    packed, absmax = fourbit.encode(x, signed)
    y = fourbit.decode(packed, absmax, 384, signed)
    assert same(absmax[1], torch.tensor(abs(bad)))
    assert not bool(y[128:256].isfinite().any())
    assert bool(y[:128].isfinite().all())
    assert torch.equal(packed[128:], clean[128:])


def test_shapes_layouts_dtypes_and_what_is_refused():
    x = numbers(4, 24 * 40, True).view(24, 40)
    assert torch.equal(fourbit.encode(x.t(), True)[0], fourbit.encode(x.t().contiguous(), True)[0])
    assert torch.equal(fourbit.encode(x.double(), True)[0], fourbit.encode(x, True)[0])
    assert torch.equal(fourbit.encode(x.bfloat16(), True)[0], fourbit.encode(x.bfloat16().float(), True)[0])
    assert fourbit.decode(*fourbit.encode(torch.empty(0), True), 0, True).shape == (0,)
    with pytest.raises(ValueError, match="even"):
        fourbit.encode(x, True, block=33)
    with pytest.raises(ValueError, match="need 480 bytes"):
        fourbit.encode_into(x, torch.empty(960, dtype=torch.uint8), torch.empty(8), True)


@SIGNS
def test_fake_tensors_pass_without_being_read(signed):
    fourbit._cache.clear()
    with FakeTensorMode():
        packed, absmax = fourbit.encode(torch.empty(1001), signed)
        assert fourbit.decode(packed, absmax, 1001, signed).shape == (1001,)
    assert packed.shape == (501,)
    assert not fourbit._cache  # no fake table may be kept
    assert fourbit.encode(torch.ones(3, device="meta"), signed)[0].is_meta


# -- the native kernels


@pytest.fixture(scope="module")
def kernels(compiler):
    """Native kernels must work wherever there is a compiler: only its absence skips."""
    if os.environ.get("TARE_NATIVE") == "0":
        pytest.skip("TARE_NATIVE=0")
    assert native.available(), native.reason()


def moments(n: int, *signs: bool, block: int = 128) -> list[torch.Tensor]:
    return [x for signed in signs for x in fourbit.encode(torch.zeros(n), signed, block)]


@few
@given(
    seed=SEEDS, n=SIZES, scale=st.sampled_from([1e-36, 1.0, 1e37]), signed=st.booleans(),
    dtype=st.sampled_from([FP32, BF16]), block=st.sampled_from([32, 128, 4096]),
)  # fmt: skip
def test_native_codes_scales_and_values_equal_the_twins(kernels, seed, n, scale, signed, dtype, block):
    x = (numbers(seed, n, signed) * scale).to(dtype)
    x[:: 1 + seed % 7] = 0
    want, scales = fourbit.encode(x, signed, block)
    packed, absmax, out = torch.empty_like(want), torch.empty_like(scales), torch.empty(n)
    assert native_fourbit.encode_into(x, packed, absmax, signed, block)
    assert torch.equal(packed, want)
    assert torch.equal(absmax, scales)
    assert native_fourbit.decode_into(packed, absmax, signed, out, block)
    assert torch.equal(out, fourbit.decode(want, scales, n, signed, block))


@few
@given(
    seed=SEEDS, n=SIZES, weight=st.sampled_from([FP32, BF16]), grad=st.sampled_from([FP32, BF16]),
    key=st.sampled_from([None, 0, 12345]), block=st.sampled_from([32, 128]),
)  # fmt: skip
def test_native_steps_equal_the_twins(kernels, seed, n, weight, grad, key, block):
    common = {"beta1": 0.9, "beta2": 0.95, "decay": 0.99, "alpha": 0.02, "block": block, "key": key, "start": seed}
    w = numbers(seed, n, True).to(weight)
    ours, theirs = ([w.clone(), *moments(n, True, False, block=block)] for _ in range(2))
    lion, twin = ([w.clone(), *moments(n, True, block=block)] for _ in range(2))
    for step in range(4):
        g = numbers(seed + step, n, True).to(grad)
        assert native_fourbit.adamw4bit_(ours[0], g, *ours[1:], eps=1e-8, **common)
        plain.adamw4bit_(theirs[0], g, *theirs[1:], eps=1e-8, **common)
        assert native_fourbit.lion4bit_(lion[0], g, *lion[1:], **common)
        plain.lion4bit_(twin[0], g, *twin[1:], **common)
    # states and Lion's weights: equal, ties included; no tolerance
    for a, b in zip(ours[1:] + lion, theirs[1:] + twin, strict=True):
        assert torch.equal(a, b)
    # Adam's weights: torch's square root is off by a last bit now and then; in bf16 that can move a rounding by one place
    if weight is FP32:
        assert torch.allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    else:
        assert torch.allclose(ours[0].float(), theirs[0].float(), rtol=2**-7, atol=1e-30)
        assert int((ours[0] != theirs[0]).sum()) <= 1 + n // 500


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_marks_its_block_as_in_the_twin(kernels, bad):
    n = 333
    g = numbers(1, n, True)
    g[200] = bad
    ours, theirs = ([torch.ones(n), *moments(n, True, False)] for _ in range(2))
    rates = {"beta1": 0.9, "beta2": 0.99, "decay": 1.0, "alpha": 0.1, "eps": 1e-8}
    assert native_fourbit.adamw4bit_(ours[0], g, *ours[1:], **rates)
    plain.adamw4bit_(theirs[0], g, *theirs[1:], **rates)
    assert all(same(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    assert ours[2].isfinite().tolist() == [True, False, True]
    assert int(ours[0].isnan().sum()) == 1


def test_thread_count_and_cuts_between_blocks_change_nothing(kernels):
    n, found, before = 50_001, [], torch.get_num_threads()
    g = numbers(2, n, True)
    rates = {"beta1": 0.9, "beta2": 0.99, "decay": 1.0, "alpha": 0.1, "eps": 1e-8, "key": 3}
    try:
        for threads, cuts in ((1, [0, n]), (3, [0, n]), (1, [0, 128 * 100, n])):
            torch.set_num_threads(threads)
            w, c1, a1, c2, a2 = [torch.ones(n, dtype=BF16), *moments(n, True, False)]
            for i, j in pairwise(cuts):
                half, of = slice(i // 2, -(-j // 2)), slice(i // 128, -(-j // 128))
                state = (c1[half], a1[of], c2[half], a2[of])
                assert native_fourbit.adamw4bit_(w[i:j], g[i:j], *state, start=i, **rates)
            found.append([w, c1, a1, c2, a2])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.ones(300, dtype=torch.float64)}, {"grad": torch.ones(299)}, {"codes": torch.zeros(300, dtype=torch.uint8)},
        {"absmax": torch.zeros(2)}, {"block": 16}, {"block": 48}, {"block": 8192}, {"start": (1 << 32) - 5},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_and_untouched(kernels, change):
    call = dict(zip(("codes", "absmax"), moments(300, True), strict=True))
    call |= {"weight": torch.ones(300), "grad": torch.ones(300), "key": 1, "start": 0} | change
    before = call["weight"].clone()
    assert native_fourbit.lion4bit_(**call, beta1=0.9, beta2=0.99, decay=0.5, alpha=0.1) is False
    assert torch.equal(call["weight"], before)


def test_on_paper_a_kernel_says_that_it_would_and_touches_nothing(kernels):
    w, state = torch.ones(300), moments(300, True)
    rates = {"beta1": 0.9, "beta2": 0.99, "decay": 0.5, "alpha": 0.1}
    with native.on_paper(), FakeTensorMode():
        assert native_fourbit.lion4bit_(torch.empty(300), torch.empty(300), *state, **rates)
        assert native.lion8bit_(torch.empty(300), torch.empty(300), *state, **rates)
        assert not native.lion8bit_(torch.empty(600)[::2], torch.empty(300), *state, **rates)
    with FakeTensorMode():
        assert not native_fourbit.lion4bit_(torch.empty(300), torch.empty(300), *state, **rates)
    assert bool((w == 1).all())
