"""Orders: which blocks are on at a turn, as pure functions of (seed, turn, names of the blocks, scores).

So they are the same on every rank and after every resume. Orders of BAdam (Luo et al. 2024, arXiv 2404.02827) and FRUGAL
(Zmushko et al. 2025, arXiv 2411.07837).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import ClassVar

from torch import Tensor

from tare.core.errors import InputError
from tare.core.random import make_key
from tare.core.transform import StateSpec


@dataclass(frozen=True)
class Turn:
    """What an order is told. names: of the N blocks, in the model's order. count: how many are to be on. number: of the turn,
    from 0; update: of the first update in it, from 0. scores: of each block, None where nothing is known."""

    names: tuple[str, ...]
    count: int
    number: int = 0
    update: int = 0
    seed: int = 0
    scores: tuple[float | None, ...] = ()

    def key(self, purpose: str, number: int) -> int:
        """Key of the counter-based generator for draw `number`."""
        return make_key(self.seed, f"blocks/{purpose}", number)

    def shuffled(self, number: int, purpose: str = "order") -> list[int]:
        """The blocks in random order `number`: each draws by its name, so that no position matters."""
        return sorted(range(len(self.names)), key=lambda b: (self.key(f"{purpose}/{self.names[b]}", number), b))


class Order:
    """Which blocks are on at a turn."""

    scored: ClassVar[bool] = False  # whether it looks at gradients

    def select(self, turn: Turn) -> list[int]:
        """Numbers of the blocks that are on; repetitions count once."""
        raise NotImplementedError

    def selections(self, names: tuple[str, ...], count: int) -> list[list[int]] | None:
        """All selections that ever come; None where any `count` blocks may come together."""
        return None

    def spec(self) -> dict[str, StateSpec]:
        """What is kept of each leaf, on or not, to choose by."""
        return {}

    def observe(self, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take note of a leaf's gradient, in what `spec` names."""

    def score(self, block: str, states: Sequence[Mapping[str, Tensor]]) -> float | None:
        """The score of a block from what its leaves keep; None where nothing is known."""
        return None

    def describe(self) -> str:
        return type(self).__name__.lower()


class Cyclic(Order):
    """Windows of `count` blocks that go round a fixed sequence."""

    def sequence(self, blocks: int, count: int) -> list[int]:
        raise NotImplementedError

    def select(self, turn: Turn) -> list[int]:
        round_ = self.sequence(len(turn.names), turn.count)
        start = turn.number * turn.count
        return [round_[(start + i) % len(round_)] for i in range(turn.count)] if round_ else []

    def selections(self, names: tuple[str, ...], count: int) -> list[list[int]]:
        length = len(self.sequence(len(names), count))
        turns = length // gcd(length, count) if length else 1
        return [self.select(Turn(names, count, number)) for number in range(turns)]


@dataclass(frozen=True)
class Ascending(Cyclic):
    """From the input to the output.

    >>> [Ascending().select(Turn(("a", "b", "c"), 2, turn)) for turn in range(3)]
    [[0, 1], [2, 0], [1, 2]]
    """

    def sequence(self, blocks: int, count: int) -> list[int]:
        return list(range(blocks))


@dataclass(frozen=True)
class Descending(Cyclic):
    """From the output to the input."""

    def sequence(self, blocks: int, count: int) -> list[int]:
        return list(range(blocks))[::-1]


@dataclass(frozen=True)
class Mirror(Cyclic):
    """First and last, second and last but one, ... Taken in pairs (an even count), the middle of an odd number has no partner and is
    never on, as in FRUGAL's code, which refuses odd counts."""

    def sequence(self, blocks: int, count: int) -> list[int]:
        half = blocks // 2
        pairs = [block for i in range(half) for block in (i, blocks - 1 - i)]
        middle = [half] if blocks % 2 and (count % 2 or not pairs) else []
        return pairs + middle


@dataclass(frozen=True)
class Fixed(Order):
    """The same blocks at every turn: `blocks`, or the first ones."""

    blocks: tuple[int, ...] = ()

    def select(self, turn: Turn) -> list[int]:
        chosen = self.blocks or tuple(range(turn.count))
        if any(not 0 <= block < len(turn.names) for block in chosen):
            raise InputError(
                f"order: there are {len(turn.names)} blocks, counted from 0; {chosen} are not all among them"
            )
        return list(chosen)

    def selections(self, names: tuple[str, ...], count: int) -> list[list[int]]:
        return [self.select(Turn(names, count))]


@dataclass(frozen=True)
class Random(Order):
    """Drawn anew at every turn (FRUGAL)."""

    def select(self, turn: Turn) -> list[int]:
        return turn.shuffled(turn.number)[: turn.count]


@dataclass(frozen=True)
class Reshuffled(Order):
    """Every block once before any comes again, in an order drawn anew each time (BAdam). What a whole number of windows leaves over
    sits out until the next round."""

    def select(self, turn: Turn) -> list[int]:
        if not turn.count:
            return []
        windows = max(1, len(turn.names) // turn.count)
        start = turn.number % windows * turn.count
        return turn.shuffled(turn.number // windows)[start : start + turn.count]


@dataclass(frozen=True)
class Recorded(Order):
    """Selections as an input: update (from 0) from which they hold -> blocks. For recorded traces."""

    at: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if 0 not in self.at:
            raise InputError("order: recorded selections must say what is on from update 0")

    def select(self, turn: Turn) -> list[int]:
        return list(self.at[max(update for update in self.at if update <= turn.update)])

    def selections(self, names: tuple[str, ...], count: int) -> list[list[int]]:
        return [list(blocks) for blocks in self.at.values()]
