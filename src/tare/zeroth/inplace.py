"""Perturbing in place: weights are written, and put back exactly (`ExactInPlace`) or as published codes do (`InPlace`)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.zeroth.bitmasks import pack_bits, unpack_bits
from tare.zeroth.directions import CHUNK, Directed, spans
from tare.zeroth.moved import Memory, Moved
from tare.zeroth.probes import Point

CHUNK_GPU = 1 << 23  # elements moved at once where launches cost more than memory


class InPlace(Memory):
    """Writes weights: from point to point by what differs (+eps, -2 eps), then back (+eps), as princeton-nlp/MeZO does.

    Every pass rounds, in 16 bits scale z and eps (scale z) too, and what comes back is not where it started. rms in one step, weights near
    0.02, eps 1e-3: 8e-5 in bf16, 1e-5 in fp16, 1e-9 in fp32; it grows with the square root of the steps. Only to reproduce.
    """

    name = "in place (drifts)"
    drifts = True

    def __init__(self) -> None:
        self._now: dict[Tensor, Point] = {}

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        self._move(leaves, point)
        yield

    def restore(self, leaves: list[Moved]) -> None:
        self._move(leaves, Point())
        self._now.clear()

    def check(self, leaves: Mapping[str, tuple[Tensor, Directed]]) -> None:
        _refuse_quantized(leaves)
        for name, (_, directed) in leaves.items():
            if directed.law.reads_weight:
                raise InputError(
                    f"memory: 'in-place' would change the weight of {name} that its directions are read from; "
                    "use 'forward' or 'in-place-exact'"
                )

    def _move(self, leaves: list[Moved], point: Point) -> None:
        for leaf in leaves:
            before, after = self._now.get(leaf.parameter, Point()).members, point.members
            differing = {m: after.get(m, 0.0) - before.get(m, 0.0) for m in {**before, **after}}
            step = Point(tuple(differing.items()))
            if step.members:
                rounding = leaf.parameter.dtype.itemsize == 2
                (_write_rounded if rounding else _write)(leaf, step)
            self._now[leaf.parameter] = point


def _write(leaf: Moved, point: Point) -> None:
    leaf.add_(leaf.parameter.detach(), point)


def _write_rounded(leaf: Moved, point: Point) -> None:
    """As the published code in 16 bits: c z is rounded before it is added, and the sum is."""
    weight, law = leaf.parameter.detach(), leaf.directed.law
    flat = weight.view(-1) if weight.is_contiguous() else None
    for draw, scale in leaf.terms(point):
        if flat is None or not law.partial:
            whole = law.draw(draw, leaf.state, weight).view(weight.shape)
            weight.add_(whole.to(weight.dtype).mul(scale))
            continue
        for start, stop in spans(flat.numel()):
            z = law.draw(draw, leaf.state, weight, start, stop).to(flat.dtype)
            flat[start:stop].add_(z.mul(scale))


class ExactInPlace(Memory):
    """Writes theta + point, and takes it back bit for bit: from the same weights the same losses as `InForward`, to the last bit.

    A sum does not round back to where it started only where it left the range of its power of two, so little has to be remembered: see
    `Displacement`. Four passes of writing for a two-sided step instead of three.
    """

    name = "in place, put back exactly"

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        with ExitStack() as stack:
            if point.members:
                for leaf in leaves:
                    displacement = Displacement(leaf, point)
                    stack.callback(displacement.undo)
                    displacement.do()
            yield

    def check(self, leaves: Mapping[str, tuple[Tensor, Directed]]) -> None:
        _refuse_quantized(leaves)


class Displacement:
    """One leaf moved in place by its perturbation at `point`, and what putting it back needs.

    fl(fl(w + v) - v) = w unless the sum rounds more coarsely than w did, or lay between two numbers: 5 to 7 % of weights of rms 0.02 at
    eps 1e-3, 23 % at 0.01. One bit an element says where, and only there is w kept: 11 % of a leaf at eps 1e-3, 29 % at 0.01, and
    never more than 1/16 above a copy. Where directions are read from the weight, or cannot be drawn in parts of a weight that is not
    contiguous, a copy is kept.
    """

    def __init__(self, leaf: Moved, point: Point):
        self.leaf, self.point = leaf, point
        self._weight = leaf.parameter.detach()
        self._copy: Tensor | None = None
        self._kept: list[tuple[int, int, Tensor, Tensor]] = []  # start, stop, where, what

    @property
    def bytes(self) -> int:
        """Held while the leaf stands away from theta."""
        held = [t for _, _, *pair in self._kept for t in pair] + ([] if self._copy is None else [self._copy])
        return sum(t.numel() * t.element_size() for t in held)

    def do(self) -> None:
        leaf, point, weight = self.leaf, self.point, self._weight
        if leaf.directed.law.reads_weight or not weight.is_contiguous():
            copy = weight.clone()
            self._copy = copy
            leaf.add_(weight, point, weight=copy)
            return
        flat = weight.view(-1)
        for start, stop in spans(flat.numel(), self._chunk()):
            before = flat[start:stop]
            after = before.clone()
            leaf.add_(after, point, start=start)
            back = after.clone()
            leaf.add_(back, point, -1.0, start=start)
            lost = _bits(back) != _bits(before)
            self._kept.append((start, stop, pack_bits(lost), before[lost]))
            before.copy_(after)

    def undo(self) -> None:
        if self._copy is not None:
            self._weight.copy_(self._copy)
            self._copy = None
        flat = self._weight.view(-1) if self._kept else self._weight
        while self._kept:
            start, stop, where, what = self._kept.pop()
            part = flat[start:stop]
            self.leaf.add_(part, self.point, -1.0, start=start)
            part[unpack_bits(where, stop - start)] = what

    def _chunk(self) -> int:
        if not self.leaf.directed.law.partial:
            return max(1, self._weight.numel())
        return CHUNK if self._weight.device.type == "cpu" else CHUNK_GPU


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """As whole numbers: NaN equals itself, and -0 is not 0."""
    return x.view(_WORDS[x.element_size()])


def _refuse_quantized(leaves: Mapping[str, tuple[Tensor, Directed]]) -> None:
    for name, (p, _) in leaves.items():
        if isinstance(p, Int8Weight):
            raise InputError(
                f"memory: {name} is int8 and cannot be perturbed in place, its codes are too coarse; "
                "give the model itself as params, and memory 'forward' or 'auto'"
            )
