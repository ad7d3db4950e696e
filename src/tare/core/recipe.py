"""Recipe: which leaf gets which transform. Ordered (match -> transform) pairs; every leaf is claimed by the first that matches.

A match is a role, a tuple of roles, a glob on names (anything with `*`, `?`, `.` or no such role), `"*"` for the rest, or a function.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from tare.core.errors import InputError
from tare.core.leaf import ROLES, Leaf
from tare.core.transform import Decay, Transform

Match = str | tuple[str, ...] | Callable[[Leaf], bool]


def matches(match: Match, leaf: Leaf) -> bool:
    if callable(match):
        return match(leaf)
    if isinstance(match, tuple):
        return any(matches(m, leaf) for m in match)
    if match in ROLES:
        return leaf.role == match
    return fnmatch.fnmatchcase(leaf.name, match)


@dataclass(frozen=True)
class Recipe:
    """Args:
    entries: ordered (match, transform).
    decay: how weight decay acts. `before`: W <- (1 - lr wd) W - lr U (torch, Lion, bitsandbytes); `after`:
        W <- (1 - lr wd) (W - lr U) (the GaLore family); `prox`: W <- (W - lr U) / (1 + lr wd), the proximal step of Adan;
        `l2`: not decoupled, the rule sees G + wd W (diffGrad and older codes).
    """

    entries: tuple[tuple[Match, Transform], ...]
    decay: Decay = "before"

    def __post_init__(self) -> None:
        if not self.entries:
            raise InputError("recipe: no entries; give at least one (match, transform) pair")
        if self.decay not in get_args(Decay):
            raise InputError(f"recipe.decay: expected one of {', '.join(get_args(Decay))}, got {self.decay!r}")

    def find(self, leaf: Leaf) -> int:
        """Index of the entry that claims `leaf`."""
        for number, (match, _) in enumerate(self.entries):
            if matches(match, leaf):
                return number
        patterns = ", ".join(repr(match) for match, _ in self.entries)
        raise InputError(
            f"recipe: no entry claims {leaf.name!r} (role {leaf.role}, shape {leaf.shape}); patterns: {patterns}; "
            "add an entry, or '*' for the rest"
        )

    def unused(self, used: set[int], leaves: list[Leaf]) -> list[str]:
        """Patterns on names that claimed nothing: almost always a spelling mistake. Roles and '*' may stay unused."""
        return [
            repr(part)
            for number, (match, _) in enumerate(self.entries)
            for part in (match if isinstance(match, tuple) else (match,))
            if isinstance(part, str) and part != "*" and part not in ROLES
            if number not in used or not any(matches(part, leaf) for leaf in leaves)
        ]
