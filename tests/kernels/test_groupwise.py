"""The affine group codec and the packing of two codes a byte: recorded codes, bounds, special numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.kernels import groupwise, nibbles
from tare.kernels.groupwise import decode_affine, encode_affine

few = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)
ZEROS = st.sampled_from([{}, {"span_zero": True}, {"symmetric": True}])


def numbers(seed: int, n: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) + offset


def each(x: torch.Tensor, group: int, n: int) -> torch.Tensor:
    """A number for each group, spread over its elements."""
    return x.repeat_interleave(group)[:n]


@pytest.mark.parametrize("name", ["tall", "wide"])
@pytest.mark.parametrize("choice", [{"clamp_zero": True}, {"span_zero": True}, {}], ids=str)
def test_recorded_int4_bases_are_met_exactly(name, choice, golden):
    # groups of both signs: the published clamp, the widened range and the free zero are one and the same
    case = golden(f"qgalore_int4_proj_{name}")
    codes, scale, zero = encode_affine(case["x"], bits=4, group=64, **choice)
    assert torch.equal(codes.view(-1, 64), case["codes"])
    assert torch.equal(scale, case["scales"].view(-1))
    assert torch.equal(zero, case["zeros"].view(-1))
    assert torch.equal(decode_affine(codes, scale, zero, 64), case["y"])


@pytest.mark.parametrize("name", ["sr", "onesigned"])
def test_recorded_int8_weights_are_met_exactly(name, golden):
    case = golden(f"qgalore_int8_weight_{name}")
    for rounding, suffix in (({"uniform": case["u"]}, ""), ({}, "_nearest")):
        codes, scale, zero = encode_affine(case["x"], clamp_zero=True, **rounding)
        assert torch.equal(codes, case["codes" + suffix])
        assert torch.equal(scale, case["scales"].view(-1))
        assert torch.equal(zero, case["zeros"].view(-1))
        assert torch.equal(decode_affine(codes, scale, zero), case["y" + suffix])


@pytest.mark.parametrize("choice", [{}, {"span_zero": True}, {"symmetric": True}], ids=str)
def test_a_group_of_one_sign_survives_without_the_published_clamp(choice, golden):
    x = golden("qgalore_int8_weight_onesigned")["x"]
    codes, scale, zero = encode_affine(x, **choice)
    # half a step; of a range of 0.02, or of 0.5 when it must hold 0
    assert float((decode_affine(codes, scale, zero) - x).abs().max()) <= 0.51 * float(scale.max()) < 0.003


@few
@given(
    seed=SEEDS, n=st.integers(1, 900), bits=st.integers(2, 8), group=st.sampled_from([1, 7, 64, 256]), choice=ZEROS,
    scale=st.sampled_from([1e-3, 1.0, 1e20]), offset=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_round_trip_stays_within_half_a_step(seed, n, bits, group, choice, scale, offset):
    x = numbers(seed, n, offset) * scale
    codes, step, zero = encode_affine(x, bits, group, **choice)
    assert int(codes.max()) < 2**bits
    assert bool((zero == zero.round()).all())
    error = (decode_affine(codes, step, zero, group) - x).abs()
    # Half a step, plus half of one at the ends, where the zero was rounded; 1e-6: fp32 division and product
    assert bool((error <= each(step, group, n) * 1.0001 + 1e-6 * x.abs()).all())
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert bool((error <= each(step, group, n) * 0.5001 + 1e-6 * x.abs())[inside].all())


@few
@given(seed=SEEDS, n=st.integers(1, 900), bits=st.sampled_from([4, 8]), group=st.sampled_from([64, 256]))
def test_zero_is_kept_exactly_and_its_code_is_a_byte(seed, n, bits, group):
    x = numbers(seed, n, offset=2.0)
    x[:: 1 + seed % 5] = 0.0
    codes, scale, zero = encode_affine(x, bits, group, span_zero=True)
    assert bool(((zero >= 0) & (zero < 2**bits)).all())
    assert bool((decode_affine(codes, scale, zero.to(torch.uint8), group)[x == 0] == 0).all())


@few
@given(seed=SEEDS, bits=st.sampled_from([4, 8]), choice=ZEROS, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_decoded_numbers_are_fixed_points_of_the_same_steps(seed, bits, choice, scale):
    # where the codes reach both ends; else the second trip finds a narrower range
    codes = torch.randint(0, 2**bits, (256,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    least = 1 if "symmetric" in choice else 0  # a symmetric code keeps as much below its zero as above
    codes = codes.clamp(min=least)
    codes[:2] = torch.tensor([least, 2**bits - 1])
    x = decode_affine(codes, torch.tensor([scale]), torch.tensor([float(2 ** (bits - 1))]))
    again, step, zero = encode_affine(x, bits, **choice)
    assert torch.equal(again, codes)
    assert torch.allclose(decode_affine(again, step, zero), x, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_stochastic_rounding_is_unbiased_and_repeatable(symmetric):
    x = torch.tensor([-1.0, 0.1234, 0.5, 1.0]).repeat(64)  # one group of 256; 64 draws of each in one call
    total = torch.zeros(4, dtype=torch.float64)
    for key in range(200):
        codes, scale, zero = encode_affine(x, bits=4, symmetric=symmetric, key=key)
        total += decode_affine(codes, scale, zero).double().view(64, 4).mean(0)
    inner = slice(0, 4) if symmetric else slice(1, 3)  # an affine group may be cut at one end
    # the deviation of one draw is at most half a step of 1/7, of the mean of 12,800 draws 6.3e-4; four of them
    assert torch.allclose(total[inner] / 200, x[:4].double()[inner], rtol=0, atol=2.5e-3)
    whole = encode_affine(x, key=9)[0]
    assert torch.equal(whole, encode_affine(x, key=9)[0])
    assert not torch.equal(whole, encode_affine(x, key=10)[0])


def test_a_piece_draws_the_numbers_of_its_place():
    x = numbers(1, 1024)
    whole = encode_affine(x, key=3)[0]
    assert torch.equal(encode_affine(x[512:], key=3, start=512)[0], whole[512:])


@pytest.mark.parametrize(
    "choice", [{}, {"span_zero": True}, {"clamp_zero": True}, {"symmetric": True}, {"key": 1}], ids=str
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_shows_in_its_group_and_no_other(bad, choice):
    x = numbers(2, 700)
    clean = encode_affine(x, **choice)
    x[300] = bad
    codes, scale, zero = encode_affine(x, **choice)
    y = decode_affine(codes, scale, zero)
    assert bool(y[256:512].isnan().all())
    assert bool(y[:256].isfinite().all())
    assert torch.equal(codes[512:], clean[0][512:])


@pytest.mark.parametrize("choice", [{}, {"span_zero": True}, {"clamp_zero": True}, {"symmetric": True}], ids=str)
def test_zeros_and_constants(choice):
    zeros = encode_affine(torch.zeros(300), bits=4, **choice)
    assert bool((decode_affine(*zeros) == 0).all())
    if "clamp_zero" not in choice:
        constant = encode_affine(torch.full((300,), 0.7), bits=4, **choice)
        assert torch.allclose(decode_affine(*constant), torch.tensor(0.7), rtol=1e-5)
    empty = encode_affine(torch.empty(0, 3), **choice)
    assert empty[0].shape == decode_affine(*empty).shape == (0, 3)


def test_shapes_layouts_dtypes_and_outputs(monkeypatch):
    x = numbers(4, 40 * 24).view(40, 24)
    codes, scale, zero = encode_affine(x.t(), group=64)
    assert codes.shape == (24, 40)
    assert torch.equal(codes, encode_affine(x.t().contiguous(), group=64)[0])
    assert torch.equal(encode_affine(x.bfloat16())[0], encode_affine(x.bfloat16().float())[0])
    out = torch.empty(24, 40, dtype=torch.bfloat16)
    assert decode_affine(codes, scale, zero, 64, out=out) is out
    assert torch.equal(out, decode_affine(codes, scale, zero, 64).bfloat16())
    monkeypatch.setattr("tare.kernels.blockwise.chunk_elements", lambda device: 128)
    for a, b in zip(encode_affine(x.t(), group=64), (codes, scale, zero), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits"), ({"bits": 1}, "bits"), ({"group": 0}, "group"), ({"key": 1, "uniform": torch.zeros(4)}, "both"),
        ({"symmetric": True, "clamp_zero": True}, "symmetric"), ({"uniform": torch.zeros(3)}, "3 numbers"),
    ],
)  # fmt: skip
def test_choices_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encode_affine(torch.ones(4), **options)
    with pytest.raises(ValueError, match="groups"):
        decode_affine(torch.zeros(4, dtype=torch.uint8), torch.ones(2), torch.ones(1))


# -- two codes a byte


@few
@given(seed=SEEDS, n=st.integers(0, 700), width=st.sampled_from([2, 6, 64, 128, 256]))
def test_packing_gives_every_code_back_in_its_place(seed, n, width):
    codes = torch.randint(0, 16, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = nibbles.pack(codes, width)
    assert packed.numel() == -(-n // 2)
    assert torch.equal(nibbles.unpack(packed, n, width), codes)


def test_a_byte_holds_an_element_and_the_one_half_a_block_further():
    # Card 9, pitfall a: unpacking that lays all high halves after all low ones scrambles what packing interleaved.
    n, width = 128 * 3 + 37, 128
    codes = (torch.arange(n) % 16).to(torch.uint8)
    packed = nibbles.pack(codes, width).tolist()
    for start in range(0, n, width):
        stop = min(start + width, n)
        half = -(-(stop - start) // 2)
        for i in range(half):
            high = int(codes[start + half + i]) if start + half + i < stop else 0
            assert packed[start // 2 + i] == int(codes[start + i]) + 16 * high


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="even"):
        nibbles.pack(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="5 4-bit codes need 3"):
        nibbles.unpack(torch.zeros(2, dtype=torch.uint8), 5, 4)


def test_the_default_group_is_the_papers():
    assert groupwise.GROUP == 256
