"""Portable: constructor arguments as plain data and back, for files. Only numbers, words, and frozen dataclasses of this package."""

import dataclasses
import importlib
import math
from typing import Any

from torch import Tensor

from tare.core.errors import InputError


def encode(value: Any) -> Any:
    """Plain data that `decode` makes the value from; `{"unknown": ...}` in the place of what has no such form.

    >>> encode((1, 2.5, None))
    {'tuple': [1, 2.5, None]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    if isinstance(value, tuple | list):
        return {type(value).__name__: [encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    kind = type(value)
    if _plain(kind):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"object": f"{kind.__module__}.{kind.__qualname__}", "fields": fields}
    return {"unknown": f"{kind.__module__}.{kind.__qualname__}"}


def decode(data: Any, what: str) -> Any:
    """The value again. what: names it in errors.

    Raises:
        InputError: something in it had no plain form, or is of a class that does not exist here.
    """
    if not isinstance(data, dict):
        return data
    (kind, content), *_ = data.items()
    if kind == "float":
        return float(content)
    if kind in ("tuple", "list"):
        items = [decode(item, what) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: decode(item, what) for key, item in content.items()}
    if kind == "object":
        fields = {name: decode(item, what) for name, item in data["fields"].items()}
        return _class(content, what)(**fields)
    raise InputError(
        f"{what}: a {content} was given, which no file can hold; build the optimizer yourself and give it as optimizer"
    )


def _plain(kind: type) -> bool:
    """Whether it is a frozen dataclass of ours, made from its fields."""
    frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    made = frozen and kind.__dataclass_params__.init  # type: ignore[attr-defined]
    return bool(made) and kind.__module__.startswith("tare.") and "<" not in kind.__qualname__


def _class(path: str, what: str) -> Any:
    module, _, name = path.rpartition(".")
    if module.startswith("tare."):
        try:
            kind = getattr(importlib.import_module(module), name)
            if isinstance(kind, type) and _plain(kind):
                return kind
        except (ImportError, AttributeError):
            pass
    raise InputError(f"{what}: this version of tare has no {path}; use the one that wrote the file")
