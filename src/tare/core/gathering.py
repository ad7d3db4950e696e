"""Gathering: what micro-batches leave behind where leaves are stepped inside backward, and from which gradient a new basis comes.

Sums of *projected* gradients ([r, n] instead of [m, n]) are exact while the basis stays. A step that computes a basis needs the sum
of whole gradients first: of all such leaves at once, or a share of them in each of several passes; or it makes do with the first
micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from tare.core.checks import check_choice, check_whole
from tare.core.clipping import runs
from tare.core.errors import InputError

Source = Literal["sum", "first"]
SOURCES = ("sum", "first")


class Gathering:
    """The gradients of one step that is not whole yet, and the rule by which its bases come about.

    Args:
        source: `sum` of all micro-batches, as without release; or the `first` one that gives the leaf a usable gradient.
        parts: with `sum`, passes over the micro-batches of a step that computes bases. Each holds the whole gradients of
            1/parts of the projected leaves; the last one is the one that steps.
    """

    def __init__(self, source: Source = "sum", parts: int = 1):
        self.source: Source = check_choice("refresh source", source, SOURCES)  # type: ignore[assignment]
        self.parts = check_whole("refresh parts", parts)
        if source == "first" and parts > 1:
            raise InputError(
                f"refresh parts: {parts} passes share the gradients that are summed; the first micro-batch needs none; "
                "leave parts at 1, or take the sum"
            )
        self._sums: dict[Tensor, Tensor] = {}
        self._shares: list[list[Tensor]] = []  # of the step whose passes have begun
        self.share: set[Tensor] | None = None  # leaves of the pass that is going on

    # -- sums of projections ---------------------------------------------------------------------------------------

    def add(self, p: Tensor, part: Tensor) -> None:
        if p in self._sums:
            self._sums[p].add_(part)
        else:
            self._sums[p] = part

    def take(self, p: Tensor) -> Tensor | None:
        return self._sums.pop(p, None)

    def clear(self) -> None:
        """Forget what was gathered: the step it belonged to is dropped."""
        self._sums.clear()
        self._shares.clear()

    def waiting(self) -> list[Tensor]:
        """Leaves whose gathered gradients no backward has stepped."""
        return list(self._sums)

    # -- passes that compute bases ---------------------------------------------------------------------------------

    def split(self, due: list[Tensor], projected: int) -> list[list[Tensor]]:
        """The leaves whose basis is due, by pass; `projected`: bytes of all projected leaves' gradients together."""
        sizes = [p.numel() * p.element_size() for p in due]
        return [[due[i] for i in run] for run in passes(sizes, projected, self.parts)]

    def begin(self, due: list[Tensor], projected: int) -> None:
        """The passes of a new step; as in `split`."""
        self._shares = self.split(due, projected)

    @contextmanager
    def watch(self, part: int) -> Iterator[list[Tensor]]:
        """Inside, backward gathers the whole gradients of one share of the leaves, which it gives, and steps nothing.

        Raises:
            InputError: there is no such pass in this step.
        """
        count = max(0, len(self._shares) - 1)
        if not 0 <= part < count:
            raise InputError(
                f"refreshing: part {part} is out of range; this step has {count} such passes (optimizer.refresh_passes), "
                "counted from 0, before the one that steps"
            )
        self.share = set(self._shares[part])
        try:
            yield self._shares[part]
        finally:
            self.share = None


def passes(sizes: list[int], projected: int, parts: int) -> list[list[int]]:
    """The places 0, 1, ... of the gradients of `sizes` bytes, by pass: as few as keep each to about projected / parts.

    >>> passes([4, 4, 4, 4], 16, 2), passes([4, 4], 16, 2), passes([], 16, 2)
    ([[0, 1], [2, 3]], [[0, 1]], [])
    """
    count = max(1, -(-sum(sizes) * parts // max(1, projected)))
    return [run for run in runs(sizes, count) if run]
