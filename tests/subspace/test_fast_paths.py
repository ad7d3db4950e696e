"""Shorter ways to the same numbers: cosines by FFT, R met by a refresh, entries by whole rows, a basis moved by a fused kernel."""

from typing import Any

import pytest
import torch
from reference.stepping import numbers
from torch import Tensor, nn

import tare
from tare.core.lazy import Outside
from tare.kernels import native_norms
from tare.subspace import sparse
from tare.subspace.coordinates import gathered
from tare.subspace.dct import DCTBasis, cosine_products, dct_matrix, order
from tare.subspace.online import OnlineBasis
from tare.subspace.projection import Matrix
from tare.subspace.sparse import sampled

SHAPES = {"tall": (300, 70), "wide": (70, 300), "odd": (41, 33)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Shape = tuple[int, int]


def stepped(key: str, shape: Shape, steps: int = 4, **hyper: Any) -> tuple[Tensor, tare.Optimizer]:
    p = nn.Parameter(numbers("w", shape).float())
    optimizer = tare.create(key, [{"params": [("w", p)], "role": "linear"}], lr=0.01, **hyper)
    for t in range(steps):
        p.grad = numbers("g", shape, t).float()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31, 97, 128, 513])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_cosines_by_fft(size: int, transposed: bool) -> None:
    x, d = numbers("x", (11, size)), dct_matrix(size, torch.float64, "cpu")
    wanted = (x @ (d.T if transposed else d))[:, order(size, transposed)]
    assert sorted(order(size, transposed)) == list(range(size))
    assert (cosine_products(x, transposed) - wanted).abs().max() < 1e-12
    # fp32: nearer to the exact products than fp32 products are to be expected
    low = cosine_products(x.float(), transposed)
    assert (low - wanted).norm() <= 4e-7 * wanted.norm() + 1e-30


@shapes
@pytest.mark.parametrize("transform", ["matmul", "makhoul"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_cosines_are_those_with_the_largest_products_and_r_is_among_them(shape, transform, norm, side) -> None:
    g = numbers("g", shape).float()
    basis = DCTBasis(9, transform=transform, norm=norm)
    chosen, watching = basis.compute(g, side, None, 0), basis.watching()
    assert basis.seen is None
    assert torch.equal(watching.compute(g, side, None, 0), chosen)
    rows = g.double() if side == "right" else g.double().T
    d = dct_matrix(rows.shape[1], torch.float64, "cpu")
    score = (rows @ (d if transform == "matmul" else d.T)).abs().pow(norm).sum(0)
    assert sorted(score.topk(9).indices.tolist()) == chosen.tolist()
    projected = basis.at(chosen, g, side, torch.float32).project(g)
    assert watching.seen is not None
    assert watching.seen.is_contiguous()
    assert torch.allclose(watching.seen, projected, atol=1e-5)


@shapes
@pytest.mark.parametrize("key", ["dct-adamw", "trion"])
def test_a_step_with_the_r_that_was_met_is_the_step_with_its_own(shape: Shape, key: str, monkeypatch) -> None:
    ours, _ = stepped(key, shape, rank=9)
    monkeypatch.setattr(DCTBasis, "watching", lambda self: self)
    theirs, _ = stepped(key, shape, rank=9)
    assert (ours - theirs).abs().max() < 2e-5  # trion keeps its iterates in 16 bits


@shapes
@pytest.mark.parametrize("a", [1.0, 0.25])
def test_entries_by_whole_rows_are_entries_one_by_one(shape: Shape, a: float, monkeypatch) -> None:
    m, n = shape
    g, left, right = numbers("g", shape).float(), numbers("l", (m, 5)).float(), numbers("r", (5, n)).float()
    rest = Outside(g, left, right, a)
    exact = (g.double() - a * left.double() @ right.double()).view(-1)
    monkeypatch.setattr(sparse, "_BLOCK", 7 * n)
    for count in (0, 1, 50, m * n):
        index = torch.arange(0, m * n, max(1, m * n // max(1, count)))[:count].to(torch.int32)
        for dense in (1, 10**9):  # all entries only, and any
            monkeypatch.setattr(sparse, "DENSE", dense)
            found = sampled(rest, index, g)
            assert torch.allclose(found.double(), exact[index.long()], atol=1e-5)


def test_what_is_left_by_rounding_counts_as_zero() -> None:
    left, right = numbers("l", (40, 5)).float(), numbers("r", (5, 30)).float()
    g = left @ right
    index = torch.arange(0, 1200, 2, dtype=torch.int32)
    assert not sampled(Outside(g, left, right), index, g).any()


@shapes
@pytest.mark.parametrize("side", ["left", "right"])
def test_subtracting_in_place_is_what_is_left_outside(shape: Shape, side: Any) -> None:
    g = numbers("g", shape).float()
    p = torch.linalg.qr(numbers("p", (shape[0 if side == "left" else 1], 6)).float()).Q
    at = Matrix(p, side, orthonormal=True)
    r = at.project(g)
    wanted = at.outside(g, r, 0.3).rows(0, shape[0])
    at.subtract_(g, r, 0.3)
    assert torch.allclose(g, wanted, atol=1e-6)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_what_stays_chosen_keeps_its_numbers_in_any_order(dim: int, stack: tuple[int, ...]) -> None:
    old = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:6] for i in range(3)])
    fresh = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(9 + i))[:6] for i in range(3)])
    old, fresh = (x.view(*stack, 6) if stack else x[0] for x in (old.int(), fresh.int()))
    shape = (*stack, 6, 4) if dim == -2 else (*stack, 4, 6)
    x = numbers("x", shape)
    x.flatten()[0] = torch.nan  # what is dropped takes a NaN with it
    found = gathered(old, fresh)(x, "left" if dim == -2 else "right", True)
    for e in range(3 if stack else 1):
        o, f, xs, ys = (t[e] if stack else t for t in (old, fresh, x, found))
        for place, number in enumerate(f.tolist()):
            line = ys.select(dim, place)
            if number in o.tolist():
                assert torch.equal(line, xs.select(dim, o.tolist().index(number)))
            else:
                assert not line.any()


