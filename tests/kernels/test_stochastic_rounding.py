"""The counter hash and the stochastic write, in plain torch: statistics, independence of the cut, special numbers."""

import math

import pytest
import torch

from tare.kernels import rounding


def unsigned(h: torch.Tensor) -> torch.Tensor:
    return h.to(torch.int64) & rounding.MASK


def written(exact: torch.Tensor, key: int, start: int = 0) -> torch.Tensor:
    weight = torch.empty(exact.shape, dtype=torch.bfloat16)
    rounding.round_stochastic_(weight, exact, key, start)
    return weight


@pytest.mark.parametrize("start", [0, 5, (1 << 31) - 3, (1 << 32) - 3, (7 << 32) + 1])
@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFF, (1 << 64) - 1])
def test_tensor_hash_is_the_integer_hash(key, start):
    want = [rounding.mix32(rounding.base(key, i >> 32) + (i & rounding.MASK)) for i in range(start, start + 8)]
    assert unsigned(rounding.hash32(key, start, 8)).tolist() == want


def test_hash_values_are_fixed_for_ever():
    # checkpoints resume with the same roundings: these numbers may not change
    assert unsigned(rounding.hash32(1234, 10, 3)).tolist() == [650459389, 759151470, 357539620]


def test_hash_bits_are_balanced_and_uncorrelated():
    n = 1 << 18
    h = unsigned(rounding.hash32(99, 0, n))
    bits = torch.stack([(h >> b) & 1 for b in range(32)]).double() * 2 - 1
    # a mean of n signs has standard deviation 1/sqrt(n); five of them, for 32 means and 32 x 31 / 2 + 32 x 32 products
    bound = 5 / math.sqrt(n)
    assert float(bits.mean(1).abs().max()) < bound
    products = bits @ bits.mT / n - torch.eye(32)
    assert float(products.abs().max()) < bound
    lagged = bits[:, :-1] @ bits[:, 1:].mT / n
    assert float(lagged.abs().max()) < bound


def test_neighbouring_keys_do_not_share_their_numbers():
    # the flaw of hashing `key xor index`: the same set in another order
    a, b = (set(unsigned(rounding.hash32(key, 0, 4096)).tolist()) for key in (2, 3))
    assert len(a & b) < 5


def test_a_piece_is_rounded_as_within_the_whole():
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = written(exact, 5)
    assert torch.equal(torch.cat([written(exact[:300], 5), written(exact[300:], 5, 300)]), whole)
    strided = torch.empty(40, 25, dtype=torch.bfloat16).t()
    rounding.round_stochastic_(strided, exact.view(25, 40), 5)
    assert torch.equal(strided, whole.view(25, 40))


def test_chunks_do_not_change_anything(monkeypatch):
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = written(exact, 5)
    monkeypatch.setattr(rounding, "_CHUNK_CPU", 64)
    assert torch.equal(written(exact, 5), whole)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
def test_the_mean_is_exact_and_only_neighbours_occur(sign, fraction):
    n, low, high = 1 << 18, 1.0, 1.0 + 2**-7
    exact = torch.full((n,), sign * (low + fraction * (high - low)), dtype=torch.float32)
    found = written(exact, 11).double()
    assert set(found.tolist()) == {sign * low, sign * high}
    p = (exact[0].abs().item() - low) / (high - low)
    # five standard deviations of a mean of n draws
    assert abs(float(((found.abs() - low) / (high - low)).mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_small_steps_add_up_where_nearest_rounding_loses_them():
    weight, nearest = torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    update = torch.ones(4096)
    for step in range(200):
        rounding.write_stochastic_(weight, update, decay=1.0, alpha=-1e-4, key=step)
        nearest = (nearest.float() + 1e-4).bfloat16()
    assert bool((nearest == 1).all())
    # a step has standard deviation below 2^-8 (half a cell); 4096 weights, 200 steps, five standard deviations
    assert abs(float(weight.double().mean()) - 1.02) < 5 * 2**-8 * math.sqrt(200 / 4096)


def test_numbers_that_bf16_holds_and_special_numbers_pass_unchanged():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, 2.0**-133, 3.3895313892515355e38])
    found = written(exact, 3)
    assert torch.equal(found.float().view(torch.int32), exact.view(torch.int32))
    # NaN whose payload is in the low half alone: cutting it would leave an infinity
    nan = torch.tensor([0x7F800001, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert bool(written(nan, 3).isnan().all())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        rounding.round_stochastic_(torch.zeros(3), torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"\[2\]"):
        rounding.round_stochastic_(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2), 1)
    with pytest.raises(ValueError, match=r"2\*\*64"):
        rounding.hash32(-1, 0, 1)


def halved(exact: torch.Tensor, key: int, start: int = 0) -> torch.Tensor:
    weight = torch.empty(exact.shape, dtype=torch.float16)
    rounding.round_stochastic_(weight, exact, key, start)
    return weight


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("low", "gap"), [(1.0, 2**-10), (0.02, 2**-16), (2**-14 * (1 - 2**-10), 2**-24), (2**-20, 2**-24), (0.0, 2**-24)]
)
def test_fp16_goes_to_a_neighbour_and_its_mean_is_exact(low, gap, fraction, sign):
    """Ordinary numbers, the last below the smallest normal one, subnormal ones, and those below the smallest."""
    n = 1 << 18
    low = float(torch.tensor(low, dtype=torch.float16))
    exact = torch.full((n,), sign * (low + fraction * gap), dtype=torch.float32)
    found = halved(exact, 11).double()
    assert set(found.abs().tolist()) == {low, low + gap}
    p = (exact[0].abs().item() - low) / gap
    assert abs(float(((found.abs() - low) / gap).mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_every_fp16_number_passes_unchanged():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    found = halved(every.float(), 3)
    same = found.view(torch.int16) == every.view(torch.int16)
    assert bool((same | (every.isnan() & found.isnan())).all())
    assert math.isinf(float(halved(torch.tensor([7e4]), 3)))


def test_fp16_pieces_and_small_steps():
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-4
    assert torch.equal(torch.cat([halved(exact[:300], 5), halved(exact[300:], 5, 300)]), halved(exact, 5))
    weight = torch.full((4096,), 0.02, dtype=torch.float16)
    start = float(weight[0])
    for step in range(200):
        rounding.write_stochastic_(weight, torch.ones(4096), decay=1.0, alpha=-1e-7, key=step)
    # the gap is 2^-16; a step has at most half of it as standard deviation
    assert abs(float(weight.double().mean()) - start - 2e-5) < 5 * 2**-17 * math.sqrt(200 / 4096)
