"""Settings: dataclass fields that carry their help text and range, and the check that every value passes.

Touches nothing but the field it is given. The configuration, the YAML reader and the command line all read
settings from here, so that a wrong value gets the same one-line message wherever it was written.
"""

import math
import unicodedata
from dataclasses import Field, field, fields
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tare.core.errors import InputError, nearest

_OPERATORS = {"low": ">=", "above": ">", "high": "<=", "below": "<"}


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with its one-line help and its range: `low` (>=), `above` (>), `high` (<=), `below` (<)."""
    if not bounds.keys() <= _OPERATORS.keys():
        raise TypeError(f"unknown bound among {sorted(bounds)}; allowed: {sorted(_OPERATORS)}")
    metadata = {"help": help, "bounds": bounds}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def _kinds(section: type) -> dict[str, tuple[Any, bool]]:
    """The type of every field without `None`, and whether `None` is allowed."""
    kinds = {}
    for name, hint in get_type_hints(section).items():
        members = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
        kinds[name] = (next(m for m in members if m is not type(None)), type(None) in members)
    return kinds


def kind_of(section: type, name: str) -> tuple[Any, bool]:
    """`(type, optional)` of a field, e.g. `(float, True)` for `method.lr`."""
    return _kinds(section)[name]


def describe(section: type, name: str) -> str:
    """What a field accepts, in words.

    >>> from tare.train.config import MethodConfig, TrainConfig
    >>> describe(TrainConfig, "steps"), describe(MethodConfig, "lr")
    ('a whole number >= 1', 'a number > 0, or none')
    """
    kind, optional = kind_of(section, name)
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(str(value) for value in get_args(kind))
    else:
        words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a mapping")
    bounds = section.__dataclass_fields__[name].metadata["bounds"]  # type: ignore[attr-defined]
    words += " and".join(f" {_OPERATORS[key]} {value:g}" for key, value in bounds.items())
    return words + (", or none" if optional else "")


def show(value: object) -> str:
    """A value as it stands in an error message: one short line."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check(section: type, name: str, value: object, where: str) -> Any:
    """The value of a field, checked for type and range (an int given for a float becomes one).

    Raises `InputError`, one line that starts with `where`, if it does not fit.
    """
    kind, optional = kind_of(section, name)
    if value is None and optional:
        return None
    hint = ""
    if get_origin(kind) is Literal:
        good = value in get_args(kind)
        hint = nearest(value, get_args(kind)) if isinstance(value, str) and not good else ""
    elif kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if good:
            try:
                value = float(value)  # type: ignore[arg-type]
            except OverflowError:
                value = math.inf
            good = math.isfinite(value)
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind is str:
        good = isinstance(value, str) and _clean(value)
        hint = " (put it in quotes)" if isinstance(value, int | float) else hint
    elif kind is bool:
        good = isinstance(value, bool)
    else:
        good = isinstance(value, dict) and _plain(value)
        value = _lists(value)  # as YAML would give it back
        hint = " with values other than text, finite numbers, lists and mappings" if isinstance(value, dict) else ""
    if good:
        for key, bound in section.__dataclass_fields__[name].metadata["bounds"].items():  # type: ignore[attr-defined]
            number: float = value  # type: ignore[assignment]
            inside = {"low": number >= bound, "above": number > bound, "high": number <= bound, "below": number < bound}
            good = good and inside[key]
    if not good:
        if isinstance(value, str) and kind in (int, float, bool):
            hint = " (a text; remove the quotes)" if _numeric(value) or value in ("true", "false") else hint
        raise InputError(f"{where}: expected {describe(section, name)}, got {show(value)}{hint}")
    return value


def _numeric(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _plain(value: object) -> bool:
    """Whether a value consists of text, finite numbers, booleans, none, lists and mappings with text keys."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _clean(key) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int) or (isinstance(value, str) and (value == "" or _clean(value)))


def _lists(value: Any) -> Any:
    """The value with tuples turned into lists, all the way down."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _clean(text: str) -> bool:
    """Whether a text is neither blank nor holds control characters, line breaks or broken Unicode."""
    return text.strip() != "" and not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text)


class Section:
    """What the sections share: on construction every field is checked against its type and range."""

    title = ""

    def __post_init__(self) -> None:
        spec: Field[Any]
        for spec in fields(self):  # type: ignore[arg-type]
            value = check(type(self), spec.name, getattr(self, spec.name), f"{self.title}.{spec.name}")
            object.__setattr__(self, spec.name, value)
        self.check_together()

    def check_together(self) -> None:
        """Checks that involve more than one field, or more than a range."""
