"""The Triton kernels against their plain twins: on a GPU where there is one, else under Triton's interpreter.

Not collected by its name: `test_triton_interpreter.py` runs it in a process of its own, because the interpreter must be chosen before
Triton is imported; `test_triton_gpu.py` runs it on a device.
"""

import inspect
import os
import warnings

import pytest
import torch
from torch import Tensor

from tare.kernels import (
    blockwise,
    calls,
    fourbit,
    native,
    native16,
    native_directions,
    native_fourbit,
    plain,
    rounding,
    split24,
)
from tare.kernels.triton import dense, dispatch, eightbit, products, trial
from tare.kernels.triton import fourbit as fourbit_kernels
from tare.methods import registry

FP32, BF16 = torch.float32, torch.bfloat16
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
RATES = {"beta1": 0.9, "beta2": 0.95, "decay": 0.99, "alpha": 0.02}
# Below, at and above a block of 256 and of 128, odd, and more than one program; 2^12 elements are one program of the interpreter.
SIZES = [1, 129, 256, 5000]
DTYPES = [(FP32, FP32, None), (FP32, BF16, 7), (BF16, FP32, None), (BF16, BF16, 12345)]  # weight, gradient, key
# Where exactness is not claimed it is the root and the quotient, two units of the last place each.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Every launcher must take its call: a refusal would compare the twin with itself."""
    if INTERPRETING:
        monkeypatch.setenv("TARE_TRITON", "interpret")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid value|overflow|divide by zero")  # numpy's, of NaN and infinities
        yield


def numbers(seed: int, n: int, decades: float = 5.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))
    return x.to(DEVICE)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any other."""
    nan = a.isnan() & b.isnan()
    return bool((nan | (bits(a) == bits(b))).all())


def near(a: Tensor, b: Tensor, exact: bool) -> bool:
    """Weights after Adam: fp32 within the root's error; bf16 equal but for roundings that such an error tips over."""
    if a.dtype is FP32:
        return torch.allclose(a, b, **CLOSE, equal_nan=True)
    differ = (bits(a) != bits(b)) & ~(a.isnan() & b.isnan())
    return int(differ.sum()) <= (0 if exact else 1 + a.numel() // 200) and torch.allclose(
        a.float(), b.float(), rtol=2**-7, atol=1e-6, equal_nan=True
    )


def states(codec, n: int, *signs: bool) -> list[Tensor]:
    return [x.to(DEVICE) for signed in signs for x in codec.encode(torch.zeros(n), signed)]


def special(x: Tensor) -> Tensor:
    """With a NaN, infinities, zeros and numbers that bf16 rounds to infinity."""
    x = x.clone()
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.39e38, 1e-40, -1e-45], device=x.device)
    at = torch.arange(0, x.numel(), 83, device=x.device)
    x[at] = odd[torch.arange(at.numel(), device=x.device) % odd.numel()]
    return x


# ---- moments in 8 and 4 bits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_codes_scales_and_values_equal_the_twins(signed, width, dtype):
    codec, kernels = (blockwise, eightbit) if width == 8 else (fourbit, fourbit_kernels)
    for n in SIZES:
        x = numbers(n, n, 9.0).to(dtype)
        x = x if signed else x.abs()
        if n >= 5000:
            x[:3000] = special(x[:3000].float()).to(dtype) if signed else x[:3000]
        want = codec.encode(x, signed)
        codes, absmax = torch.full_like(want[0], 99), torch.full_like(want[1], 9.0)
        assert kernels.encode_into(x, codes, absmax, signed)
        assert torch.equal(codes, want[0])
        assert same(absmax, want[1])
        out, again = torch.empty(n, device=DEVICE), torch.empty(n, device=DEVICE)
        assert kernels.decode_into(codes, absmax, signed, out)
        codec.decode(*want, *([n] if width == 4 else []), signed=signed, out=again)
        assert same(out, again)


def test_codes_of_every_threshold_and_its_neighbours_equal_the_twins():
    for signed in (True, False):
        fixed = torch.tensor(blockwise.map_thresholds(signed)[:-1] + blockwise.map_values(signed))
        up, down = (torch.nextafter(fixed, torch.full_like(fixed, end)) for end in (torch.inf, -torch.inf))
        x = torch.cat([fixed, up, down]).clamp(-1.0, 1.0)
        x = torch.nn.functional.pad(x, (0, -x.numel() % 255)).view(-1, 255)
        x = torch.cat([x, torch.ones(len(x), 1)], 1).view(-1).to(DEVICE)  # a 1 in every block keeps the scale at 1
        want = blockwise.encode(x, signed)
        codes, absmax = torch.empty_like(want[0]), torch.empty_like(want[1])
        assert eightbit.encode_into(x, codes, absmax, signed)
        assert torch.equal(codes, want[0])


