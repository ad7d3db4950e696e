"""Invariants: what holds for any registered method. A method is checked by being in the registry; no code is written for it.

>>> sorted(INVARIANTS)[:2]
['a_bad_neighbour_changes_nothing', 'a_bad_norm_moves_nothing']
"""

from collections.abc import Callable

from tare.testing import (
    clipping,
    costs,
    descent,
    faults,
    inputs,
    objects,
    quiet,
    repeat,
    resume,
    shapes,
    turns,
    weights,
)
from tare.testing.subject import Subject

Check = Callable[[Subject], None]

INVARIANTS: dict[str, Check] = {
    check.__name__: check
    for module in (inputs, descent, quiet, shapes, objects, resume, repeat, faults, costs, clipping, weights, turns)
    for check in module.CHECKS
}


def check(key: str, name: str) -> None:
    """One invariant of one method. Raises AssertionError with what differs."""
    INVARIANTS[name](Subject(key))


def check_all(key: str) -> dict[str, str]:
    """Every invariant of one method: name -> what failed, empty when all hold.

    A method in a file of its own is checked by `register`-ing it and calling this.
    """
    failed: dict[str, str] = {}
    for name in INVARIANTS:
        try:
            check(key, name)
        except Exception as error:  # a check that cannot run has failed too
            failed[name] = f"{type(error).__name__}: {error}"
    return failed
