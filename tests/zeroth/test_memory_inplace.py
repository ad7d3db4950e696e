"""Perturbing in place: exactly, with little kept, and as the published codes do, with their drift."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.zeroth.bitmasks import pack_bits, unpack_bits
from tare.zeroth.directions import Gaussian
from tare.zeroth.memory import Displacement, ExactInPlace, InPlace, Moved
from tare.zeroth.probes import Point

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def words(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def leaves_of(*weights: Tensor, memory: str = "in-place-exact", seed: int = 0) -> tuple[tare.MeZO, list[Moved]]:
    named = [(f"w{k}", nn.Parameter(w)) for k, w in enumerate(weights)]
    optimizer = tare.MeZO(named, lr=0.1, seed=seed, memory=memory)
    return optimizer, optimizer._moved()


# -- exactly -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 300),
    st.floats(-9.0, 4.0),
    st.floats(-6.0, 3.0),
    st.integers(0, 2**16),
)
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, n: int, size: float, eps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, generator=generator, dtype=torch.float64) * 10.0**size).to(dtype)
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype
    )
    w[: special.numel()] = special[:n]
    optimizer, leaves = leaves_of(w.clone(), seed=seed)
    point = Point(((0, 10.0**eps), (3, -(10.0**eps) / 3)))
    with optimizer.memory.at(leaves, point):
        moved = leaves[0].parameter.detach().clone()
    assert torch.equal(words(leaves[0].parameter.detach()), words(w))
    copy = w.clone()
    leaves[0].add_(copy, point)
    assert torch.equal(words(moved), words(copy)), "stands where a perturbed copy stands"


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 30).to(dtype)
    weights = [
        torch.randn(()),
        torch.randn(3, 1, 5),
        base.clone().t(),
        base.clone()[::2, 1:],
        torch.randn(600_001) * 0.02,
    ]
    weights = [w.to(dtype) if w.dtype != dtype else w for w in weights]
    before = [w.clone() for w in weights]
    optimizer, leaves = leaves_of(*weights)
    assert not leaves[2].parameter.is_contiguous()
    with optimizer.memory.at(leaves, Point(((0, 0.1),))):
        for leaf, old in zip(leaves, before, strict=True):
            assert not torch.equal(leaf.parameter.detach(), old)
            copy = old.clone()
            leaf.add_(copy, Point(((0, 0.1),)), weight=old)
            assert torch.equal(leaf.parameter.detach(), copy)
    for leaf, old in zip(leaves, before, strict=True):
        assert torch.equal(words(leaf.parameter.detach()), words(old))


@pytest.mark.parametrize(
    ("dtype", "eps", "share"),
    [
        (torch.bfloat16, 1e-3, 0.11),
        (torch.float32, 1e-3, 0.11),
        (torch.bfloat16, 1e-2, 0.29),
        (torch.float32, 1e-2, 0.29),
    ],
)
def test_what_is_kept_is_as_documented(dtype: torch.dtype, eps: float, share: float) -> None:
    torch.manual_seed(0)
    _, (leaf,) = leaves_of((torch.randn(1 << 20) * 0.02).to(dtype))
    displacement = Displacement(leaf, Point(((0, eps),)))
    displacement.do()
    assert displacement.bytes <= 1.03 * share * leaf.parameter.numel() * dtype.itemsize
    assert displacement.bytes >= 0.7 * share * leaf.parameter.numel() * dtype.itemsize
    displacement.undo()
    assert displacement.bytes == 0


def test_of_weights_that_start_at_zero_nothing_more_than_a_copy_is_kept() -> None:
    _, (leaf,) = leaves_of(torch.zeros(1000, 100, dtype=torch.bfloat16))
    displacement = Displacement(leaf, Point(((0, 1e-3),)))
    displacement.do()
    assert 200_000 <= displacement.bytes <= 200_000 * 17 / 16 + 1
    displacement.undo()
    assert not words(leaf.parameter.detach()).any()


def test_an_exception_leaves_theta() -> None:
    torch.manual_seed(0)
    w = torch.randn(1000).bfloat16() * 0.02
    optimizer, leaves = leaves_of(w.clone())

    def run() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.memory.evaluate(leaves, Point(((0, 1e-3),)), run)
    assert torch.equal(leaves[0].parameter.detach(), w)


def test_a_list_of_parameters_is_perturbed_in_place_and_exactly() -> None:
    optimizer, _ = leaves_of(torch.ones(3), memory="auto")
    assert isinstance(optimizer.memory, ExactInPlace)
    assert "put back exactly" in optimizer.explain()


# -- as published ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_order_and_rounding(dtype: torch.dtype) -> None:
    """theta + (scale z) eps with scale 1, -2, 1, each operation rounded in 16 bits."""
    torch.manual_seed(0)
    eps = 1e-3
    w = (torch.randn(300_000) * 0.02).to(dtype)
    optimizer, leaves = leaves_of(w.clone(), memory="in-place", seed=3)
    (leaf,) = leaves
    z = Gaussian().draw(leaf.draw(0), leaf.state, w).to(dtype)
    by_hand = w.clone()
    for scale, point in ((1, Point(((0, eps),))), (-2, Point(((0, -eps),))), (1, None)):
        if point is None:
            optimizer.memory.restore(leaves)
        else:
            with optimizer.memory.at(leaves, point):
                pass
        by_hand = by_hand + (scale * z) * eps
        if dtype.itemsize == 2:
            assert torch.equal(leaf.parameter.detach(), by_hand)
        else:  # one rounding less: c z is not rounded before it is added
            torch.testing.assert_close(leaf.parameter.detach(), by_hand, rtol=3 * torch.finfo(dtype).eps, atol=1e-9)
            by_hand = leaf.parameter.detach().clone()


@pytest.mark.parametrize(("dtype", "drift"), [(torch.float32, 1e-9), (torch.bfloat16, 8e-5), (torch.float16, 1e-5)])
def test_drift_of_the_published_order(dtype: torch.dtype, drift: float) -> None:
    """rms per step of weights near 0.02 at eps 1e-3; after 200 steps sqrt(200) times that."""
    torch.manual_seed(0)
    w = (torch.randn(20_000) * 0.02).to(dtype)
    optimizer, leaves = leaves_of(w.clone(), memory="in-place")
    for steps in range(1, 201):
        for sign in (1.0, -1.0):
            with optimizer.memory.at(leaves, Point(((steps, sign * 1e-3),))):
                pass
        optimizer.memory.restore(leaves)
        if steps in (1, 200):
            rms = (leaves[0].parameter.detach().double() - w.double()).square().mean().sqrt().item()
            assert rms == pytest.approx(drift * math.sqrt(steps), rel=0.35)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["in-place", "in-place-exact"])
def test_int8_weights_are_refused(memory: str) -> None:
    model = nn.Linear(64, 64)
    tare.quantize_weights_(model)
    with pytest.raises(InputError, match="memory: weight is int8 and cannot be perturbed in place"):
        tare.MeZO(model, lr=0.1, memory=memory)
    with pytest.raises(InputError, match="give the model itself as params"):
        tare.MeZO(model.named_parameters(), lr=0.1)


def test_names_of_plans() -> None:
    with pytest.raises(InputError, match="expected auto, forward, in-place or in-place-exact, got 'inplace'"):
        tare.MeZO(nn.Linear(3, 3), lr=0.1, memory="inplace")
    with pytest.raises(InputError, match="give the model itself as params"):
        tare.MeZO(nn.Linear(3, 3).parameters(), lr=0.1, memory="forward")
    assert isinstance(tare.MeZO(nn.Linear(3, 3), lr=0.1, memory="in-place").memory, InPlace)


# -- bits --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_bits_pack_and_unpack(flags: list[bool]) -> None:
    mask = torch.tensor(flags, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.numel() == -(-len(flags) // 8)
    assert torch.equal(unpack_bits(packed, len(flags)), mask)
    assert all((int(packed[k // 8]) >> (k % 8)) & 1 == flag for k, flag in enumerate(flags))
