"""The one-pass step on 8-bit groups and the decoding of groups: the codes, scales and numbers of the plain twin, to the bit."""

import pytest
import torch

from tare.core.int8_weight import Int8Weight
from tare.kernels import native_groupwise, nibbles
from tare.kernels.groupwise import decode_affine, encode_affine
from tare.kernels.native import on_paper

pytestmark = pytest.mark.usefixtures("compiler")
FORMS = ("symmetric", "affine", "clamped")


def numbers(n: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)) + offset


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", [None, 5, (1 << 63) + 3])
@pytest.mark.parametrize(("n", "group"), [(1, 256), (7, 7), (601, 64), (70_001, 1000), (4096, 1), (9000, 4096)])
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (5.0, 1e-6), (0.3, 1e4)])
def test_a_step_is_the_twins(form, key, n, group, offset, scale):
    x, u = numbers(n, offset) * scale, numbers(n)
    how = {"symmetric": form == "symmetric", "clamp_zero": form == "clamped"}
    codes, scales, zeros = encode_affine(x, 8, group, **how)
    alpha, start = 0.01 * scale, group * 11
    exact = decode_affine(codes, scales, zeros, group).mul_(0.999).sub_(u.mul(alpha))
    wanted = encode_affine(exact, 8, group, **how, key=key, start=start)
    zero = None if form == "symmetric" else zeros
    assert native_groupwise.step_(
        codes, scales, zero, u, group=group, form=form, decay=0.999, alpha=alpha, key=key, start=start
    )
    assert torch.equal(codes, wanted[0])
    assert torch.equal(scales, wanted[1])
    assert zero is None or torch.equal(zero, wanted[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_finite_stays_in_its_group(form, bad):
    weight = Int8Weight.encode(numbers(300).view(3, 100), 100, form)
    update = torch.zeros(300)
    update[150] = bad
    untouched = weight.dense()
    weight.step(0, update, 1.0, 10.0, 3)
    assert weight.dense()[1].isnan().all()  # the range of a group with 3e38 times ten is infinite
    assert weight.dense()[[0, 2]].isfinite().all()
    assert torch.allclose(weight.dense()[[0, 2]], untouched[[0, 2]], atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_stepped_alike_with_and_without_the_kernel(form, monkeypatch):
    dense, u = numbers(130 * 70, 0.2).view(130, 70), numbers(64 * 40)
    ours, theirs = (Int8Weight.encode(dense, 64, form) for _ in range(2))
    ours.step(64 * 7, u, 0.99, 0.1, 9)
    monkeypatch.setattr(native_groupwise, "step_", lambda *tensors, **how: False)
    monkeypatch.setattr(native_groupwise, "decode_into", lambda *tensors, **how: False)
    theirs.step(64 * 7, u, 0.99, 0.1, 9)
    for name, part in ours.parts().items():
        assert torch.equal(part, theirs.parts()[name]), name
    assert torch.equal(ours.read(64, 64 * 30), theirs.read(64, 64 * 30))


def test_the_mean_of_a_step_is_exact():
    """A thousand steps of the same size on equal groups: the mean moves by their sum, at four standard deviations."""
    weight = Int8Weight.encode(numbers(256).repeat(64), 256)
    u = torch.full((256 * 64,), 1e-3)
    before = weight.dense().mean()
    for number in range(100):
        weight.step(0, u, 1.0, 0.1, number)
    moved = float(before - weight.dense().mean())
    step = float(weight.scale.max())
    assert moved == pytest.approx(100 * 1e-4, abs=4 * 0.5 * step * (100 / u.numel()) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "group"), [(1, 2), (5, 64), (601, 64), (70_001, 256)])
def test_decoding_is_the_twins(dtype, bits, n, group):
    codes, scale, zero = encode_affine(numbers(n), bits, group, span_zero=True)
    wanted = decode_affine(codes, scale, zero, group, torch.empty(n, dtype=dtype))
    kept = nibbles.pack(codes, group) if bits == 4 else codes
    for middle in (zero, zero.to(torch.uint8)):
        out = torch.empty(n, dtype=dtype)
        assert native_groupwise.decode_into(kept, scale, middle, out, group, bits == 4)
        assert torch.equal(out, wanted)


def test_it_refuses_what_it_cannot_do():
    codes, scale, zero = encode_affine(numbers(100), 8, 10)
    how = {"group": 10, "form": "affine", "decay": 1.0, "alpha": 0.1, "key": 1}
    kept = codes.clone()
    assert not native_groupwise.step_(codes, scale, zero, numbers(100).double(), **how)
    assert not native_groupwise.step_(codes, scale, None, numbers(100), **how)
    assert not native_groupwise.step_(codes, scale, zero, numbers(200)[::2], **how)
    assert not native_groupwise.step_(codes, scale, zero, numbers(100), **{**how, "start": (1 << 32) - 50})
    assert not native_groupwise.decode_into(codes, scale, zero, torch.empty(100, dtype=torch.float64), 10)
    long = encode_affine(numbers(10_000), 8, 5000)
    assert not native_groupwise.decode_into(*long, torch.empty(10_000), 5000)
    assert torch.equal(codes, kept)
    with on_paper():
        assert native_groupwise.step_(codes, scale, zero, numbers(100), **how)
    assert torch.equal(codes, kept)
