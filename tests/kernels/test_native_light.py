"""One-pass Lion, Adan, diffGrad and momentum: equal to the twins, element by element; NaN, zeros and odd sizes pass as in them."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tare.kernels import native, native_light, plain_light, split24
from tare.kernels.plain_light import Write

pytestmark = pytest.mark.usefixtures("compiler")
FP32, BF16 = torch.float32, torch.bfloat16
FLOATS = (FP32, BF16)
MAPS = ("none", "sign", "dead-zone", "huber")
ADAN = {"betas": (0.98, 0.92, 0.99), "mix": 0.4, "eps": 1e-8}
DIFFGRAD = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
RULES = {  # entry point, moments, numbers; a moment that is not there is None
    **{f"map {kind}": ("mapped_", 0, {"kind": kind, "width": 0.4}) for kind in MAPS},
    **{f"lion {kind}": ("lion_", 1, {"beta1": 0.9, "beta2": 0.99, "kind": kind, "width": 0.1}) for kind in MAPS},
    "adan first": ("adan_", 4, {**ADAN, "first": True}),
    "adan": ("adan_", 4, {**ADAN, "first": False}),
    "diffgrad": ("diffgrad_", 3, DIFFGRAD),
    "diffgrad alias": ("diffgrad_", 2, DIFFGRAD),
    "momentum": ("momentum_", 1, {"beta": 0.9, "rest": 0.7}),
    "nesterov": ("momentum_", 1, {"beta": 0.9, "rest": 1.0, "nesterov": True}),
}
EXACT = [
    name for name, (entry, _, _) in RULES.items() if entry not in ("adan_", "diffgrad_")
]  # neither root nor exponential


def draw(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def fresh(name: str, n: int, weight: torch.dtype, moment: torch.dtype, split: bool = False) -> list[Tensor | None]:
    """Weight, moments, correction."""
    count = RULES[name][1]
    moments: list[Tensor | None] = [draw(n, 50 + i).abs().to(moment) for i in range(count)]
    missing = [None] if name == "diffgrad alias" else []
    return [draw(n, n).to(weight), *moments, *missing, torch.zeros(n, dtype=torch.int8) if split else None]


def step(module: object, name: str, tensors: list[Tensor | None], g: Tensor, write: Write) -> object:
    entry, count, own = RULES[name]
    if write.key is not None:
        write = replace(write, keys=tuple(range(20, 20 + count)))
    return getattr(module, entry)(tensors[0], g, *tensors[1:], write, **own)


def value(tensors: list[Tensor | None]) -> Tensor:
    weight, low = tensors[0], tensors[-1]
    assert weight is not None
    return weight.float() if low is None else split24.join(weight, low)


@pytest.mark.parametrize(
    ("name", "n"), [*itertools.product(RULES, (3, 601)), *itertools.product(("lion sign", "adan"), (1, 512, 20_003))]
)
@pytest.mark.parametrize(
    ("weight", "moment", "grad", "split"),
    [x for x in itertools.product(FLOATS, FLOATS, FLOATS, (False, True)) if not (x[3] and x[0] == FP32)],
)
def test_it_is_the_twin(name, n, weight, moment, grad, split):
    for write in (
        Write(0.99, 0.01),
        Write(0.99, 0.01, -0.3, key=7, start=(1 << 20) + 3),
        Write(0.0, -1.0, key=7),
        Write(0.0, 0.5, 2.0),
    ):
        ours, theirs = (fresh(name, n, weight, moment, split) for _ in range(2))
        for number in range(2):
            g = draw(n, 100 + number).to(grad)
            assert step(native_light, name, ours, g, write)
            step(plain_light, name, theirs, g, write)
        for a, b in zip(ours[1:-1], theirs[1:-1], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        mine, other = value(ours), value(theirs)
        if name in EXACT:
            assert torch.equal(mine, other)
            continue
        # exponential, root and quotient differ in the last bits, which may decide a rounding
        unit = 2**-24 if weight == FP32 else 2**-16 if split else 2**-8
        # near zero: the rounding was of the weight of a step before, up to half larger
        torch.testing.assert_close(mine, other, rtol=max(2e-6, 2 * unit), atol=max(2e-6, unit / 2))
        assert weight == FP32 or (mine != other).float().mean() < 0.1 or n < 20


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [3, 600])
def test_what_is_not_finite_goes_where_it_goes_in_the_twin(name, bad, at):
    ours, theirs = (fresh(name, 601, FP32, FP32) for _ in range(2))
    g = draw(601, 1)
    g[at] = bad
    assert step(native_light, name, ours, g, Write(0.99, 0.01))
    step(plain_light, name, theirs, g, Write(0.99, 0.01))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=2e-6, atol=1e-7, equal_nan=True)
    weight = ours[0]
    assert weight is not None
    other = torch.arange(601) != at
    assert weight[other].isfinite().all()
    if bad != bad:
        assert weight[at].isnan()
    elif name not in ("map huber", "lion huber"):  # a clip is all that is finite of an infinity
        assert not weight[at].isfinite()


def test_zero_moves_nothing():
    for name in RULES:
        tensors = fresh(name, 40, FP32, FP32)
        for moment in tensors[1:-1]:
            if moment is not None:
                moment.zero_()
        before = value(tensors).clone()
        assert step(native_light, name, tensors, torch.zeros(40), Write(1.0, 0.1))
        assert torch.equal(value(tensors), before), name


@pytest.mark.parametrize("name", RULES)
def test_a_direction_may_take_the_place_of_its_gradient(name):
    """A decay of 0 does not read the weight: U over G is U elsewhere, whatever stood there."""
    g = draw(1_201, 9)
    elsewhere, inside = fresh(name, 1_201, FP32, FP32), fresh(name, 1_201, FP32, FP32)
    elsewhere[0], inside[0] = torch.full((1_201,), torch.nan), g.clone()
    assert step(native_light, name, elsewhere, g, Write())
    assert step(native_light, name, inside, inside[0], Write())
    for a, b in zip(elsewhere, inside, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert value(inside).isfinite().all()


def test_friction_is_a_sigmoid_to_the_last_bits():
    """With beta1 = beta2 = 0, eps far below and a gradient of one, U is sigmoid(|previous - 1|) alone."""
    previous = torch.cat([torch.linspace(0.0, 130.0, 200_001), torch.tensor([1e-30, 1.0 + 2**-23, 1e4, 3e38])])
    g = torch.ones_like(previous)
    u, m, v = (torch.zeros_like(previous) for _ in range(3))
    wanted = torch.sigmoid((previous.double() - 1.0).abs())
    assert native_light.diffgrad_(u, g, m, v, previous.clone(), None, Write(), beta1=0.0, beta2=0.0, eps=1e-38)
    # 1 + exp(-x) is rounded once, and so is the quotient; the exponential's 2e-7 count by its share of at most a half
    assert ((u.double() - wanted) / wanted).abs().max() < 2.0**-23 + 1e-7


def test_rounding_of_weight_and_moment_is_unbiased():
    """Means over 2^14 equal elements, at four standard deviations of a two-point variable."""
    n = 1 << 14
    w, m = (torch.full((n,), x, dtype=BF16) for x in (1.0, 0.5))
    g = torch.full((n,), 0.3)
    write = Write(0.999, 0.01, key=1, keys=(2,))
    assert native_light.lion_(w, g, m, None, write, beta1=0.9, beta2=0.95, kind="none")
    for got, exact in ((w, 0.999 - 0.01 * (0.5 * 0.9 + 0.3 * 0.1)), (m, 0.5 * 0.95 + 0.3 * 0.05)):
        values = got.double().unique()
        assert len(values) == 2
        low, high = values.tolist()
        share = (exact - low) / (high - low)
        sigma = (high - low) * (share * (1 - share) / n) ** 0.5
        assert abs(got.double().mean().item() - exact) < 4 * sigma + abs(exact) * 2**-22  # fp32 before the rounding


def test_thread_count_does_not_change_anything():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = fresh("adan", 50_003, BF16, BF16)
            assert step(native_light, "adan", tensors, draw(50_003, 1), Write(0.99, 0.01, key=3))
            found.append(tensors[:-1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_it_cannot_take_it_leaves():
    numbers = {"beta1": 0.9, "beta2": 0.99}
    w, m, g = draw(8, 1).bfloat16(), torch.zeros(8), torch.ones(8)
    kept = w.clone()
    assert not native_light.lion_(w, g, m.double(), None, Write(), **numbers)
    assert not native_light.lion_(w, g.half(), m, None, Write(), **numbers)
    assert not native_light.lion_(w, g[:4], m, None, Write(), **numbers)
    assert not native_light.lion_(w, torch.ones(16)[::2], m, None, Write(), **numbers)
    assert not native_light.lion_(w, g, m, None, Write(key=1, start=(1 << 32) - 4), **numbers)
    assert not native_light.lion_(w, g, m.bfloat16(), None, Write(keys=(1,), start=(1 << 32) - 4), **numbers)
    assert not native_light.lion_(w.float(), g, m, torch.zeros(8, dtype=torch.int8), Write(), **numbers)
    assert not native_light.diffgrad_(w, g, m, m.bfloat16(), None, None, Write(), **DIFFGRAD)
    assert torch.equal(w, kept)
    assert not m.any()


def test_autograd_notices_the_writes():
    w, m = torch.ones(8), torch.zeros(8)
    versions = w._version, m._version
    assert native_light.momentum_(w, torch.ones(8), m, None, Write(1.0, 0.1), beta=0.9, rest=1.0)
    assert w._version > versions[0]
    assert m._version > versions[1]


def test_on_paper_it_says_that_it_would():
    w, m = torch.ones(8), torch.zeros(8)
    with native.on_paper():
        assert native_light.lion_(w, torch.ones(8), m, None, Write(), beta1=0.9, beta2=0.99)
    assert w.eq(1).all()