@pytest.mark.parametrize(
    ("width", "weight", "grad", "key"), [(8, *d) for d in DTYPES] + [(4, *d) for d in (DTYPES[0], DTYPES[3])]
)
def test_adamw_with_few_bits_equals_its_twin(width, weight, grad, key):
    codec = blockwise if width == 8 else fourbit
    step = eightbit.adamw8bit_ if width == 8 else fourbit_kernels.adamw4bit_
    twin = plain.adamw8bit_ if width == 8 else plain.adamw4bit_
    for n in SIZES:
        w = numbers(1, n).to(weight)
        ours, theirs = ([w.clone(), *states(codec, n, True, False)] for _ in range(2))
        for t in range(2):
            g = numbers(t + 2, n, 3.0).to(grad)
            if t == 1 and n == 5000:
                g[700], g[1300] = torch.nan, torch.inf
            assert step(ours[0], g, *ours[1:], **RATES, eps=1e-8, key=key, start=5)
            twin(theirs[0], g, *theirs[1:], **RATES, eps=1e-8, key=key, start=5)
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert same(a, b)
        assert near(ours[0], theirs[0], exact=False)


@pytest.mark.parametrize(
    ("width", "weight", "grad", "key"), [(8, *d) for d in DTYPES] + [(4, *d) for d in (DTYPES[0], DTYPES[3])]
)
def test_lion_with_few_bits_equals_its_twin_bit_for_bit(width, weight, grad, key):
    codec = blockwise if width == 8 else fourbit
    step = eightbit.lion8bit_ if width == 8 else fourbit_kernels.lion4bit_
    twin = plain.lion8bit_ if width == 8 else plain.lion4bit_
    for n in SIZES:
        w = numbers(1, n).to(weight)
        ours, theirs = ([w.clone(), *states(codec, n, True)] for _ in range(2))
        for t in range(2):
            g = numbers(t + 2, n, 3.0).to(grad)
            assert step(ours[0], g, *ours[1:], **RATES, key=key, start=5)
            twin(theirs[0], g, *theirs[1:], **RATES, key=key, start=5)
        for a, b in zip(ours, theirs, strict=True):
            assert same(a, b)


# ---- AdamW with plain moments


@pytest.mark.parametrize(("weight", "grad", "key"), DTYPES)
@pytest.mark.parametrize("moments", [(FP32, None), (BF16, None), (BF16, (3, 4))])
def test_adamw_with_plain_moments_equals_its_twin(moments, weight, grad, key):
    dtype, keys = moments
    for n in (1, 1000, 5000):
        ours, theirs = (
            [numbers(1, n).to(weight), numbers(2, n).to(dtype), numbers(3, n).abs().to(dtype)] for _ in range(2)
        )
        g = numbers(4, n, 2.0).to(grad)
        rates = {**RATES, "eps": 1e-8, "key": key, "keys": keys, "start": 9}
        assert dense.adamw16_(ours[0], g, *ours[1:], **rates)
        plain.adamw16_(theirs[0], g, *theirs[1:], **rates)
        assert same(ours[1], theirs[1])
        assert same(ours[2], theirs[2])
        assert near(ours[0], theirs[0], exact=False)


def test_adamw_on_a_split_weight_equals_its_twin():
    n = 3000
    high, low = split24.split(numbers(1, n))
    ours, theirs = ([high.clone(), numbers(2, n), numbers(3, n).abs(), low.clone()] for _ in range(2))
    g = numbers(4, n, 2.0)
    assert dense.adamw16_(ours[0], g, *ours[1:], **RATES, eps=1e-8)
    plain.adamw16_(theirs[0], g, *theirs[1:], **RATES, eps=1e-8)
    joined = [split24.join(x[0], x[3]) for x in (ours, theirs)]
    assert torch.allclose(*joined, rtol=2**-16, atol=1e-6)
    assert (bits(ours[3]) != bits(theirs[3])).float().mean() < 0.01  # the last of 24 bits, where the root decided it


def test_small_adam_leaves_minus_the_direction_in_the_place_of_the_projected_gradient():
    n = 1000
    r, m, v = numbers(1, n), numbers(2, n), numbers(3, n).abs()
    want_m, want_v = 0.9 * m + 0.1 * r, 0.99 * v + 0.01 * r * r
    want = want_m / (want_v.sqrt() + 1e-8)
    own = {"beta1": 0.9, "beta2": 0.99, "decay": 0.0, "alpha": 1.0, "eps": 1e-8}
    assert dense.adamw16_(r, r, m, v, **own)
    assert torch.allclose(-r, want, rtol=1e-5, atol=1e-6)


