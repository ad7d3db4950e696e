"""Amounts of memory as people write them, and back.

`GB` is 10^9 bytes, `GiB` is 2^30. A bare `G` is the binary one (`8G` = `8GiB`), as in `torchrun`, `docker` and `java -Xmx`.
"""

import re

from tare.core.errors import InputError

_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE)
_UNITS = {
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
}
_ALLOWED = "write a number and a unit, e.g. 24GiB (2^30), 24GB (10^9), 8G (= 8GiB) or 512MiB"


def parse_bytes(text: str) -> int:
    """Bytes in an amount such as `"24GiB"`.

    Args:
        text: a positive number, then K, M, G or T; with `iB` or alone a power of 1024, with `B` a power of 1000.
            Upper and lower case are the same, spaces around and between are allowed.

    Raises:
        InputError: no unit, zero, negative or not an amount at all.

    >>> parse_bytes("24GiB"), parse_bytes("24GB"), parse_bytes("0.5k")
    (25769803776, 24000000000, 512)
    """
    given = str(text)
    match = _FORM.fullmatch(given)
    if match is None or match[2].lower() not in _UNITS:
        bare = re.fullmatch(r"\s*\d+(\.\d*)?\s*", given)
        wrong = "has no unit" if bare and float(given) > 0 else "is not an amount of memory"
        raise InputError(f"budget {given!r} {wrong}: {_ALLOWED}")
    amount = int(float(match[1]) * _UNITS[match[2].lower()])
    if amount <= 0:
        raise InputError(f"budget {given!r} must be greater than zero: {_ALLOWED}")
    return amount


def format_bytes(count: int) -> str:
    """A byte count for people: four figures at most, binary units.

    >>> format_bytes(13_476_831_232), format_bytes(-1536), format_bytes(7)
    ('12.55 GiB', '-1.50 KiB', '7 B')
    """
    size = abs(count)
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            value = count / 1024**power
            return f"{value:.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f} {unit}"
    return f"{count} B"
