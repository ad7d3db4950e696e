"""Clipping where gradients are never all there: the norm is gathered leaf by leaf, in a backward of its own or in the one before.

G <- G min(1, c / (|G| + 1e-6)), |G| over all leaves, as `torch.nn.utils.clip_grad_norm_` (Pascanu, Mikolov, Bengio 2013,
arXiv 1211.5063). `two-pass` knows |G| of this step; `previous` takes that of the step before, which costs nothing.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.errors import InputError
from tare.core.shard.layout import is_sharded, local, summed

Mode = Literal["previous", "two-pass"]
MODES = ("previous", "two-pass")
Strict = Literal["leaf", "step"]
NORM = "released_norm"  # in every parameter group: the norm of the last finished step, 0 before the first one
_EPS = 1e-6  # torch's, so that the factor is the same
_BLOCK = 1 << 18  # elements summed in one go on the CPU: in cache, and few enough for an fp32 sum


class NotFinite(ArithmeticError):
    """A gradient is not finite. Raised inside backward before its leaf is stepped, or at the end of the step; see `clip_release`."""


@dataclass(frozen=True)
class Clipped:
    """What became of the last step. norm: of its gradient before clipping, None where it could not be had (projected
    micro-batches, not clipped). factor: what every gradient was multiplied by; 0 where the step was dropped."""

    norm: float | None
    factor: float


def squared_norm(tensor: Tensor) -> Tensor:
    """The squared Euclidean norm as a 0-d tensor, fp32 or wider, without a temporary of the tensor's size. Of a DTensor that of the
    whole: its ranks send each other one number."""
    if is_sharded(tensor):
        return summed(squared_norm(local(tensor)), tensor)
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if tensor.ndim > 1 and not tensor.is_contiguous():
        tensor = tensor.mT  # the norm is the same, and gradients of transposed weights lie in memory like this
    if tensor.device.type == "cpu":
        if not tensor.is_contiguous():
            return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
        # torch's own fp32 norm is off by 6e-4 at 2^24 elements; this by 1e-5, at the speed of reading.
        total = torch.zeros((), dtype=torch.float64)
        for part in tensor.view(-1).split(_BLOCK):
            x = part.to(wide)
            total += torch.dot(x, x)
        return total
    return torch.linalg.vector_norm(tensor, dtype=wide).square()


def norm_of(squares: Iterable[Tensor]) -> float:
    """The norm of all leaves together, in one read of the device; the order of the leaves changes no bit."""
    return _root(numbers_of(squares))


def numbers_of(scalars: Iterable[Tensor]) -> list[float]:
    """0-d tensors as numbers. The host waits once for each device and dtype among them, however many there are."""
    found = list(scalars)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, scalar in enumerate(found):
        places.setdefault((scalar.device, scalar.dtype), []).append(place)
    numbers = [0.0] * len(found)
    for alike in places.values():
        for place, number in zip(alike, torch.stack([found[i] for i in alike]).tolist(), strict=True):
            numbers[place] = number
    return numbers


def _root(squares: list[float]) -> float:
    finite = all(map(math.isfinite, squares))
    return math.sqrt(math.fsum(squares)) if finite else math.nan if any(map(math.isnan, squares)) else math.inf


def factor_for(norm: float, max_norm: float | None) -> float:
    """What a gradient of this norm is multiplied by."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + _EPS))


