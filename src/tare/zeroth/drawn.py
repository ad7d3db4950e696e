"""Drawn: sums of random directions that go where they are used, element by element, and are never stored.

Which elements are drawn at once, on how many threads, how a leaf is cut, and the strides of what is written change no bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tare.core.delta import Delta
from tare.core.transform import Work
from tare.core.write import write
from tare.kernels import directions, native_directions
from tare.kernels.blockwise import chunk_elements
from tare.kernels.paper import few

if TYPE_CHECKING:
    from tare.zeroth.directions import Draw
    from tare.zeroth.moved import Moved

CHUNK = 1 << 18  # elements drawn at once on the CPU by laws that can draw a part


def write_sum(
    weight: Tensor, keys: Sequence[int], coefficients: Sequence[float], *, law: directions.Law, decay: float = 1.0,
    alpha: float = -1.0, scale: float = 1.0, start: int = 0, source: Tensor | None = None, of: Tensor | None = None,
    limit: float | Tensor = math.inf, **rounding: Any,
) -> None:  # fmt: skip
    """W <- decay W - alpha scale sum_k c_k z_k; as it stands W <- W + sum_k c_k z_k. See `kernels.directions.write_`.

    weight, source: floating, of any strides; elements are counted row-major. rounding: `key` and `low` of contiguous bf16 weights.
    of: [numel]; the sum counts only where |of| <= limit.
    """
    how = {"law": law, "decay": decay, "alpha": alpha, "scale": scale, "of": of, "limit": limit, **rounding}
    contiguous = weight.is_contiguous() and (source is None or source.is_contiguous())
    if contiguous and native_directions.write_(weight, keys, coefficients, start=start, source=source, **how):
        return
    if rounding.get("key") is not None or rounding.get("low") is not None:
        directions.write_(weight, keys, coefficients, start=start, source=source, **how)
        return
    stepped = weight if source is None else source
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for first, target, old in few(_pieces(weight, stepped)):
        total = torch.empty(target.shape, dtype=dtype, device=weight.device)
        if not native_directions.write_(total, keys, coefficients, law=law, decay=0.0, start=start + first):
            directions.write_(total, keys, coefficients, law=law, decay=0.0, start=start + first)
        if of is not None:
            mine, zero = of[first : first + total.numel()].view(total.shape), directions.nothing(decay, alpha * scale)
            directions.sieve_(total, mine, limit, zero)
        total.mul_(scale).mul_(alpha)
        target.copy_(total.neg_() if decay == 0.0 else old.to(dtype, copy=True).mul_(decay).sub_(total))


def _pieces(weight: Tensor, source: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the first element, part of the weight, part of the source): runs of elements, or of rows where strides forbid it."""
    if not weight.ndim or (weight.is_contiguous() and source.is_contiguous()):
        weight, source = weight.view(-1), source.view(-1)
    width = math.prod(weight.shape[1:])
    rows = max(1, chunk_elements(weight.device) // max(1, width))
    for first in range(0, weight.shape[0], rows):
        yield first * width, weight[first : first + rows], source[first : first + rows]


@dataclass
class Drawn(Delta):
    """U = scale sum of coefficient z over `parts`, whose law writes such sums in one pass (`Law.fuses`).

    shape: in which the rows of U are counted, the leaf's or its matrix.
    """

    leaf: "Moved"
    parts: Sequence[tuple["Draw", float]]
    shape: tuple[int, ...]
    scale: float = 1.0

    def write(self, weight: Tensor, alpha: float, beta: float) -> None:
        self._write(weight, alpha, beta)

    def fused(self, weight: Tensor, alpha: float, beta: float, **rounding: Any) -> bool:
        self._write(weight, alpha, beta, **rounding)
        return True

    def _write(self, weight: Tensor, alpha: float, beta: float, *, start: int = 0, **how: Any) -> None:
        if how.get("key") is not None and self.leaf.start:
            how["key"] = int(how["key"])  # shifted to the piece, as `start` is
        how["start"] = self.leaf.start + start
        leaf = self.leaf
        law, whole = leaf.directed.law, leaf.parameter.detach()
        law.write_(weight, self.parts, leaf.state, whole, decay=beta, alpha=alpha, scale=self.scale, **how)

    def rows(self, start: int, stop: int) -> Tensor:
        width, known = math.prod(self.shape[1:]), self.shape[0] if self.shape else 1
        stop = min(stop, known)
        leaf, weight = self.leaf.draw(0).leaf, self.leaf.parameter
        u = torch.empty((stop - start, *self.shape[1:]), dtype=leaf.compute_dtype, device=weight.device)
        law, first = self.leaf.directed.law, self.leaf.start + start * width
        law.write_(
            u, self.parts, self.leaf.state, weight.detach(), decay=0.0, alpha=-1.0, scale=self.scale, start=first
        )
        return u if self.shape else u.view(())


def step_in_one_pass(work: Work, leaf: "Moved", parts: Sequence[tuple["Draw", float]], scale: float) -> None:
    """W <- beta W - alpha U with U = scale sum of coefficient z, for a rule that does no more (`Transform.proportional`).

    No gradient is formed. Rounded are every product and the sum, while a dense gradient is added with one rounding for product and sum:
    the two differ by that. Where a weight is kept in a form of its own (stochastic, split24, master, int8) they are the same bits.
    """
    own = work.step.leaf
    shape = own.view if own.matrix is not None and work.weight.is_contiguous() else own.shape
    write(shape, Drawn(leaf, parts, shape, -scale if work.maximize else scale), work, 0)
