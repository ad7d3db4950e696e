"""Fitness: what becomes of the members' rewards before they weigh directions (EGGROLL, arXiv 2511.16652). Larger is better.

Rewards come as one list of members for each prompt that all of them answer. Sums are exact, so every machine gets the same numbers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from tare.core.checks import check_whole
from tare.core.errors import InputError

Rewards = list[list[float]]  # [prompts][members]


class Shaping(Protocol):
    """Rewards -> fitness of every member."""

    @property
    def spared(self) -> int:
        """The first so many members stay unperturbed, to compare with."""
        ...

    def prompt(self, member: int) -> int:
        """Which prompt a member answers, where there is one for each group."""
        ...

    def check(self, members: int) -> None:
        """Raise InputError for a population that it cannot shape."""
        ...

    def __call__(self, rewards: Rewards) -> list[float]: ...


@dataclass(frozen=True)
class ZScore:
    """(R - mean) / sqrt(variance + 1e-5) over the population; with groups, minus the group's mean, over the root of the whole variance.

    Args:
        group: members that answer the same prompt, each group another one; None: all the same. Where all members answer several prompts
            the fitness is the mean of what it is at each, over the variance of all.

    >>> ZScore()([[1.0, 3.0]])[1] > 0.99
    True
    """

    group: int | None = None

    spared: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.group is not None:
            check_whole("group", self.group, 2)

    def prompt(self, member: int) -> int:
        return member // self.group if self.group else 0

    def check(self, members: int) -> None:
        if self.group and members % self.group:
            raise InputError(f"group: {members} members do not divide into groups of {self.group}")

    def __call__(self, rewards: Rewards) -> list[float]:
        flat = [reward for row in rewards for reward in row]
        centre = mean(flat)
        spread = math.sqrt(mean([(reward - centre) ** 2 for reward in flat]) + 1e-5)
        shaped = []
        for row in rewards:
            size = self.group or len(row)
            centres = [mean(row[start : start + size]) for start in range(0, len(row), size)]
            shaped.append([(reward - centres[k // size]) / spread for k, reward in enumerate(row)])
        return [mean(list(column)) for column in zip(*shaped, strict=True)]


@dataclass(frozen=True)
class Raw:
    """The rewards themselves, averaged over prompts: two members give SPSA along E."""

    spared: ClassVar[int] = 0

    def prompt(self, member: int) -> int:
        return 0

    def check(self, members: int) -> None:
        """Any population will do."""

    def __call__(self, rewards: Rewards) -> list[float]:
        return [mean(list(column)) for column in zip(*rewards, strict=True)]


@dataclass(frozen=True)
class Baseline:
    """(R - R of member 0) / standard deviation at each prompt, averaged over prompts; members 0 and 1 are unperturbed and get 0."""

    spared: ClassVar[int] = 2

    def prompt(self, member: int) -> int:
        return 0

    def check(self, members: int) -> None:
        if members < 4:
            raise InputError(
                f"members: {members}; expected at least 4, since a baseline leaves two of them unperturbed"
            )

    def __call__(self, rewards: Rewards) -> list[float]:
        shaped = []
        for row in rewards:
            centre = mean(row)
            spread = math.sqrt(mean([(reward - centre) ** 2 for reward in row])) + 1e-8
            shaped.append([0.0, 0.0, *((reward - row[0]) / spread for reward in row[2:])])
        return [mean(list(column)) for column in zip(*shaped, strict=True)]


def mean(values: list[float]) -> float:
    """Rounded once; NaN where one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return math.fsum(values) / len(values)
