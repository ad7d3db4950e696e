"""Weight normalisation (Salimans & Kingma 2016, arXiv 1602.07868) as a wrapper around rules: one steps the direction, one the magnitude.

W = g v / |v| along an axis. GradNormLoRP (Huang et al. 2024, arXiv 2412.19616) runs the direction in a subspace.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice
from tare.core.delta import Delta, Dense
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.storage import Storage
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.kernels import native_norms, plain_norms
from tare.kernels.paper import few
from tare.rules.adam import Adam

_BLOCK = 1 << 18  # elements: rows of W, G and U of this many stay in cache
_OWN = "magnitude_"  # prefix of the state of the magnitude's rule


@dataclass(frozen=True)
class WeightNorm(Transform):
    """Steps v by `direction` and g by `magnitude`, and writes W = g v / |v|.

    grad_g = <G, v / |v|>; grad_v = (g / |v|) (G - grad_g v / |v|); inner product and norm over `axis`.

    v is not kept: v = (|v| / g) W, so g and |v| [m] are enough, and no full copy of W exists (the published code has one).
    A row of W that is zero has no direction: it is stepped as a plain row, and g is its norm afterwards.

    Args:
        direction: the rule of v, for instance a subspace.
        magnitude: the rule of g; also what leaves without such an axis get.
        axis: `row`: every row of W [m, n] has a magnitude (an output feature); `column`: every column.
        form: `paper`, as above. `code`, as published: G itself in place of grad_v, and g is forgotten: at every step it
            starts from |v| again, so that a step of the magnitude lasts until the next one.
    """

    direction: Transform
    magnitude: Transform = field(default_factory=Adam)
    axis: Literal["row", "column"] = "row"
    form: Literal["paper", "code"] = "paper"

    sharding: ClassVar[Sharding] = "matrix"

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return True

    def __post_init__(self) -> None:
        check_choice("axis", self.axis, ("row", "column"))
        check_choice("form", self.form, ("paper", "code"))

    @property
    def _dim(self) -> int:
        return -1 if self.axis == "row" else -2

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        if leaf.matrix is None:
            return self.magnitude, "no matrix: dense"
        if leaf.view[self._dim] == 1:
            return self.magnitude, f"a {self.axis} of one number has no direction: dense"
        inner, why = self.direction.resolve(leaf)
        return (self if inner is self.direction else replace(self, direction=inner)), why

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        lengths = leaf.view[:-1] if self.axis == "row" else (*leaf.view[:-2], leaf.view[-1])
        own = {_OWN + name: spec for name, spec in self.magnitude.spec(self._leaf(leaf, lengths)).items()}
        kept = {"magnitude": StateSpec(lengths, "exact"), "direction_norm": StateSpec(lengths, "exact")}
        return {**self.direction.spec(leaf), **own, **kept}

    @staticmethod
    def _leaf(leaf: Leaf, lengths: tuple[int, ...]) -> Leaf:
        return Leaf(leaf.name, lengths, leaf.dtype, "norm")

    def check(self, leaf: Leaf, storage: Storage) -> None:
        self.direction.check(leaf, storage)

    def describe(self) -> str:
        return f"weight-normalised {self.direction.describe()}"

    def rank_for(self, leaf: Leaf) -> int | None:
        return self.direction.rank_for(leaf)

    # -- the step --------------------------------------------------------------------------------------------------

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        """U = W - W', with the learning rate inside. One full-size temporary: grad_v, then U in its memory."""
        leaf, dtype = step.leaf, step.leaf.compute_dtype
        w, big = _Weight(step), grad.reshape(leaf.view)  # [.., m, n]
        size, slope = self._sums(w, big)  # |W_i| and <G_i, W_i>, [.., m, 1] or [.., 1, n]
        g, norm = state["magnitude"], state["direction_norm"]
        # At first, and after a NaN whose weight was put right since, both are what W says.
        known = torch.isfinite(g + norm) if step.count > 1 else torch.zeros_like(g, dtype=torch.bool)
        g.copy_(torch.where(known, g, size.view_as(g)))
        norm.copy_(torch.where(known, norm, g))
        paper = self.form == "paper"
        dead = size == 0.0
        safe = torch.where(dead, torch.ones_like(size), size)
        g_was = (g if paper else norm).view_as(size).clone()
        sign = torch.where(g.view_as(size) < 0.0, -1.0, 1.0).to(dtype)
        toward = slope * sign / safe  # grad_g
        length = torch.where(norm.view_as(size) == 0.0, torch.ones_like(size), norm.view_as(size))
        lift = torch.where(dead, torch.ones_like(size), g_was / length) if paper else torch.ones_like(size)
        along = slope / safe.square() if paper else torch.zeros_like(size)
        buffer = self._tangent(w, big, lift, lift * along)

        delta = self.direction.update(buffer, state, step)
        rate = 1.0 if delta.scaled else step.lr
        moved = self._moved(toward, state, step).view_as(size)  # lr times the direction of g

        # v = k W; |v - lr U|^2 = |v|^2 (1 + growth), exactly 1 where nothing moves
        k = torch.where(dead, torch.zeros_like(size), norm.view_as(size) * sign / safe)
        cross, square = self._lifted(delta, w, buffer)  # <W_i, U_i>, |U_i|^2; buffer = U
        growth = (rate * rate * square - 2.0 * rate * k * cross) / length.square()
        stretch = growth.add_(1.0).clamp_min_(torch.finfo(dtype).tiny).sqrt_()
        fresh = torch.where(dead, rate * square.sqrt(), norm.view_as(size) * stretch)  # the new |v|
        g_new = torch.where(dead, fresh, g_was - moved)
        f = torch.where(dead, torch.ones_like(size), g_new / torch.where(fresh == 0.0, torch.ones_like(fresh), fresh))
        # W' = f (k W - lr U), and k f = (g_new / g) / stretch up to signs, which is 1 where nothing moves
        keep = torch.where(dead, torch.ones_like(size), g_new * sign / (safe * stretch))
        self._blend(buffer, w, f * rate, 1.0 - keep)

        # Decay comes after the update, on v and g alike: W shrinks by it once.
        shrink = 1.0 - step.lr * float(step.options.get("weight_decay", 0.0))
        g.copy_(g_new.view_as(g)).mul_(shrink)
        norm.copy_(fresh.view_as(norm)).mul_(shrink)
        return Dense(buffer.view(leaf.shape), lr_inside=True)

    def _moved(self, toward: Tensor, state: State, step: Step) -> Tensor:
        """lr times the magnitude's direction, from a view of the state under the magnitude's own names."""
        raw = {name.removeprefix(_OWN): value for name, value in state.raw.items() if name.startswith(_OWN)}
        slots = {name.removeprefix(_OWN): slot for name, slot in state.slots.items() if name.startswith(_OWN)}
        own = State(raw, {name: replace(slot, name=name) for name, slot in slots.items()}, key=state.key + 1)
        lengths = tuple(state["magnitude"].shape)
        inner = replace(step, leaf=self._leaf(step.leaf, lengths))
        delta = self.magnitude.consume(toward.view(lengths), own, inner)
        own.flush()
        return delta.rows(0, lengths[0]) * (1.0 if delta.scaled else step.lr)

    # -- passes over the matrix, by blocks of rows -----------------------------------------------------------------

    def _sums(self, w: "_Weight", big: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of W and inner products of G and W along the axis."""
        along = _Along(self._dim, w)
        for start, stop in w.spans():
            along.add(start, w.rows(start, stop), big[start:stop].to(w.dtype))
        slope, square = along.total()
        return square.sqrt_(), slope

    @staticmethod
    def _tangent(w: "_Weight", big: Tensor, lift: Tensor, along: Tensor) -> Tensor:
        """lift G - along W."""
        out = torch.empty(w.shape, dtype=w.dtype, device=big.device)
        for start, stop in w.spans():
            part = torch.mul(big[start:stop].to(w.dtype), _cut(lift, start, stop), out=out[start:stop])
            part.addcmul_(w.rows(start, stop), _cut(along, start, stop), value=-1.0)
        return out

    def _lifted(self, delta: Delta, w: "_Weight", out: Tensor) -> tuple[Tensor, Tensor]:
        """U into `out`, whose gradient the delta may still read, row by row; <W, U> and |U|^2 along the axis."""
        along = _Along(self._dim, w)
        for start, stop in w.spans():
            part = out[start:stop]
            part.copy_(delta.rows(start, stop).reshape(part.shape))
            along.add(start, part, w.rows(start, stop))
        return along.total()

    @staticmethod
    def _blend(out: Tensor, w: "_Weight", a: Tensor, b: Tensor) -> None:
        """out = a out + b W."""
        for start, stop in w.spans():
            part = out[start:stop].mul_(_cut(a, start, stop))
            part.addcmul_(w.rows(start, stop), _cut(b, start, stop))


class _Weight:
    """W [.., m, n] by blocks of rows in the dtype of the arithmetic, to all the digits that are kept."""

    def __init__(self, step: Step):
        self.shape, self.dtype = step.leaf.view, step.leaf.compute_dtype
        self.width = math.prod(self.shape[1:])
        # A form in groups has no more digits than its tensor shows, and cannot be read from any row on.
        self.kept = step.kept if step.kept is not None and step.kept.align == 1 else None
        self.tensor = step.weight.detach().reshape(self.shape) if self.kept is None else None

    def rows(self, start: int, stop: int) -> Tensor:
        if self.tensor is not None:
            return self.tensor[start:stop].to(self.dtype)
        assert self.kept is not None
        part = self.kept.read(start * self.width, stop * self.width)
        return part.view(stop - start, *self.shape[1:]).to(self.dtype)

    def spans(self) -> Iterator[tuple[int, int]]:
        rows = max(1, _BLOCK // max(1, self.width))
        return ((start, min(start + rows, self.shape[0])) for start in few(range(0, self.shape[0], rows)))


class _Along:
    """<a, b> and |a|^2 along an axis, gathered over blocks of rows: summed where the axis runs down a single matrix."""

    def __init__(self, dim: int, w: _Weight):
        self.dim, self.summed, self.rows = dim, dim == -2 and len(w.shape) == 2, w.shape[0]
        self.whole: tuple[Tensor, Tensor] | None = None  # [m, 1], [1, n] or [E, ..]

    def add(self, start: int, a: Tensor, b: Tensor) -> None:
        parts = _inner(a, b, self.dim)
        if self.whole is None:
            first, second = (x if self.summed else x.new_empty(self.rows, *x.shape[1:]) for x in parts)
            self.whole = first, second
        elif self.summed:
            for total, part in zip(self.whole, parts, strict=True):
                total += part
        if not self.summed:
            for whole, part in zip(self.whole, parts, strict=True):
                whole[start : start + part.shape[0]] = part

    def total(self) -> tuple[Tensor, Tensor]:
        assert self.whole is not None
        return self.whole


def _inner(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if a.ndim == 2 and a.dtype == b.dtype == torch.float32:
        shape = (a.shape[0], 1) if dim == -1 else (1, a.shape[1])
        product, square = a.new_empty(shape), a.new_empty(shape)
        if native_norms.inner(a, b, "rows" if dim == -1 else "columns", product, square):
            return product, square
    return plain_norms.inner(a, b, dim)


def _cut(factor: Tensor, start: int, stop: int) -> Tensor:
    """The part of a factor [m, 1], [1, n] or [E, ..] that belongs to rows start .. stop - 1."""
    return factor[start:stop] if factor.shape[0] > 1 else factor