class Clipping:
    """The norms of one optimizer in release mode.

    Args:
        groups: its parameter groups, which carry the norm of the last step into checkpoints.
        max_norm: the largest norm that a step may have; None gathers the norm and clips nothing.
        mode: whose norm is taken.
        parts: measuring passes per step; each holds only its share of the gradients between micro-batches.
        strict: `leaf`: raise `NotFinite` at a leaf whose gradient is not finite, instead of stepping it, for which the host
            waits at every leaf. `step`: such a gradient is made zero where it lies, and `end` names the leaf. None: neither.
    """

    def __init__(
        self, groups: list[dict[str, Any]], max_norm: float | None, mode: Mode, parts: int, strict: Strict | None
    ):
        if max_norm is not None:
            check_number("max_norm", max_norm)
        check_choice("clip mode", mode, MODES)
        if strict is not None:
            check_choice("strict", strict, ("leaf", "step"))
        self._groups, self.max_norm, self.mode, self.strict = groups, max_norm, mode, strict
        self.parts = check_whole("measuring passes", parts)
        self.last: Clipped | None = None
        self.measured: float | None = None  # norm of the step that is about to be taken
        self._share: set[Tensor] | None = None  # leaves of the measuring pass that is going on
        self._squares: dict[Tensor, Tensor] = {}
        self._checks: dict[str, Tensor] = {}  # of strict "step": by leaf, a number that is finite where the gradient is
        self._stepped: set[Tensor] = set()
        self._factor: float | None = None  # of the step that is going on; 0 drops it
        self._whole = True  # whether every gradient of this step was seen whole

    # -- measuring -------------------------------------------------------------------------------------------------

    @property
    def measuring(self) -> bool:
        return self._share is not None

    @property
    def wants_pass(self) -> bool:
        """Whether the next step needs a measuring pass: always in two-pass mode, else where there is no step before."""
        return self.mode == "two-pass" or (self.max_norm is not None and self._groups[0].get(NORM, 0.0) == 0.0)

    @contextmanager
    def watch(self, leaves: list[Tensor], part: int) -> Iterator[None]:
        """Inside, backward only adds to the norm. The last of `parts` passes gives it."""
        if not 0 <= part < self.parts:
            raise InputError(f"measuring: part {part} is out of range; there are {self.parts}, counted from 0")
        if part == 0:
            self.forget()
        self._share = set(shares(leaves, self.parts)[part])
        try:
            yield
            for p in leaves:  # what only earlier micro-batches gave
                if p.grad is not None:
                    self.measure(p)
            if part == self.parts - 1:
                self.measured = norm_of(self._squares.values())
                self._squares.clear()
        except BaseException:
            self.forget()
            for p in leaves:
                p.grad = None
            raise
        finally:
            self._share = None

    def measure(self, p: Tensor, more: bool = False) -> None:
        """Take the norm of a gradient and free it. more: micro-batches follow, whose sum it is that counts."""
        assert self._share is not None
        if p in self._share:
            if more:
                return
            assert p.grad is not None
            self._squares[p] = squared_norm(p.grad)
        p.grad = None

    # -- stepping --------------------------------------------------------------------------------------------------

    def admit(self, p: Tensor, part: Tensor | None, name: str) -> bool:
        """Take note of a leaf's gradient and scale it (and what micro-batches left); False where the step is dropped.

        Raises:
            InputError: two-pass, and no norm was measured; nothing has moved.
            NotFinite: strict, and the gradient is not finite; `step`: one of the step before was not, which nothing ended.
        """
        if p in self._stepped and (fault := self.end()):  # a leaf comes again, so a new step has begun
            raise NotFinite(fault)
        if self._factor is None:
            self._factor = self.factor()
        self._stepped.add(p)
        assert p.grad is not None
        if self.measured is None:
            self._whole = self._whole and part is None
            square = self._squares[p] = squared_norm(p.grad)
            if self.strict == "leaf":
                self.require_finite(square, name)
            elif self.strict == "step":
                self._checks[name] = square if part is None else square + squared_norm(part)
                bad = self._checks[name].isfinite().logical_not_()
                for gradient in (p.grad,) if part is None else (p.grad, part):
                    gradient.masked_fill_(bad, 0.0)
        if 0.0 < self._factor < 1.0:
            p.grad.mul_(self._factor)
            if part is not None:
                part.mul_(self._factor)
        return self._factor > 0.0

    def factor(self) -> float:
        """What the gradients of the coming step are multiplied by; 0 drops it. Raises `InputError` as `admit` does."""
        norm = self.measured
        if norm is None and self.mode == "two-pass":
            raise InputError(
                "release with two-pass clipping: the norm of this step was not measured; run its backward inside "
                "optimizer.measuring() first, or let optimizer.backward(closure) do both passes"
            )
        if norm is None and self.max_norm is not None:
            norm = float(self._groups[0].get(NORM, 0.0))
        if not norm:  # unknown, or nothing to clip
            return 1.0
        return factor_for(norm, self.max_norm) if math.isfinite(norm) else 0.0

    def require_finite(self, square: Tensor, name: str) -> None:
        """Raise `NotFinite`, and forget the step, unless the number is finite."""
        if not math.isfinite(float(square)):
            self.forget()
            raise NotFinite(f"the gradient of {name} is not finite")

    def end(self) -> str:
        """The step is over: its norm is now that of the step before. One that is not finite is not remembered.

        Returns what was wrong with it, where `strict` is `step`, or nothing.
        """
        if self._factor is None and self.measured is None:
            return ""
        norm, fault = self.measured, ""
        if norm is None:
            count = len(self._squares) if self._whole else 0
            numbers = numbers_of([*list(self._squares.values())[:count], *self._checks.values()])
            norm = _root(numbers[:count]) if self._whole else None
            bad = [name for name, x in zip(self._checks, numbers[count:], strict=True) if not math.isfinite(x)]
            if bad:
                fault = f"the gradient of {bad[0]} is not finite" + (f", nor {len(bad) - 1} more" if bad[1:] else "")
        self.last = Clipped(norm, self._factor if self._factor is not None else self.factor())
        if norm is not None and math.isfinite(norm):
            for group in self._groups:
                group[NORM] = norm
        self.forget()
        return fault

    def forget(self) -> None:
        """Drop what the step that is going on has gathered; what the step before left stays."""
        self._squares.clear()
        self._checks.clear()
        self._stepped.clear()
        self._factor = self.measured = None
        self._whole = True


def shares(leaves: list[Tensor], count: int) -> list[list[Tensor]]:
    """The leaves in runs of about equal bytes."""
    return [[leaves[i] for i in run] for run in runs([p.numel() * p.element_size() for p in leaves], count)]


def runs(sizes: list[int], count: int) -> list[list[int]]:
    """The places 0, 1, ... of `sizes` in `count` runs of about equal sums; a run may be empty.

    >>> runs([4, 1, 1, 2], 2)
    [[0], [1, 2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(count)]
    before, total = 0, max(1, sum(sizes))
    for place, size in enumerate(sizes):
        found[min(count - 1, (before + size // 2) * count // total)].append(place)
        before += size
    return found