@shapes
@pytest.mark.parametrize("rule", ["adam", "lion"])
def test_a_basis_moved_by_the_fused_kernel_moves_as_written(shape: Shape, rule: str, monkeypatch) -> None:
    ours, one = stepped("online-subspace", shape, rank=6, rule=rule, gap=2)
    monkeypatch.setattr(OnlineBasis, "_fused", lambda *_: False)
    theirs, other = stepped("online-subspace", shape, rank=6, rule=rule, gap=2)
    bases = [next(iter(x.state.values()))["basis"] for x in (one, other)]
    assert (bases[0] - bases[1]).abs().max() < 1e-5
    assert (ours - theirs).abs().max() < (1e-5 if rule == "adam" else 0.05)  # a sign may turn


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_vector_is_projected_on_and_measured_in_one_reading(shape: Shape, dtype, monkeypatch) -> None:
    """apollo-mini, with and without the native pass."""

    def run() -> Tensor:
        p = nn.Parameter(numbers("w", shape).to(dtype))
        optimizer = tare.create("apollo-mini", [{"params": [("w", p)], "role": "linear"}], lr=0.01)
        for t in range(4):
            p.grad = numbers("g", shape, t).mul(2.0**t).to(dtype)
            optimizer.step()
        return p.detach().float()

    ours = run()
    monkeypatch.setattr(native_norms, "project_one", lambda *tensors: False)
    monkeypatch.setattr(native_norms, "squares", lambda *tensors: False)
    theirs = run()
    if dtype == torch.float32:
        assert torch.allclose(ours, theirs, rtol=2e-6, atol=1e-6)  # rounding of sums
    else:  # which may turn the rounding of a weight
        apart = (ours - theirs).abs()
        assert (apart > 0).float().mean() < 0.1
        assert apart.max() <= 2**-7 * theirs.abs().max()
