"""4-bit moments and affine bases as the engine sees them: names, bytes, views, and where a tensor may be cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State, allocate
from tare.core.storage import Slot, Storage
from tare.core.transform import StateSpec
from tare.kernels import fourbit, groupwise
from tare.testing import RecordedBasis

few = settings(max_examples=40, deadline=None, derandomize=True)
LEAF = Leaf("w", (30, 50), torch.float32, "linear")
CPU = torch.device("cpu")


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slot_of(storage: Storage, shape: tuple[int, ...] = (30, 50), **spec: object) -> Slot:
    return storage.slot(LEAF, "x", StateSpec(shape, **spec))  # type: ignore[arg-type]


def test_names_shapes_and_bytes_of_every_form():
    moment = slot_of(Storage("int4", min_quantized=1))
    assert list(moment.parts()) == [("x_codes", (750,), torch.uint8), ("x_absmax", (12,), torch.float32)]
    basis = slot_of(Storage(basis="int4"), kind="basis")
    assert list(basis.parts()) == [
        ("x_codes", (750,), torch.uint8), ("x_scale", (6,), torch.float32), ("x_zero", (6,), torch.uint8),
    ]  # fmt: skip
    wide = slot_of(Storage(basis="int8"), kind="basis", transposed=True)
    assert [shape for _, shape, _ in wide.parts()] == [(50, 30), (6,), (6,)]
    assert (moment.bytes, basis.bytes, wide.bytes) == (750 + 48, 750 + 30, 1500 + 30)
    assert slot_of(Storage("int4"), (31, 1)).form == "plain"  # below min_quantized
    assert slot_of(Storage(basis="int4"), kind="basis", dtype=torch.int32).form == "plain"  # numbers of columns
    assert slot_of(Storage(), kind="exact", form="affine4").form == "affine4"  # the transform's own choice


def test_blocks_by_default():
    assert (Storage("int4").moment_block, Storage("int8").moment_block) == (128, 256)
    assert Storage("int4", block=64).moment_block == 64


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"moment": "int4", "block": 33}, "block"), ({"basis": "int4", "group": 33}, "group"), ({"group": 0}, "group"),
        ({"moment": "int5"}, "int4"), ({"basis": "int3"}, "int4"), ({"block": 0}, "block"),
    ],
)  # fmt: skip
def test_policies_that_make_no_sense_are_refused(own, message):
    with pytest.raises(InputError, match=message):
        Storage(**own)


@pytest.mark.parametrize("signed", [True, False])
def test_a_moment_is_read_and_written_as_its_codec_says(signed):
    slot = slot_of(Storage("int4", min_quantized=1), signed=signed)
    raw = allocate({"x": slot}, CPU)
    assert bool((State(raw, {"x": slot})["x"] == 0).all())
    x = numbers(1, 30, 50) if signed else numbers(1, 30, 50).square()
    state = State(raw, {"x": slot})
    state["x"] = x
    assert state["x"] is x  # what the step sees is not rounded
    state.flush()
    packed, absmax = fourbit.encode(x, signed)
    assert torch.equal(raw["x_codes"], packed)
    assert torch.equal(State(raw, {"x": slot})["x"].view(-1), fourbit.decode(packed, absmax, 1500, signed))


@few
@given(seed=st.integers(0, 999), block=st.sampled_from([2, 64, 128]), numel=st.integers(1, 900), data=st.data())
def test_slices_between_blocks_are_pieces_of_the_whole(seed, block, numel, data):
    slot = slot_of(Storage("int4", min_quantized=1, block=block), (numel,))
    x = numbers(seed, numel)
    whole, pieces = (allocate({"x": slot}, CPU) for _ in range(2))
    state = State(whole, {"x": slot})
    state["x"] = x
    state.flush()
    cut = block * data.draw(st.integers(0, numel // block))
    for start, stop in ((0, cut), (cut, numel)):
        if start < stop:
            part = State(pieces, {"x": slot}).part(start, stop)
            part["x"] = x[start:stop]
            part.flush()
            assert torch.equal(
                State(pieces, {"x": slot}).part(start, stop)["x"], State(whole, {"x": slot})["x"][start:stop]
            )
    assert all(torch.equal(whole[name], pieces[name]) for name in ("x_codes", "x_absmax"))


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(30, 8), (3, 20, 7), (5, 1)], ids=str)
def test_a_basis_is_seen_rounded_at_once_and_reading_it_changes_nothing(form, transposed, shape):
    slot = slot_of(Storage(basis=form, group=64), shape, kind="basis", transposed=transposed)
    raw = allocate({"x": slot}, CPU)
    assert bool((State(raw, {"x": slot})["x"] == 0).all())
    p = numbers(2, *shape)
    state = State(raw, {"x": slot})
    state["x"] = p
    seen = state["x"]
    groups = p.mT.contiguous() if transposed else p
    exact = groupwise.decode_affine(*groupwise.encode_affine(groups, int(form[3:]), 64, span_zero=True), 64)
    assert seen.shape == p.shape
    assert torch.equal(seen, exact.mT if transposed else exact)
    kept = {name: value.clone() for name, value in raw.items() if isinstance(value, Tensor)}
    for _ in range(3):
        state.flush()
        state = State(raw, {"x": slot})
        assert torch.equal(state["x"], seen)
    state.flush()
    assert all(torch.equal(raw[name], value) for name, value in kept.items())


def test_a_basis_changed_in_place_is_kept():
    slot = slot_of(Storage(basis="int4"), kind="basis")
    raw = allocate({"x": slot}, CPU)
    state = State(raw, {"x": slot})
    state["x"].add_(numbers(3, 30, 50))
    state.flush()
    assert float((State(raw, {"x": slot})["x"] - numbers(3, 30, 50)).abs().max()) < 0.3


@few
@given(
    rows=st.integers(1, 60), width=st.integers(1, 400), block=st.sampled_from([2, 64, 128, 256]),
    first=st.integers(0, 60), last=st.integers(0, 60),
)  # fmt: skip
def test_a_shard_of_rows_holds_whole_blocks_exactly_where_the_slot_says_so(rows, width, block, first, last):
    start, stop = sorted((min(first, rows), min(last, rows)))
    slot = slot_of(Storage("int4", block=block, min_quantized=1), (rows, width))
    ends = (start * width, stop * width)
    assert slot.holds_rows(start, stop) == all(x % block == 0 or x == rows * width for x in ends)
    assert slot.row_period == math.lcm(block, width) // width
    if width % block == 0:
        assert slot.row_period == 1  # no cut between rows can cut a block
    if slot.holds_rows(start, stop) and start < stop:
        x = numbers(rows, rows, width)
        packed, absmax = fourbit.encode(x, True, block)
        own_packed, own_absmax = fourbit.encode(x[start:stop], True, block)
        assert torch.equal(own_packed, packed[ends[0] // 2 : -(-ends[1] // 2)])
        assert torch.equal(own_absmax, absmax[ends[0] // block : -(-ends[1] // block)])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_recorded_basis_steps_as_its_rounded_self(form):
    """Feeding P through the storage equals feeding what the storage makes of P, in fp32."""
    p, bits = torch.linalg.qr(numbers(4, 12, 4)).Q, int(form[3:])
    weights = []
    for bases, kept in (
        (p, Storage(basis=form, group=16)),
        (
            groupwise.decode_affine(*groupwise.encode_affine(p.mT, bits, 16, span_zero=True), 16).mT.contiguous(),
            Storage(),
        ),
    ):
        w = nn.Parameter(numbers(5, 20, 12))
        basis = RecordedBasis({0: bases, 3: bases.flip(1)})
        if kept.basis == "fp32":
            turned = groupwise.encode_affine(p.flip(1).mT, bits, 16, span_zero=True)
            basis = RecordedBasis({0: bases, 3: groupwise.decode_affine(*turned, 16).mT.contiguous()})
        optimizer = tare.GaLore([("w.weight", w)], lr=0.01, rank=4, basis=basis, storage=kept)
        for step in range(6):
            w.grad = numbers(10 + step, 20, 12)
            optimizer.step()
        weights.append(w.detach())
    assert torch.equal(*weights)


def test_the_account_and_its_words():
    net = nn.Linear(128, 96, bias=False)
    storage = {"moment": "int4", "basis": "int4", "min_quantized": 1}
    optimizer = tare.GaLore(net, lr=0.01, rank=16, storage=storage)
    account, words = optimizer.state_bytes(), optimizer.explain()
    assert account.by_kind == {"moment": 2 * (128 * 16 // 2 + 16 * 4), "basis": 96 * 16 // 2 + 6 * 5}
    assert "basis int4 groups, moment int4" in words
    assert "4-bit codec: " in words
