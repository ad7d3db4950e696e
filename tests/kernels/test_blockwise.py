"""The block-wise 8-bit codec in plain torch: recorded codes, exactness, special numbers, shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tare.kernels import blockwise
from tare.kernels.selftest import adversarial

few = settings(max_examples=30, deadline=None, derandomize=True)
SIGNS = pytest.mark.parametrize("signed", [True, False])


def numbers(seed: int, n: int, signed: bool, decades: float = 4.0) -> torch.Tensor:
    """[n] fp32 spread over several decades."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))
    return x if signed else x.square()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@SIGNS
def test_map_is_the_recorded_one_bit_for_bit(signed, golden):
    values = golden("bnb_dynamic_maps")["signed" if signed else "unsigned"]
    assert torch.equal(blockwise.dynamic_map(signed), values)
    assert values[blockwise.zero_code(signed)] == 0


@pytest.mark.parametrize("name", ["signed_heavy", "signed_normal", "signed_zeroblock", "unsigned_cols"])
def test_recorded_codes_scales_and_values_are_met_exactly(name, golden):
    case, signed = golden(f"bnb_blockwise_{name}"), name.startswith("signed")
    codes, absmax = blockwise.encode(case["x"], signed)
    assert torch.equal(codes, case["codes"])
    assert torch.equal(absmax, case["absmax"])
    assert torch.equal(blockwise.decode(codes, absmax, signed), case["y"])


@SIGNS
def test_look_up_is_the_nearest_value_at_every_threshold_and_its_neighbours(signed, reference):
    values = blockwise.dynamic_map(signed)
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    up, down = torch.full_like(middles, torch.inf), torch.full_like(middles, -torch.inf)
    y = torch.cat(
        [
            adversarial(signed),
            middles,
            middles.nextafter(up),
            middles.nextafter(down),
            numbers(1, 20000, signed).clamp(-1, 1),
        ]
    )
    # blocks of two with a 1 in each keep the scale at 1, so that y reaches the look-up unchanged
    codes, absmax = blockwise.encode(torch.stack([y, torch.ones_like(y)], dim=1), signed, block=2)
    assert bool((absmax == 1).all())
    assert torch.equal(codes[:, 0].long(), reference.nearest_by_midpoints(y, values))
    assert torch.equal(codes[:, 0].long(), reference.nearest_by_distance(y, values))


@SIGNS
def test_no_key_covers_two_thresholds(signed):
    # with this the candidate and one comparison are exact for every fp32 number, not only for those tested
    keys = torch.arange(65536, dtype=torch.int64)
    keys = keys[(keys & 0x7F80) != 0x7F80]
    ends = torch.stack([keys << 16, keys << 16 | 0xFFFF])
    y = torch.where(ends > 0x7FFFFFFF, ends - (1 << 32), ends).to(torch.int32).view(torch.float32)
    codes = torch.bucketize(y, torch.tensor(blockwise.map_thresholds(signed)[:-1]))
    assert int((codes[0] - codes[1]).abs().max()) == 1
    assert torch.equal(
        codes.min(0).values.to(torch.int32), torch.tensor(blockwise._candidates(signed))[keys].to(torch.int32)
    )


@SIGNS
@few
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-30, 1e30), n=st.integers(1, 1500))
def test_round_trip_stays_within_half_a_local_cell(signed, seed, scale, n):
    x = numbers(seed, n, signed) * scale
    codes, absmax = blockwise.encode(x, signed)
    peak = absmax.repeat_interleave(256)[:n].double()
    y, error = x.double() / peak, (x - blockwise.decode(codes, absmax, signed)).abs().double() / peak
    values = blockwise.dynamic_map(signed).double()
    # the signed map ends half a cell above -1
    edges = torch.cat([torch.tensor([values[0] - (values[1] - values[0])], dtype=torch.float64), values])
    above = torch.bucketize(y, edges).clamp(1, 256)
    half = (edges[above] - edges[above - 1]) / 2
    # 4e-7: x * (1 / absmax), the product with absmax and the difference each round to fp32
    assert bool((error <= half + 4e-7 * y.abs() + 1e-12).all())


@SIGNS
@few
@given(scale=st.floats(1e-28, 1e38))
def test_every_code_survives_decode_and_encode(signed, scale):
    codes = torch.arange(256, dtype=torch.uint8)
    absmax = torch.tensor([scale], dtype=torch.float32)
    again, peak = blockwise.encode(blockwise.decode(codes, absmax, signed), signed)
    assert torch.equal(again, codes)
    assert torch.equal(peak, absmax)


@SIGNS
@few
@given(seed=st.integers(0, 2**31), n=st.integers(1, 700), block=st.sampled_from([1, 7, 64, 256]))
def test_codes_are_those_of_the_slow_twin(signed, reference, seed, n, block):
    x = numbers(seed, n, signed)
    codes, absmax = blockwise.encode(x, signed, block)
    want, scales = reference.encode(x, blockwise.dynamic_map(signed), block)
    assert codes.tolist() == want
    assert absmax.tolist() == scales


