"""Blocks of leaves that take turns in holding optimizer state: how leaves form blocks, how many are on, and for how long.

BAdam (Luo et al. 2024, arXiv 2404.02827) rotates layers, FRUGAL (Zmushko et al. 2025, arXiv 2411.07837) single tensors. Orders are in
`core.orders` and `core.southwell`, the engine's side in `core.turns`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tare.core.checks import check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.orders import Order

ALWAYS = "always"  # in place of a block's name: on at every turn


class Blocks:
    """How leaves form blocks."""

    def names(self, leaves: Sequence[Leaf]) -> list[str | None]:
        """The block of each leaf; `ALWAYS`, or None for one that is never on."""
        raise NotImplementedError


@dataclass(frozen=True)
class EachLeaf(Blocks):
    """Every leaf is a block by itself (FRUGAL's code)."""

    def names(self, leaves: Sequence[Leaf]) -> list[str | None]:
        return [leaf.name for leaf in leaves]


@dataclass(frozen=True)
class Layers(Blocks):
    """A numbered layer (`model.layers.3.`) is a block, with all that is inside it (BAdam).

    Embeddings are another, and the head together with all else that has no layer's number the last; both are never on unless
    included. Where no leaf has a number in its name, every module is a block, or every unnamed tensor.

    embedding, head: whether these blocks take turns too. always: leaves that are on at every turn: parts of names, or
    patterns with `*`.

    >>> import torch
    >>> names = "embed.weight", "layers.0.q.weight", "layers.0.q.bias", "layers.1.q.weight", "norm.weight"
    >>> leaves = [Leaf(n, (2, 2), torch.float32, "embedding" if "embed" in n else "linear") for n in names]
    >>> Layers(head=True, always=("norm",)).names(leaves)
    [None, 'layers.0', 'layers.0', 'layers.1', 'always']
    """

    embedding: bool = False
    head: bool = False
    always: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = (self.always,) if isinstance(self.always, str) else tuple(self.always)
        if not all(isinstance(part, str) and part for part in given):
            raise InputError(f"active_modules: expected parts of parameter names, got {self.always!r}")
        object.__setattr__(self, "always", given)

    def names(self, leaves: Sequence[Leaf]) -> list[str | None]:
        numbered = any(_layer(leaf.name) for leaf in leaves)
        return [ALWAYS if self._stays(leaf) else self._block(leaf, numbered) for leaf in leaves]

    def unused(self, leaves: Sequence[Leaf]) -> list[str]:
        """Parts in `always` that no name has; none where there are no layers, hence no names to speak of."""
        if not any(_layer(leaf.name) for leaf in leaves):
            return []
        return [part for part in self.always if not any(_holds(part, leaf.name) for leaf in leaves)]

    def _stays(self, leaf: Leaf) -> bool:
        return any(_holds(part, leaf.name) for part in self.always)

    def _block(self, leaf: Leaf, numbered: bool) -> str | None:
        layer = _layer(leaf.name)
        if layer:
            return layer
        if leaf.role == "embedding":
            return "embedding" if self.embedding else None
        if numbered or leaf.role == "head":
            return "head" if self.head else None
        return leaf.name.rpartition(".")[0] or leaf.name


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.q.weight`; nothing where no part of the name is a number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found.group() if found else ""


def _holds(part: str, name: str) -> bool:
    return fnmatchcase(name, part) if "*" in part else part in name


@dataclass(frozen=True)
class Rotation:
    """The leaves whose transforms share an equal rotation take turns.

    Args:
        blocks: how they form blocks.
        order: which are on when.
        period: updates of a turn.
        first: of the first turn, where that differs.
        share: of the blocks that are on at once, round(share * N); None: `count` of them.
        gate: leaves that are not on have `requires_grad` switched off, so that no gradient of them is computed.
        reset_always: whether leaves that are on at every turn start afresh at every turn too.
    """

    blocks: Blocks
    order: Order
    period: int
    first: int | None = None
    share: float | None = None
    count: int = 1
    gate: bool = False
    reset_always: bool = False

    def __post_init__(self) -> None:
        check_whole("period", self.period)
        check_whole("count of blocks", self.count, 0)
        if self.first is not None:
            check_whole("first period", self.first)
        if self.share is not None and check_number("density", self.share, 0.0, inclusive=True) > 1.0:
            raise InputError(f"density: {self.share!r} is more than everything; a share in [0, 1] is expected")

    def number(self, updates: int) -> int:
        """The turn after so many updates."""
        first = self.period if self.first is None else self.first
        return 0 if updates < first else 1 + (updates - first) // self.period

    def on(self, blocks: int) -> int:
        """How many of N blocks are on at once."""
        return min(blocks, self.count if self.share is None else round(self.share * blocks))
