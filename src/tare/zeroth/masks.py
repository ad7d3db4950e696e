"""Masked: directions that are zero where a weight is large (Sparse-MeZO, arXiv 2402.15751). The mask is found again, not stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.int8_weight import Int8Weight
from tare.core.leaf import Leaf
from tare.core.random import bits, make_key
from tare.core.recipe import Match, matches
from tare.core.state import State
from tare.core.tensors import is_fake
from tare.core.transform import StateSpec
from tare.zeroth.bitmasks import pack_bits, packed_numel, unpack_bits
from tare.zeroth.directions import Draw, Elementwise, spans
from tare.zeroth.drawn import write_sum
from tare.zeroth.wrapped import Wrapped

Mask = Literal["dynamic", "constant", "random"]
THRESHOLD, BITS, READY = "mask_threshold", "mask_bits", "mask_ready"


@dataclass(frozen=True)
class Masked(Wrapped):
    """m z, m_i = 1 where |theta_i| <= h: V = d + 2 of the d elements that are kept, on m g (Gaussian).

    h is the magnitude below which a share of 1 - sparsity of the leaf lies, halfway to the next one; found once, before the first step.
    Elements that the mask leaves out are not perturbed and not stepped: they keep their bits, in stochastic rounding too. Weight decay and
    rules with moments move them all the same; int8 weights are encoded anew by groups.

    Args:
        law: of z.
        sparsity: share of elements left out, in [0, 1). 0 is `law` itself, bit for bit.
        mask: `dynamic`: membership follows the unperturbed weights, h stays, 4 bytes a leaf. `constant`: as it was at the first step, one
            bit an element. `random`: each element by itself, from the seed and its number, and nothing is kept (the paper's control).
        leaves: which leaves have a mask; the others follow `law`.
        thresholds: h of leaves by their names, in place of what would be found.

    >>> leaf = Leaf("w", (10, 10), torch.float32, "linear")
    >>> from tare.zeroth.directions import Gaussian
    >>> Masked(Gaussian(), 0.75).factor(leaf), Masked(Gaussian(), 0.75).describe()
    (27.0, 'gaussian on the 25% smallest')
    """

    sparsity: float = 0.75
    mask: Mask = "dynamic"
    leaves: Match = "*"
    thresholds: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity, 0.0, inclusive=True, below=1.0)
        check_choice("mask", self.mask, ("dynamic", "constant", "random"))
        for name, value in (self.thresholds or {}).items():
            check_number(f"threshold of {name}", value, 0.0, inclusive=True)

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.law.reads_weight or (self.sparsity > 0.0 and self.mask == "dynamic")

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        return self.law.fuses and (self.sparsity == 0.0 or self._sieves)

    @property
    def _sieves(self) -> bool:
        """Whether one pass can draw, compare with the threshold, and write."""
        return self.mask == "dynamic" and isinstance(self.law, Elementwise)

    def masks(self, leaf: Leaf) -> bool:
        """Whether anything of a leaf is left out."""
        return (
            self.sparsity > 0.0
            and matches(self.leaves, leaf)
            and (self.mask == "random" or self.kept(leaf) < leaf.numel)
        )

    def kept(self, leaf: Leaf) -> int:
        """Elements that the mask keeps at the first step; at least one."""
        return max(1, round((1.0 - self.sparsity) * leaf.numel))

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        own = self.law.spec(leaf)
        if self.mask == "random" or not self.masks(leaf):
            return own
        own[READY] = StateSpec((), "count")
        if self.mask == "dynamic":
            return {**own, THRESHOLD: StateSpec((), "exact")}
        return {**own, BITS: StateSpec((packed_numel(leaf.numel),), "exact", dtype=torch.uint8)}

    def prepare(self, draw: Draw, state: State, weight: Tensor) -> None:
        self.law.prepare(draw, state, weight)
        if READY not in state or state[READY] or is_fake(weight):
            return
        given = (self.thresholds or {}).get(draw.leaf.name)
        reader = Reader(weight)
        h = threshold(reader, self.kept(draw.leaf)) if given is None else given
        if self.mask == "dynamic":
            state[THRESHOLD] = torch.as_tensor(h, dtype=draw.leaf.compute_dtype)
        else:
            for start, stop in spans(weight.numel()):
                state[BITS][start // 8 : packed_numel(stop)] = pack_bits(reader(start, stop).double().abs() <= h)
        state[READY] = 1

    def member(self, draw: Draw, state: State, weight: Tensor, start: int, stop: int) -> Tensor:
        """Which of the elements from `start` to `stop` the mask keeps; [stop - start] bool."""
        if self.mask == "random":
            key = make_key(draw.seed, f"{draw.name}/mask")
            return bits(key, start, stop - start, weight.device) >= round(self.sparsity * 2**32)
        if self.mask == "constant":
            first = start // 8
            return unpack_bits(state[BITS][first : packed_numel(stop)], stop - 8 * first)[start - 8 * first :]
        h = state[THRESHOLD]
        return Reader(weight)(start, stop).to(h.dtype).abs() <= h

    # -- the direction -------------------------------------------------------------------------------------------------

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = draw.leaf.numel if stop is None else stop
        z = self.law.draw(draw, state, weight, start, stop)
        if not self.masks(draw.leaf):
            return z
        return torch.where(self.member(draw, state, weight, start, stop), z, z.new_zeros(()))

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        self.gather_(target, [(draw, scale)], state, weight, start)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        if not terms or not self.masks(terms[0][0].leaf):
            self.law.gather_(target, terms, state, weight, start)
            return
        if self._sieves and not isinstance(weight, Int8Weight):
            write_sum(target, **self._sieve(terms, state, weight, start, target.numel()))
            return
        draw = terms[0][0]
        if not self.partial or not target.is_contiguous():
            before = target.clone()
            self.law.gather_(target, terms, state, weight, start)
            kept = self.member(draw, state, weight, start, start + target.numel()).view(target.shape)
            target.copy_(torch.where(kept, target, before))
            return
        flat = target.view(-1)
        for first, last in spans(
            flat.numel()
        ):  # by what the law itself adds, so that what is kept has the bits it would have
            part = flat[first:last]
            before = part.clone()
            kept = self.member(draw, state, weight, start + first, start + last)
            self.law.gather_(part, terms, state, weight, start + first)
            part.copy_(torch.where(kept, part, before))

    def moved(self, source: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor) -> Tensor:
        if not terms or not self.masks(terms[0][0].leaf):
            return self.law.moved(source, terms, state, weight)
        if not self._sieves or isinstance(weight, Int8Weight):
            return super().moved(source, terms, state, weight)
        target = torch.empty_like(source)
        write_sum(target, **self._sieve(terms, state, weight, 0, target.numel()), source=source)
        return target

    def write_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, *, start: int = 0, **how: Any
    ) -> None:  # fmt: skip
        if not terms or not self.masks(terms[0][0].leaf):
            self.law.write_(target, terms, state, weight, start=start, **how)
        elif isinstance(weight, Int8Weight):
            assert how["decay"] == 0.0, "codes are written by groups, from what is drawn for them"
            self.law.write_(target, terms, state, weight, start=start, **how)
            kept = self.member(terms[0][0], state, weight, start, start + target.numel())
            target.masked_fill_(kept.logical_not_().view(target.shape), 0.0)
        else:
            write_sum(target, **self._sieve(terms, state, weight, start, target.numel()), **how)

    def _sieve(
        self, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int, count: int
    ) -> dict[str, Any]:
        """What `write_sum` is to add to the elements from `start` on, and to which of them."""
        assert isinstance(self.law, Elementwise)
        of = weight.reshape(-1)[start : start + count]
        return {**self.law.total(terms, weight.device), "start": start, "of": of, "limit": state[THRESHOLD]}

    def factor(self, leaf: Leaf) -> float:
        return self.law.factor(replace(leaf, shape=(self.kept(leaf),)) if self.masks(leaf) else leaf)

    def describe(self) -> str:
        if not self.sparsity:
            return self.law.describe()
        share = f"{1.0 - self.sparsity:.3g}" if self.sparsity > 0.99 else f"{1.0 - self.sparsity:.0%}"
        which = {"dynamic": "smallest", "constant": "that were smallest", "random": "at random"}[self.mask]
        return f"{self.law.describe()} on the {share} {which}"


class Reader:
    """Elements start .. stop - 1 of a weight, flat, in the dtype that a forward sees."""

    def __init__(self, weight: Tensor):
        self.numel, self.weight = weight.numel(), weight
        self._flat = None if isinstance(weight, Int8Weight) else weight.reshape(-1)

    def __call__(self, start: int, stop: int) -> Tensor:
        if self._flat is not None:
            return self._flat[start:stop]
        assert isinstance(self.weight, Int8Weight)
        first = start // self.weight.group * self.weight.group
        return self.weight.read(first, stop)[start - first :].to(self.weight.dtype)


# -- order statistics --------------------------------------------------------------------------------------------------

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGIT = 16  # bits counted in one pass


def threshold(read: Reader, kept: int) -> float:
    """The midpoint of the magnitudes number `kept` and `kept` + 1 in ascending order: `kept` of them lie at or below it, or more where
    some are equal.

    >>> threshold(Reader(torch.tensor([-3.0, 1.0, 2.0, 8.0])), 2)
    2.5
    """
    low = magnitude(read, kept)
    high = magnitude(read, kept + 1) if kept < read.numel else low
    middle = low + (high - low) / 2
    as_kept = torch.tensor(middle, dtype=torch.float64 if read(0, 1).dtype == torch.float64 else torch.float32).item()
    return as_kept if low <= as_kept < high else low


def magnitude(read: Reader, number: int) -> float:
    """|w| number `number` (from 1) in ascending order, exactly. Patterns of bits grow as magnitudes do, so digits of 16 bits are
    counted from the highest down, a piece of the leaf at a time; NaN counts as largest."""
    size = read(0, 1).element_size()
    found = 0
    for shift in range(8 * size - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=read.weight.device)
        for pattern in _patterns(read, size):
            if shift < 8 * size - _DIGIT:
                pattern = pattern[pattern >> (shift + _DIGIT) == found]
            pattern = (pattern >> shift).bitwise_and_((1 << _DIGIT) - 1)
            counts += torch.bincount(pattern, minlength=1 << _DIGIT)
            del pattern  # before the next piece is made
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, number))
        number -= int(below[digit - 1]) if digit else 0
        found = (found << _DIGIT) | digit
        del counts, below  # half a megabyte each, and the next digit makes its own
    return torch.tensor(found, dtype=_WORDS[size]).view(read(0, 1).dtype).double().item()


def _patterns(read: Reader, size: int) -> Iterator[Tensor]:
    """|w| as whole numbers, int64, by pieces."""

    for start, stop in spans(read.numel):
        yield read(start, stop).view(_WORDS[size]).to(torch.int64, copy=True).bitwise_and_((1 << (8 * size - 1)) - 1)
