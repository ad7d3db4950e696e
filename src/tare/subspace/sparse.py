"""Sparse residual (GaLore+, Liao et al. 2024, arXiv 2412.19820): exact Adam on the few entries where the subspace misses most."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_number
from tare.core.delta import Delta, Sum
from tare.core.errors import InputError
from tare.core.lazy import Outside, Picked, take
from tare.core.leaf import Leaf
from tare.core.tensors import is_fake
from tare.core.transform import StateSpec
from tare.kernels.paper import few
from tare.subspace.residual import Parts, Residual

_BLOCK = 1 << 18  # products formed at once
DENSE = 256  # from one entry in so many on, products of whole rows are less work than inner products of entries


@dataclass(frozen=True)
class SparseResidual(Residual):
    """On Omega, the entries where |G - lift(R)| was largest at the first usable step, element-wise Adam on G - lift(R) is
    added to the lifted update, times the same alpha.

    density: |Omega| / (m n). betas, eps: of that Adam; eps after bias correction.
    # differs from the paper, which chooses Omega after a window with full-size statistics: that window would need the
    # memory which the method saves.
    """

    density: float = 0.012
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if check_number("density", self.density) > 1.0:
            raise InputError(f"density: {self.density!r} is more than everything; a share in (0, 1] is expected")
        check_betas(self.betas)
        check_number("eps", self.eps)

    def count(self, leaf: Leaf) -> int:
        return min(leaf.numel, max(1, int(self.density * leaf.numel)))

    def check(self, leaf: Leaf, channels: bool) -> None:
        if leaf.numel >= 2**31:
            raise InputError(f"residual: {leaf.name} has {leaf.numel:,} entries, more than int32 can number")

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        k = (self.count(leaf),)
        return {
            "sparse_index": StateSpec(k, "exact", dtype=torch.int32),
            "sparse_exp_avg": StateSpec(k),
            "sparse_exp_avg_sq": StateSpec(k, signed=False),
            "sparse_steps": StateSpec((), "count"),  # 0 until Omega is chosen
        }

    def update(self, parts: Parts, lifted: Callable[[], Delta]) -> Delta:
        state, rest = parts.state, parts.at.outside(parts.g, parts.projected, 1.0)
        if state["sparse_steps"] == 0:
            whole = rest.rows(0, parts.g.shape[0]).reshape(-1)
            k = state["sparse_index"].numel()
            state["sparse_index"] = torch.topk(whole.abs(), k).indices.sort().values.to(torch.int32)
            if not state["refreshed"]:  # no usable gradient yet: nothing to choose from
                return lifted()
        index = state["sparse_index"]
        r = sampled(rest, index, parts.g)
        state["sparse_steps"] += 1
        t, (b1, b2) = state["sparse_steps"], self.betas
        m, v = state["sparse_exp_avg"], state["sparse_exp_avg_sq"]
        m.mul_(b1).add_(r, alpha=1.0 - b1)
        v.mul_(b2).addcmul_(r, r, value=1.0 - b2)
        u = m / (v.sqrt() / math.sqrt(1.0 - b2**t) + self.eps) / (1.0 - b1**t)
        scale = parts.alpha * (parts.lr if parts.direction.lr_inside else 1.0)
        return Sum((lifted(), Picked(u, index, 0, tuple(parts.g.shape), scale)))


def sampled(rest: Delta, index: Tensor, g: Tensor) -> Tensor:
    """Entries of G - a lift(R) by number, ascending, without forming the rest of it, or no more than some rows at a time.

    Differences at the level of rounding count as zero: Adam would enlarge them to full size.
    """
    if not isinstance(rest, Outside) or g.ndim == 3:
        whole = take(rest.rows(0, g.shape[0]), index, 0)
        return _cleaned(whole, take(g, index, 0).to(whole.dtype))
    found = rest.left.new_empty(index.numel())
    if index.numel() * DENSE >= g.numel():
        _by_rows(rest, index, g, found)
    else:
        _by_entries(rest, index, g, found)
    return found


def _by_entries(rest: Outside, index: Tensor, g: Tensor, found: Tensor) -> None:
    """An inner product for each entry."""
    n = g.shape[-1]
    size = max(1, _BLOCK // rest.right.shape[0])
    for start in few(range(0, index.numel(), size)):
        part = index[start : start + size].long()
        i, j = part // n, part % n
        inside = (rest.left[i] * rest.right[:, j].mT.to(rest.left.dtype)).sum(-1)
        entries = g[i, j].to(inside.dtype)
        found[start : start + size] = _cleaned(entries - rest.a * inside, entries)


def _by_rows(rest: Outside, index: Tensor, g: Tensor, found: Tensor) -> None:
    """Whole rows of the rest, of which the entries are taken: a product is fast enough to waste most of it."""
    m, n = g.shape
    height = max(1, _BLOCK // n)
    starts = list(range(0, m, height))
    if is_fake(index):
        share = -(-len(found) // len(starts))
        bounds = [min(len(found), share * number) for number in range(len(starts))]
    else:
        edges = torch.tensor(starts, dtype=index.dtype, device=index.device).mul_(n)
        bounds = torch.searchsorted(index, edges).tolist()
    spans = list(zip(starts, bounds, [*bounds[1:], len(found)], strict=True))
    for start, first, last in few(spans):
        part = index[first:last].long() - start * n
        block = rest.rows(start, start + height).view(-1).index_select(0, part)
        entries = g[start : start + height].reshape(-1).index_select(0, part)
        found[first:last] = _cleaned(block, entries.to(block.dtype))


def _cleaned(rest: Tensor, of: Tensor) -> Tensor:
    return rest.masked_fill_(rest.abs() <= 32 * torch.finfo(rest.dtype).eps * of.abs(), 0.0)
