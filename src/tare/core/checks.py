"""Checks of hyperparameters, raised at construction: the value, what is allowed."""

import math
from typing import Any

from tare.core.errors import InputError


def check_number(name: str, value: Any, above: float = 0.0, inclusive: bool = False, below: float = math.inf) -> float:
    """A finite number in (above, below), or [above, below) when inclusive; else one clear line."""
    bad = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if bad or value < above or (value == above and not inclusive) or value >= below:
        sign = ">=" if inclusive else ">"
        top = "" if below == math.inf else f" and < {below:g}"
        raise InputError(f"Invalid {name}: {value!r}; expected a finite number {sign} {above:g}{top}")
    return float(value)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"Invalid {name}: {value!r}; expected a whole number >= {least}")
    return value


def check_betas(betas: Any, count: int = 2) -> tuple[float, ...]:
    """`count` numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != count:
        example = "a pair such as (0.9, 0.999)" if count == 2 else f"{count} numbers in [0, 1)"
        raise InputError(f"Invalid betas: {betas!r}; expected {example}")
    for number, beta in enumerate(betas):
        check_number(f"beta parameter at index {number}", beta, 0.0, inclusive=True, below=1.0)
    return tuple(float(beta) for beta in betas)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    from tare.core.errors import nearest

    if value not in allowed:
        raise InputError(
            f"Invalid {name}: {value!r}; expected one of {', '.join(allowed)}{nearest(str(value), allowed)}"
        )
    return str(value)