def test_rates_on_the_device_equal_rates_as_numbers():
    n = 1000
    ours, theirs = ([numbers(1, n), numbers(2, n), numbers(3, n).abs()] for _ in range(2))
    g, live = numbers(4, n), torch.tensor([0.99, 0.02, 1e-8], device=DEVICE)
    assert dense.adamw16_(ours[0], g, *ours[1:], **RATES, eps=1e-8)
    none = {**RATES, "decay": 0.0, "alpha": 0.0, "eps": 0.0}
    assert dense.adamw16_(theirs[0], g, *theirs[1:], **none, live=live)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- writes


@pytest.mark.parametrize("n", [1, 1000, 5000])
def test_stochastic_write_equals_its_twin_bit_for_bit(n):
    u, start = special(numbers(1, n)), (1 << 32) - n
    ours = numbers(2, n).to(BF16)
    theirs = ours.clone()
    assert dense.write_stochastic_(ours, u, decay=0.9, alpha=0.3, key=77, start=start)
    rounding.write_stochastic_(theirs, u, decay=0.9, alpha=0.3, key=77, start=start)
    assert same(ours, theirs)
    assert not dense.write_stochastic_(ours, u, decay=0.9, alpha=0.3, key=77, start=start + 1) or n == 1


@pytest.mark.parametrize("n", [1, 1000, 5000])
def test_nearest_write_rounds_as_torch_does(n):
    u, w = special(numbers(1, n)), numbers(2, n).to(BF16)
    want = (w.float() * 0.9 - u * 0.3).to(BF16)
    assert dense.write_(w, u, decay=0.9, alpha=0.3)
    assert same(w, want)


@pytest.mark.parametrize("key", [None, 6])
def test_split_write_equals_its_twin_bit_for_bit(key):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=generator).to(torch.int32)
    ties = torch.cat([(patterns & -65536) | last for last in (0x8000, 0x7F80, 0x7FFF, 0x0080, 0x0180)])
    x = torch.cat([patterns, ties]).view(FP32).to(DEVICE)
    ours, theirs = ([torch.zeros(x.numel(), dtype=d, device=DEVICE) for d in (BF16, torch.int8)] for _ in range(2))
    assert dense.write_split_(*ours, x, decay=1.0, alpha=-1.0, key=key, start=7)
    split24.write_split_(*theirs, x, decay=1.0, alpha=-1.0, key=key, start=7)
    assert same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for parts in (ours, theirs):  # corrections that belong to other numbers
        parts[1].copy_(torch.arange(x.numel(), device=DEVICE).remainder(256).sub(128).to(torch.int8))
    assert dense.write_split_(*ours, x, decay=0.9, alpha=0.3, key=key)
    split24.write_split_(*theirs, x, decay=0.9, alpha=0.3, key=key)
    assert same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("factor", [(37, 1), (1, 300), (1, 1), ()])
@pytest.mark.parametrize("grad", [FP32, BF16])
def test_scaled_write_equals_its_twin_bit_for_bit(factor, grad):
    g, phi = numbers(1, 37 * 300).view(37, 300).to(grad), numbers(2, 300).abs()[: max(1, torch.Size(factor).numel())]
    phi = phi.view(factor)
    u = g.float() * (phi * 0.7)
    how = {"decay": 0.99, "alpha": 0.1}
    ours = numbers(3, 37 * 300).view(37, 300).to(BF16)
    theirs = ours.clone()
    assert dense.write_scaled_(ours, g, phi, **how, scale=0.7, key=5, start=11)
    rounding.write_stochastic_(theirs, u, **how, key=5, start=11)
    assert same(ours, theirs)
    ours = numbers(3, 37 * 300).view(37, 300)
    theirs = ours * 0.99 - u * 0.1
    assert dense.write_scaled_(ours, g, phi, **how, scale=0.7)
    assert same(ours, theirs)


# ---- products


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", ["plain", "nearest", "stochastic", "split"])
def test_lift_equals_product_then_write(dtype, form):
    m, n, r = 300, 270, 20
    left, basis = numbers(1, m * r, 1.0).view(m, r).to(dtype), numbers(2, n * r, 1.0).view(n, r).to(dtype)
    exact = numbers(3, m * n).view(m, n)
    how = {"decay": 0.9, "alpha": 0.1}
    u = (left.double() @ basis.double().mT).float() * 0.5
    more = {"stochastic": {"key": 9, "start": 3}, "split": {"low": split24.split(exact)[1]}}.get(form, {})
    w = exact.clone() if form == "plain" else exact.to(BF16)
    exact = split24.join(w, more["low"]) if form == "split" else w.float()
    want = exact * 0.9 - u * 0.1
    assert products.lift_(w, left, basis.mT, **how, scale=0.5, **more)
    got = split24.join(w, more["low"]) if form == "split" else w.float()
    # accumulation in fp32; bf16: half a step, or a whole one where it is rounded at random; 24 bits: their last
    step = {"plain": 0.0, "nearest": 2**-8, "stochastic": 2**-7, "split": 2**-16}[form]
    assert bool(((got - want).abs() <= 5e-6 + step * want.abs()).all())
    if form == "stochastic":  # the same noise as the write of a product that is there already
        theirs = exact.to(BF16)
        rounding.write_stochastic_(theirs, u, **how, key=9, start=3)
        assert (bits(w) != bits(theirs)).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(300, 270, 20), (17, 600, 130), (64, 64, 1)])
