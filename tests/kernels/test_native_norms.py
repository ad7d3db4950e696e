"""Native passes over a matrix, and products that are known to be symmetric: what the plain operations give, in float64."""

import pytest
import torch

from tare.core.tensors import column_norms
from tare.kernels import native_norms, plain_norms, symmetric

pytestmark = pytest.mark.usefixtures("compiler")
SHAPES = [(1, 1), (3, 5), (17, 33), (16, 64), (512, 130), (130, 512), (2000, 7), (7, 2000)]
FLOATS = [torch.float32, torch.bfloat16]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """Relative to the whole: sums of a few thousand fp32 products in some order."""
    return bool((a.double() - b).norm() <= tolerance * b.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norms_and_the_projection_on_a_vector(shape, dtype):
    x = numbers(*shape).to(dtype)
    for side, lines, short, long in (("left", "columns", *shape), ("right", "rows", *reversed(shape))):
        p, r, squares, alone = numbers(short), *(torch.full((long,), torch.nan) for _ in range(3))
        assert native_norms.squares(x, lines, alone)
        assert native_norms.project_one(x, p, side, r, squares)
        wanted = plain_norms.project_one(x.double(), p.double(), side)
        assert close(r, wanted[0], 2e-6)
        assert torch.allclose(squares.double(), wanted[1], rtol=2e-6)
        assert torch.allclose(alone.double(), wanted[1], rtol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_of_lines(shape):
    a, b = numbers(*shape), numbers(*shape[::-1]).mT.contiguous()
    for lines, dim, size in (("rows", -1, shape[0]), ("columns", -2, shape[1])):
        product, square = (torch.full((size,), torch.nan) for _ in range(2))
        assert native_norms.inner(a, b, lines, product, square)
        wanted = plain_norms.inner(a.double(), b.double(), dim)
        assert close(product, wanted[0].view(-1), 2e-6)
        assert torch.allclose(square.double(), wanted[1].view(-1), rtol=2e-6)


@pytest.mark.parametrize("dim", [0, -2, -1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_of_lines_are_those_of_the_plain_twin(dim, dtype, monkeypatch):
    x = numbers(60, 70).to(dtype)
    found = column_norms(x, dim, torch.float32)
    experts = column_norms(x.view(3, 20, 70), -2, torch.float32)
    monkeypatch.setattr(native_norms, "squares", lambda *tensors: False)
    assert torch.allclose(found, column_norms(x, dim, torch.float32), rtol=1e-6)
    assert torch.allclose(found, torch.linalg.vector_norm(x.float(), dim=dim, keepdim=True), rtol=1e-6)
    assert torch.allclose(experts, torch.linalg.vector_norm(x.float().view(3, 20, 70), dim=-2, keepdim=True), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-38, 1e-44, 1e30])
@pytest.mark.parametrize("iterations", [1, 5])
def test_sinkhorn_is_the_twins_at_every_scale(shape, scale, iterations):
    x = numbers(*shape) * scale
    out, wanted = torch.empty(shape), torch.empty(shape, dtype=torch.float64)
    assert native_norms.sinkhorn(x, iterations, out)
    plain_norms.sinkhorn(x.double(), iterations, wanted)
    assert close(out, wanted)


def test_sinkhorn_keeps_zeros_and_shows_what_is_not_finite():
    x, out = numbers(20, 30), torch.empty(20, 30)
    x[3], x[:, 4] = 0.0, 0.0
    assert native_norms.sinkhorn(x, 5, out)
    assert not out[3].any()
    assert not out[:, 4].any()
    assert out.isfinite().all()
    for bad in (torch.nan, torch.inf):
        x[0, 0] = bad
        for scaling in (native_norms.sinkhorn, plain_norms.sinkhorn):
            scaling(x, 5, out)
            assert out.isnan().all()
    assert native_norms.sinkhorn(torch.zeros(4, 5), 3, out[:1, :20].view(4, 5))
    assert not out[0, :20].any()


def test_no_bit_depends_on_the_number_of_threads():
    x, before = numbers(700, 300), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, r, squares = torch.empty(700, 300), torch.empty(300), torch.empty(300)
            assert native_norms.sinkhorn(x, 3, out)
            assert native_norms.project_one(x, numbers(700), "left", r, squares)
            found.append(torch.cat([out.view(-1), r, squares]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("side", [1, 5, 31, 255, 256, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_products(side, dtype):
    """Of matrices that commute; in fp64 without the native mirror."""
    x = numbers(side, side + 40).to(dtype)
    x /= torch.linalg.matrix_norm(x.double(), 2)
    gram = symmetric.gram(x)
    assert close(gram, gram.mT.double())
    a = x.double() @ x.double().mT
    assert close(gram, a)
    cube = a @ a @ a
    square = symmetric.product(gram, gram, torch.empty_like(gram))
    assert close(square, a @ a, 3e-6)
    assert close(symmetric.polynomial(gram, -2.0, 0.5, torch.empty_like(gram)), 0.5 * a @ a - 2.0 * a, 3e-6)
    assert symmetric.multiply_(square, gram) is square
    assert close(square, cube, 3e-6)
    assert close(square, square.mT.double())
    sums = symmetric.lower(x[:, :10], x[:, :10].mT, gram.clone(), beta=1.0)
    assert close(symmetric.mirror_(sums), a + x[:, :10].double() @ x[:, :10].double().mT)


def test_it_refuses_what_it_cannot_do():
    x = numbers(6, 6)
    kept = x.clone()
    assert not native_norms.mirror_(x.double())
    assert not native_norms.mirror_(x[:, :5])
    assert not native_norms.sinkhorn(x.mT, 3, torch.empty(6, 6))
    assert not native_norms.squares(x, "rows", torch.empty(5))
    assert not native_norms.project_one(x, numbers(5), "left", torch.empty(6), torch.empty(6))
    assert torch.equal(x, kept)
