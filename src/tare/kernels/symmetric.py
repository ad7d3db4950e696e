"""Products that are known to be symmetric: only what lies on and below the diagonal is computed, by panels of rows, and then mirrored.

Three eighths of the arithmetic are saved at four panels. X X^T is symmetric; so are products of symmetric matrices that commute, such as
polynomials of one matrix: what is computed is one triangle of the product as it would be, and its mirror image.
"""

import torch
from torch import Tensor

from tare.kernels import native_norms, plain_norms
from tare.kernels.paper import few

PANEL = 128  # rows; narrower ones lose in the library what they save
LEAST = 256  # rows below which nothing is gained


def panels(side: int, device: torch.device) -> list[tuple[int, int]]:
    """(first, last) row of each panel; a single one where panels do not pay: for small matrices, and on a GPU."""
    if side < LEAST or device.type != "cpu":
        return [(0, side)]
    return [(start, min(start + PANEL, side)) for start in few(range(0, side, PANEL))]


def lower(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """out <- beta out + alpha a b for a [s, k], b [k, s], on and below the diagonal; above it there is anything. No temporaries."""
    for start, stop in panels(out.shape[0], out.device):
        out[start:stop, :stop].addmm_(a[start:stop], b[:, :stop], beta=beta, alpha=alpha)
    return out


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T of x [s, l]."""
    out = x.new_empty(x.shape[0], x.shape[0]) if out is None else out
    return mirror_(lower(x, x.mT, out))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, symmetric, into `out`, which is neither."""
    return mirror_(lower(a, b, out))


def polynomial(a: Tensor, first: float, second: float, out: Tensor) -> Tensor:
    """first A + second A^2 of a symmetric A, into `out`, which is not A."""
    for start, stop in panels(a.shape[0], a.device):
        torch.addmm(
            a[start:stop, :stop], a[start:stop], a[:, :stop], beta=first, alpha=second, out=out[start:stop, :stop]
        )
    return mirror_(out)


def multiply_(b: Tensor, a: Tensor) -> Tensor:
    """b <- a b, symmetric, in place: a block of columns reads only itself, so that one of them is all there is of temporaries."""
    for start, stop in panels(b.shape[0], b.device):
        b[start:, start:stop] = a[start:] @ b[:, start:stop]
    return mirror_(b)


def mirror_(square: Tensor) -> Tensor:
    """What `lower` left out."""
    if len(panels(square.shape[0], square.device)) > 1 and not native_norms.mirror_(square):
        plain_norms.mirror_(square, PANEL)
    return square
