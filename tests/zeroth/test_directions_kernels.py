"""The generator of directions: one definition, and the same bits from the C++ kernel, plain torch and Triton, however the work is cut."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tare.kernels import directions, library, native_directions
from tare.kernels.rounding import MASK, mix32
from tare.zeroth.drawn import write_sum

LAWS = ("gaussian", "signs")
FORMS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float64, False)]
FAR = (1 << 32) - 777  # a piece that begins here crosses 2^32
KEYS = (3, 1 << 63, (1 << 64) - 1)
C = (0.7, -1e-3, 2.0)
CASES = Path(__file__).with_name("directions_triton_cases.py")
PINNED = [1109538870, 2716089128]


@pytest.fixture(scope="module")
def native() -> None:
    if not library.available():
        pytest.skip(library.reason())


def numbers(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def filled(law: directions.Law, key: int, start: int, count: int) -> Tensor:
    """Drawn by the native kernel."""
    z = torch.full((count,), torch.nan)
    assert native_directions.write_(z, [key], [1.0], law=law, decay=0.0, start=start)
    return z


# ---- what the numbers are


def scramble(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def slow(law: str, key: int, number: int) -> float:
    """One element from the definition, in fp64 with the library's functions."""
    base, first, second = directions.words(key, number >> 32)
    low = number & MASK
    if law == "signs":
        word = scramble((mix32((mix32((low // 32 + base) & MASK) + first) & MASK) + second) & MASK)
        return 1.0 - 2.0 * ((word >> (low % 32)) & 1)
    s = mix32((low // 32 * 16 + low % 16 + base) & MASK)
    u = (2 * (mix32((s + first) & MASK) >> 2) + 1) / 2**31
    angle = scramble((s + second) & MASK)
    # the first bit turns by half a circle; the rest is a signed fraction of the right half
    x = ((angle << 1 & MASK) ^ 1 << 31) - (1 << 31)
    theta = math.pi / 2 * x / 2**31 + (math.pi if angle >> 31 else 0.0)
    return math.sqrt(-2 * math.log(u)) * (math.sin(theta) if low % 32 >= 16 else math.cos(theta))


@pytest.mark.parametrize("law", LAWS)
def test_the_numbers_are_those_of_the_definition(law):
    """Polynomials are within 1.2e-6 of the radius (relative), and within 6e-7 of sine and cosine; radii are below 6.6."""
    for key, start in itertools.product(KEYS, (0, 12345, FAR)):
        got = directions.draw(law, key, start, 1000).double()
        want = torch.tensor([slow(law, key, start + i) for i in range(1000)], dtype=torch.float64)
        assert float((got - want).abs().max()) < (0.0 if law == "signs" else 6e-6) + 1e-12


def test_the_stream_is_the_one_that_logs_were_written_with():
    """A log of seeds and scalars is replayed with these bits: they may never change."""
    found = [zlib.crc32(directions.draw(law, 7, 5, 5000).numpy().tobytes()) for law in LAWS]
    assert found == PINNED


def test_extreme_words_give_finite_numbers():
    w = torch.tensor([0, 1, 3, 4, -1, -2, -4, 1 << 30, -(1 << 31), (1 << 31) - 1], dtype=torch.int64).to(torch.int32)
    r = directions._radius(w)
    assert r.isfinite().all()
    assert float(r.max()) == pytest.approx(math.sqrt(62 * math.log(2)), abs=1e-5)
    assert float(r.min()) == 0.0
    z = directions._pairs(torch.arange(16, dtype=torch.int32) * (1 << 28), torch.ones(16))
    assert float((z.square().sum(1) - 1).abs().max()) < 3e-6


# ---- the same bits


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("start", [0, 1, 31, 32, 4097, (1 << 31) - 700, FAR])
@pytest.mark.parametrize("n", [1, 7, 33, 513, 1600])
def test_native_draws_the_twins_bits(native, law, start, n):
    assert torch.equal(bits(filled(law, 9, start, n)), bits(directions.draw(law, 9, start, n)))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("dtype", "split"), FORMS)
@pytest.mark.parametrize("key", [None, 11])
@pytest.mark.parametrize(("decay", "from_other"), [(1.0, False), (0.99, False), (0.99, True), (0.0, False)])
def test_native_writes_the_twins_bits(native, law, dtype, split, key, decay, from_other):
    if split:  # neither another source nor a decay of 0 is taken
        decay, from_other = decay or 0.5, False
    for n, start in ((1, 3), (45, 31), (2000, FAR)):
        ours = numbers(n, dtype)
        low = torch.arange(n).remainder(256).sub(128).to(torch.int8) if split else None
        theirs, rest = ours.clone(), None if low is None else low.clone()
        how = {"law": law, "decay": decay, "alpha": 0.3, "scale": 0.5, "start": start, "key": key}
        source = numbers(n, dtype, 1) if from_other else None
        assert native_directions.write_(ours, KEYS, C, **how, source=source, low=low)
        directions.write_(theirs, KEYS, C, **how, source=source, low=rest)
        assert torch.equal(bits(ours), bits(theirs))
        assert low is None or torch.equal(low, rest)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("dtype", "split"), FORMS)
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.9, 0.0])
def test_only_small_numbers_count(native, law, dtype, split, itself, decay):
    """Native and twin agree, and what is left out keeps its bits: a signed zero too."""
    if split and decay == 0.0:
        return
    for n, start in ((1, 3), (45, 31), (2000, FAR)):
        ours = numbers(n, dtype)
        ours[0], of = -0.0, numbers(n, dtype, 1)
        limit = float(of.float().abs().median())
        of[0], of[n // 2] = math.inf, -math.inf
        if itself:
            ours = of.clone()
        else:
            of[n // 3] = math.nan
        low = torch.zeros(n, dtype=torch.int8) if split else None
        before, theirs, rest = ours.clone(), ours.clone(), None if low is None else low.clone()
        how = {"law": law, "decay": decay, "alpha": -0.3, "start": start, "limit": limit}
        assert native_directions.write_(ours, KEYS, C, **how, low=low, of=ours if itself else of)
        bound = torch.tensor(limit, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        directions.write_(theirs, KEYS, C, **{**how, "limit": bound}, low=rest, of=theirs if itself else of)
        assert torch.equal(bits(ours), bits(theirs))
        out = ~(of.abs() <= limit)
        if decay == 1.0 and not split:
            assert torch.equal(bits(ours)[out], bits(before)[out])
        elif decay == 0.0:
            assert torch.equal(bits(ours)[out], torch.zeros_like(bits(ours)[out]))
        if n == 2000:
            assert not torch.equal(bits(ours)[~out], bits(before)[~out])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [filled, lambda law, *how: directions.draw(law, *how)], ids=["native", "plain"])
def test_any_cut_gives_the_same_bits(native, law, make):
    whole = make(law, 5, FAR - 3, 3000)
    for cuts in ([1, 2, 31, 500], [16, 48], [777, 780, 781], list(range(100, 3000, 100))):
        ends = [0, *cuts, 3000]
        parts = [make(law, 5, FAR - 3 + a, b - a) for a, b in itertools.pairwise(ends)]
        assert torch.equal(bits(torch.cat(parts)), bits(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_change_nothing(native, dtype):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            w = numbers(50_001, dtype)
            assert native_directions.write_(w, KEYS, C, start=17, key=3)
            found.append(w)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (300, 7), (40, 3, 5, 5)])
def test_strides_change_nothing(dtype, shape):
    """Also with pieces (the C++ kernel takes neither strides nor fp16): many rows, and rows longer than a piece."""
    n = math.prod(shape)
    w = numbers(n, dtype).view(shape)
    strided = torch.empty(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1]).copy_(w)
    assert len(shape) < 2 or not strided.is_contiguous()
    write_sum(w, KEYS, C, law="gaussian", decay=0.9, start=5)
    write_sum(strided, KEYS, C, law="gaussian", decay=0.9, start=5)
    assert torch.equal(w, strided)
    theirs = numbers(n, dtype).view(shape)
    directions.write_(theirs, KEYS, C, law="gaussian", decay=0.9, start=5)
    assert torch.equal(w, theirs)


def test_a_strided_leaf_of_many_pieces():
    w = torch.zeros(700, 900).T
    write_sum(w, [4], [1.0], law="gaussian")
    assert torch.equal(w.reshape(-1), directions.draw("gaussian", 4, 0, w.numel()))


def test_a_source_is_left_alone_and_the_target_need_hold_nothing(native):
    source = numbers(100, torch.bfloat16)
    before, target = source.clone(), torch.full_like(source, torch.nan)
    write_sum(target, [1], [0.1], law="gaussian", source=source)
    write_sum(before, [1], [0.1], law="gaussian")
    assert torch.equal(source, numbers(100, torch.bfloat16))
    assert torch.equal(target, before)


def test_no_terms_only_decay():
    for dtype, split in FORMS:
        w = numbers(50, dtype)
        low = torch.zeros(50, dtype=torch.int8) if split else None
        write_sum(w, [], [], law="gaussian", decay=0.5, low=low)
        assert torch.equal(w, numbers(50, dtype) * 0.5)


def test_what_native_cannot_take_it_leaves(native):
    w = numbers(64).half()
    before = w.clone()
    assert not native_directions.write_(w, [1], [1.0])
    assert not native_directions.write_(numbers(64).view(8, 8).T, [1], [1.0])
    assert not native_directions.write_(torch.zeros(0), [1], [1.0])
    low = torch.zeros(64, dtype=torch.int8)
    assert not native_directions.write_(numbers(64), [1], [1.0], low=low)
    assert not native_directions.write_(w.bfloat16(), [1], [1.0], low=low, decay=0.0)
    assert torch.equal(w, before)
    with pytest.raises(ValueError, match="must not be negative"):
        directions.draw("gaussian", 1, -1, 3)
    with pytest.raises(ValueError, match="from 0 below 2"):
        directions.draw("gaussian", 1 << 64, 0, 3)


def test_writes_are_seen_by_autograd(native):
    w = numbers(40)
    version = w._version
    assert native_directions.write_(w, [1], [1.0])
    assert w._version > version


def test_bf16_is_rounded_once_and_without_bias(native):
    """Many small terms: the sum is formed in fp32, and stochastic rounding keeps its mean (four standard deviations of a mean)."""
    n, members = 1 << 16, 20
    w = torch.ones(n, dtype=torch.bfloat16)
    keys, c = list(range(members)), [1e-4] * members
    write_sum(w, keys, c, law="gaussian", key=5)
    exact = torch.zeros(n)
    write_sum(exact, keys, c, law="gaussian")
    error = w.double() - (1.0 + exact.double())
    assert abs(float(error.mean())) < 4 * float(error.std()) / n**0.5
    nearest = torch.ones(n, dtype=torch.bfloat16)
    write_sum(nearest, keys, c, law="gaussian")
    assert torch.equal(nearest, (1.0 + exact).bfloat16())


# ---- Triton


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this platform")
def test_triton_gives_the_same_bits_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TARE_TRITON": "interpret", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    own = ["-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *own, str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2], timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "10 passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this platform")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("dtype", "split"), FORMS[:3])
def test_triton_compiles_for_a_gpu_and_fuses_nothing(law, dtype, split, tmp_path, monkeypatch):
    """A product fused with a sum would change one number in a hundred; the root must be the correctly rounded one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(CASES.parents[1] / "kernels"))
    from triton_ahead import compiling

    from tare.kernels.triton import directions as kernels

    w = torch.zeros(1 << 12, dtype=dtype)
    low = torch.zeros(1 << 12, dtype=torch.int8) if split else None
    with compiling() as done:
        assert kernels.write_(w, KEYS, C, law=law, key=7 if dtype == torch.bfloat16 else None, low=low)
    (built,) = done
    ours = [line for line in built.ptx.splitlines() if "fma" in line]
    assert not ours, ours[:3]
    if law == "gaussian":
        assert "sqrt.rn.f32" in built.ptx
    else:  # a correctly rounded root is itself made of fused operations
        assert not [x for x in built.instructions() if x.startswith("FFMA")]
    assert not [x for x in built.instructions() if x.startswith(("LDL", "STL"))]  # nothing spilled
