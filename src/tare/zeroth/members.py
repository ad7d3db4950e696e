"""Members: what a closure is told when it evaluates several members of a population in one forward, and what it gives back.

Rows of a batch are laid out member by member: those of the first member, then those of the second, and so on.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tare.core.errors import InputError
from tare.zeroth.probes import Point


@dataclass(frozen=True)
class Asked(Point):
    """A point with an address: which member of the population stands there, and which prompt it answers."""

    number: int = 0
    prompt: int = 0


@dataclass(frozen=True)
class Members:
    """The members that one call of a closure evaluates.

    numbers: which of the population. prompts: which prompt each answers, where groups see different ones; else 0.

    >>> Members((4, 5), (1, 1)).repeat(torch.tensor([[7], [8]])).flatten().tolist()
    [7, 8, 7, 8]
    """

    numbers: tuple[int, ...]
    prompts: tuple[int, ...]

    @classmethod
    def of(cls, points: list[Point], first: int = 0) -> "Members":
        """Those who stand at `points`; points without an address are numbered from `first`."""
        numbers = [p.number if isinstance(p, Asked) else first + i for i, p in enumerate(points)]
        return cls(tuple(numbers), tuple(p.prompt if isinstance(p, Asked) else 0 for p in points))

    def __len__(self) -> int:
        return len(self.numbers)

    def repeat(self, batch: Any) -> Any:
        """The same batch for every member: each tensor [b, ...] of `batch` (a tensor, or any nest of them) as [members b, ...]."""
        count = len(self)
        return pytree.tree_map_only(Tensor, lambda x: x.repeat(count, *[1] * (x.ndim - 1)) if x.ndim else x, batch)

    def pick(self, prompts: Any) -> Any:
        """To every member its prompt's batch: each tensor [prompts, b, ...] as [members b, ...]."""
        chosen = torch.tensor(self.prompts)
        return pytree.tree_map_only(Tensor, lambda x: x[chosen.to(x.device)].flatten(0, 1), prompts)

    def mean(self, losses: Tensor) -> Tensor:
        """[members b, ...] losses, or hits and misses, as [members] means."""
        if losses.ndim == 0 or losses.shape[0] % len(self):
            raise InputError(
                f"members.mean: {tuple(losses.shape)} losses do not divide among {len(self)} members; give one loss per row"
            )
        numbers = losses if losses.is_floating_point() else losses.float()
        return numbers.reshape(len(self), -1).mean(1)


def takes_members(closure: Callable[..., Any]) -> bool:
    """Whether a closure has an argument to be told its members by: one that it cannot do without."""
    try:
        parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is inspect.Parameter.empty
    ]
    if len(needed) > 1:
        raise InputError(f"closure: takes {len(needed)} arguments; expected none, or one: the members to evaluate")
    return bool(needed)


def as_losses(value: Any, count: int) -> list[float]:
    """One loss per member, from a tensor, a list of numbers, or a number; more than one a member are averaged.

    Raises:
        InputError: where that many members cannot have them.
    """
    try:
        losses = torch.as_tensor(value).detach().double().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"closure: expected {count} losses, got {type(value).__name__}; return a tensor of them"
        ) from None
    if losses.numel() == 0 or losses.numel() % count:
        raise InputError(
            f"closure: expected one loss for each of {count} members, got {losses.numel()}; reduce over each member's rows only, "
            "as members.mean(losses) does, or evaluate one member at a time (together=1)"
        )
    found: list[float] = losses.view(count, -1).mean(1).tolist()
    return found


def rows_of(arguments: Any) -> int | None:
    """Size of the first axis of the first tensor among a call's arguments."""
    for x in pytree.tree_leaves(arguments):
        if isinstance(x, Tensor) and x.ndim:
            return int(x.shape[0])
    return None


def split(arguments: Any, rows: int, count: int, number: int) -> Any:
    """A call's arguments for one of `count` members alone: its part of every tensor whose first axis is that of the batch."""

    def part(x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[0] % rows or x.shape[0] == 0:
            return x
        size = x.shape[0] // count
        return x[number * size : (number + 1) * size]

    return pytree.tree_map_only(Tensor, part, arguments)


def join(outputs: list[Any]) -> Any:
    """Outputs of one member each as that of all: tensors along their first axis."""
    first, shape = pytree.tree_flatten(outputs[0])
    columns = [pytree.tree_leaves(output) for output in outputs]
    joined = [
        torch.cat([c[i] for c in columns]) if isinstance(x, Tensor) and x.ndim else x for i, x in enumerate(first)
    ]
    return pytree.tree_unflatten(joined, shape)


def at_most(limit: float, count: int) -> int:
    """A whole number of members from 1 to `count`."""
    return max(1, min(count, math.floor(limit)))
