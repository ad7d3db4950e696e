"""Choosing a hook by name, as the command does."""

from typing import Any

from tare.core.checks import check_choice
from tare.core.errors import InputError
from tare.parallel.hooks.base import Hook
from tare.parallel.hooks.power import PowerSGD
from tare.parallel.hooks.projected import Projected
from tare.parallel.hooks.randk import RandK
from tare.parallel.hooks.topk import TopK
from tare.parallel.hooks.whole import Whole

NAMES = ("randk", "topk", "powersgd", "projected", "whole")
_OPTIONS = {
    "randk": ("fraction", "seed", "error_feedback"),
    "topk": ("fraction", "error_feedback"),
    "powersgd": ("rank", "start", "seed", "error_feedback"),
    "projected": (),
    "whole": (),
}


def build(
    name: str, *, fraction: float | None = None, rank: int | None = None, start: int | None = None, seed: int | None = None,
    error_feedback: bool | None = None, optimizer: Any = None, group: Any = None,
) -> Hook:  # fmt: skip
    """A hook by its name. What is None is left at the hook's default; a seed is passed over by hooks that draw nothing.

    Raises:
        InputError: an unknown name, an option that the hook has not, or a value out of range.

    >>> build("randk", fraction=0.1, seed=3).describe()
    'Rand-k of 10 % with error feedback'
    """
    check_choice("compress", name, NAMES)
    given = {"fraction": fraction, "rank": rank, "start": start, "seed": seed, "error_feedback": error_feedback}
    options = {key: value for key, value in given.items() if value is not None}
    if "seed" not in _OPTIONS[name]:
        options.pop("seed", None)
    stray = [key for key in options if key not in _OPTIONS[name]]
    if stray:
        has = ", ".join(_OPTIONS[name]) or "none"
        raise InputError(f"compress: {name!r} has no option {stray[0]!r}; its options: {has}")
    if name == "projected":
        return Projected(optimizer, group=group)
    made = {"randk": RandK, "topk": TopK, "powersgd": PowerSGD, "whole": Whole}[name]
    return made(**options, group=group)