@SIGNS
def test_chunks_and_slices_do_not_change_anything(signed, monkeypatch):
    x = numbers(3, 5000, signed)
    codes, absmax = blockwise.encode(x, signed)
    y = blockwise.decode(codes, absmax, signed)
    monkeypatch.setattr(blockwise, "chunk_elements", lambda device: 512)
    for found, want in zip(blockwise.encode(x, signed), (codes, absmax), strict=True):
        assert torch.equal(found, want)
    assert torch.equal(blockwise.decode(codes, absmax, signed), y)
    into, scales, out = torch.zeros_like(codes), torch.zeros_like(absmax), torch.zeros_like(y)
    for start, stop in ((0, 2560), (2560, 5000)):
        blocks = slice(start // 256, -(-stop // 256))
        blockwise.encode_into(x[start:stop], into[start:stop], scales[blocks], signed)
        assert (
            blockwise.decode(into[start:stop], scales[blocks], signed, out=out[start:stop]).data_ptr()
            == out[start:].data_ptr()
        )
    assert torch.equal(into, codes)
    assert torch.equal(scales, absmax)
    assert torch.equal(out, y)


def test_shapes_layouts_and_dtypes():
    x = numbers(4, 24 * 40, True).view(24, 40)
    codes, absmax = blockwise.encode(x.t(), True)
    assert codes.shape == (40, 24)
    assert absmax.shape == (4,)
    assert torch.equal(codes, blockwise.encode(x.t().contiguous(), True)[0])
    assert torch.equal(blockwise.encode(x.double(), True)[0], blockwise.encode(x, True)[0])
    assert torch.equal(blockwise.encode(x.bfloat16(), True)[0], blockwise.encode(x.bfloat16().float(), True)[0])
    assert torch.equal(blockwise.encode(x.clone().requires_grad_(), True)[0], blockwise.encode(x, True)[0])
    empty = blockwise.encode(torch.empty(0, 3), True)
    assert blockwise.decode(*empty, True).shape == (0, 3)
    scalar = blockwise.encode(torch.tensor(-2.0), True)
    assert blockwise.decode(*scalar, True).shape == ()


@SIGNS
def test_zero_blocks_decode_to_exact_zeros(signed):
    x = numbers(5, 768, signed)
    x[256:512] = 0
    codes, absmax = blockwise.encode(x, signed)
    assert bool((codes[256:512] == blockwise.zero_code(signed)).all())
    assert absmax[1] == 0
    assert bool((blockwise.decode(codes, absmax, signed)[256:512] == 0).all())


def test_a_subnormal_block_is_stored_as_zeros():
    codes, absmax = blockwise.encode(torch.tensor([1e-40, 0.0, -1e-42]), True)
    assert absmax.tolist() == [0.0]
    assert codes.tolist() == [127, 127, 127]


@SIGNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_number_marks_its_block_and_no_other(signed, bad):
    x = numbers(6, 768, signed)
    clean, _ = blockwise.encode(x, signed)
    x[300] = bad
    codes, absmax = blockwise.encode(x, signed)
    assert same(absmax[1], torch.tensor(abs(bad)))
    assert bool((codes[256:512] == blockwise.zero_code(signed)).all())
    y = blockwise.decode(codes, absmax, signed)
    assert not bool(y[256:512].isfinite().any())
    assert bool(y[:256].isfinite().all())
    assert torch.equal(codes[512:], clean[512:])


def test_negative_numbers_become_zero_in_the_unsigned_map():
    assert blockwise.encode(torch.tensor([-1.0, -1e-9, 1.0]), False)[0].tolist() == [0, 0, 255]


@SIGNS
def test_fake_tensors_pass_without_being_read(signed):
    blockwise._cache.clear()
    with FakeTensorMode() as mode:
        codes, absmax = blockwise.encode(torch.empty(1000, 3), signed)
        y = blockwise.decode(codes, absmax, signed)
    assert codes.shape == y.shape == (1000, 3)
    assert absmax.shape == (12,)
    fake = mode.from_tensor(torch.empty(5, 100))
    assert blockwise.encode(fake, signed)[1].shape == (2,)
    assert not blockwise._cache  # no fake table may be kept
    assert blockwise.encode(torch.ones(3), signed)[0].tolist() == [255] * 3
    assert blockwise.encode(torch.ones(3, device="meta"), signed)[0].is_meta


def test_inference_mode_leaves_usable_tables():
    blockwise._cache.clear()
    with torch.inference_mode():
        blockwise.encode(torch.ones(3), True)
    assert not blockwise._cache[True, torch.device("cpu")].values.is_inference()


@pytest.mark.parametrize(
    ("codes", "absmax", "message"),
    [
        (torch.empty(4, dtype=torch.int8), torch.empty(1), "uint8"),
        (torch.empty(4, dtype=torch.uint8), torch.empty(1, dtype=torch.bfloat16), "float32"),
        (torch.empty(3, dtype=torch.uint8), torch.empty(1), "4 codes"),
        (torch.empty(4, dtype=torch.uint8), torch.empty(2), "1 scales"),
        (torch.empty(8, dtype=torch.uint8)[::2], torch.empty(1), "contiguous"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(codes, absmax, message):
    with pytest.raises(ValueError, match=message):
        blockwise.encode_into(torch.ones(4), codes, absmax, True)


def test_temporaries_are_of_a_chunk_not_of_the_tensor():
    x = torch.randn(1 << 21)
    codes, absmax = blockwise.encode(x, True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        blockwise.encode_into(x, codes, absmax, True)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    # nine numbers of four bytes for each of 256 Ki elements; the tensor itself is 8 MiB
    assert 0 < peak <= 9 * 4 * (1 << 18)
