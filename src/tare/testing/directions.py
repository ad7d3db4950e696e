"""Recorded directions: feed those of a golden trace to any forward-only method, in place of what it would draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tare.core.errors import InputError
from tare.core.state import State
from tare.zeroth.directions import Draw, Law


@dataclass(frozen=True, init=False, eq=False)
class RecordedDirections(Law):
    """`RecordedDirections({step: z, ...})`: the directions of each 0-based step.

    A step's entry is a tensor where there is one leaf, a mapping from leaf names, or a sequence in the order of the leaves, which then
    have to be named in `names`. With several members each tensor has one more axis in front: [n, *shape].

    >>> import torch
    >>> RecordedDirections({0: torch.zeros(3, 2)}).describe()
    'recorded'
    """

    steps: Mapping[int, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    partial: ClassVar[bool] = False

    def __init__(self, steps: Mapping[int, Any], names: Sequence[str] = ()):
        object.__setattr__(self, "steps", dict(steps))
        object.__setattr__(self, "names", tuple(names))

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if draw.step not in self.steps:
            raise InputError(f"RecordedDirections: none for step {draw.step}; recorded: {sorted(self.steps)}")
        entry = self.steps[draw.step]
        if isinstance(entry, Mapping):
            entry = entry[draw.leaf.name]
        elif not isinstance(entry, Tensor):
            entry = entry[self.names.index(draw.leaf.name)]
        z = entry[draw.member] if entry.ndim > len(draw.leaf.shape) else entry
        if tuple(z.shape) != draw.leaf.shape:
            raise InputError(f"RecordedDirections: {draw.leaf.name} is {draw.leaf.shape}, recorded {tuple(z.shape)}")
        return z.to(weight.device).reshape(-1)[start:stop]

    def factor(self, leaf: Any) -> float:
        return float("nan")

    def describe(self) -> str:
        return "recorded"