def test_projection_and_norms_equal_two_separate_passes(dtype, side, shape):
    m, n, r = shape
    short = m if side == "left" else n
    g = numbers(1, m * n, 1.0).view(m, n).to(dtype)
    basis = numbers(2, short * r, 1.0).view(r, short).mT.to(dtype)
    found = products.project(g, basis, side)
    assert found is not None
    wide, p = g.double(), basis.double()
    want = p.mT @ wide if side == "left" else wide @ p
    assert torch.allclose(found[0].double(), want, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found[1].double(), wide.square().sum(0 if side == "left" else 1), rtol=1e-5, atol=1e-6)


# ---- whole optimizers

METHODS = {
    "adamw": {"storage": {"weight": "stochastic", "moment": "bf16"}},
    "adamw-8bit": {},
    "lion": {"storage": {"moment": "int8", "min_quantized": 0}},
    "galore": {"rank": 8, "storage": {"weight": "stochastic"}},
    "galore-8bit": {"rank": 8, "storage": {"moment": "int8", "min_quantized": 0}},
    "apollo": {"rank": 8, "storage": {"weight": "stochastic"}},
    "apollo-mini": {},
}


def path(key: str, hyper: dict, dtype: torch.dtype) -> list[Tensor]:
    """The weights of a small set of leaves after three steps."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"tall": (96, 64), "wide": (48, 112), "norm": (64,)}
    leaves = {k: torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for k, s in shapes.items()}
    groups = [{"params": [(name, p)], "role": "norm" if p.ndim == 1 else "linear"} for name, p in leaves.items()]
    optimizer = registry.build(key, groups, 1e-2, **hyper)
    for t in range(3):
        for number, p in enumerate(leaves.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + number)).to(DEVICE, dtype)
        optimizer.step()
    return [p.detach().clone() for p in leaves.values()]


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_whole_optimizer_steps_through_the_kernels_to_the_weights_of_the_plain_path(key, dtype, monkeypatch):
    launches = []
    took = dispatch.takes
    monkeypatch.setattr(dispatch, "takes", lambda *a: took(*a) and (launches.append(a) or True))
    ours = path(key, METHODS[key], dtype)
    assert launches
    monkeypatch.setenv("TARE_TRITON", "0")
    monkeypatch.setenv("TARE_NATIVE", "0")
    theirs = path(key, METHODS[key], dtype)
    for a, b in zip(ours, theirs, strict=True):
        if dtype is FP32:
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)
        else:  # equal but for single roundings: torch's own add to bf16 tips one in sixty a step (native kernels: none)
            assert torch.allclose(a.float(), b.float(), rtol=2**-6, atol=1e-3)
            assert (bits(a) != bits(b)).float().mean() < 0.08


def test_the_trial_passes_and_names_what_goes_wrong(monkeypatch):
    assert trial.objection(DEVICE) is None
    monkeypatch.setattr(dense, "write_stochastic_", lambda *a, **k: True)
    assert trial.objection(DEVICE) == "stochastic rounding differs from the plain twin"
    monkeypatch.setattr(dense, "write_stochastic_", lambda *a, **k: 1 / 0)
    assert trial.objection(DEVICE) == "ZeroDivisionError: division by zero"


def test_counterparts_have_the_arguments_of_the_native_entry_points():
    modules = {"native": native, "native_fourbit": native_fourbit, "native16": native16}
    modules |= {"native_directions": native_directions}
    for name, counterpart in dispatch.COUNTERPARTS.items():
        module, function = name.split(".")
        theirs = inspect.signature(getattr(modules[module], function)).parameters
        ours = inspect.signature(dispatch.kernel(counterpart)).parameters
        extra = [ours[k] for k in list(ours)[len(theirs) :]]
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(x.default is not inspect.Parameter.empty for x in extra)


def test_native_entry_points_hand_over(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "kernel", lambda name: lambda *a, **k: bool(seen.append(name)) or True)
    x = numbers(1, 256)
    assert native.decode_into(x.to(torch.uint8), x[:1], True, x)
    assert native.write_stochastic_(x.to(BF16), x, decay=1.0, alpha=1.0, key=1)
    assert seen == ["eightbit.decode_into", "dense.write_stochastic_"]
    assert calls.ready(x)
