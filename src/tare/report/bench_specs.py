"""How the benchmarks name a method: `key` or `key:option=value,...`, several of them in one comma-separated list."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from tare.core.errors import InputError, nearest

DENSE_LR = "dense_lr"
_SPLIT = re.compile(r",(?![^\[]*\])|;")  # a comma inside brackets belongs to a value


@dataclass(frozen=True)
class MethodSpec:
    """A method with arguments that differ from its preset.

    text: as it was written, the name of its rows. options: constructor arguments, `lr` and `weight_decay` among them. centre: of
    a sweep, written `lr=~1e-3`; a plain `lr` is not swept. storage: fields of `tare.Storage`, written `storage.moment=int8`.
    dense_lr: the learning rate of embedding, head, norms and biases, as a multiple of the one of the matrices: what low-rank
    methods have by their scale, and what a fair AdamW needs too.
    """

    text: str
    key: str
    options: dict[str, Any] = field(default_factory=dict)
    storage: dict[str, Any] = field(default_factory=dict)
    dense_lr: float = 1.0
    centre: float | None = None


def parse(text: str, where: str = "--methods") -> list[MethodSpec]:
    """The methods of a list; a part `option=value` without a key of its own goes to the method before it.

    >>> [(spec.key, spec.options, spec.storage) for spec in parse("adamw,galore:rank=64,basis=gram,storage.moment=int8")]
    [('adamw', {}, {}), ('galore', {'rank': 64, 'basis': 'gram'}, {'moment': 'int8'})]

    Raises:
        InputError: an unknown method or option (the nearest is named), a value that is missing, or the same method twice.
    """
    words: list[str] = []
    for part in (part.strip() for part in _SPLIT.split(text)):
        if not part:
            continue
        if "=" in part and ":" not in part.partition("=")[0]:
            if not words:
                raise InputError(f"{where}: {part!r} has no method before it; write key:option=value,...")
            words[-1] += ("," if ":" in words[-1] else ":") + part
        else:
            words.append(part)
    if not words:
        raise InputError(f"{where}: expected a comma-separated list of methods, got {text!r}")
    for word in words:
        if words.count(word) > 1:
            raise InputError(f"{where}: {word!r} is named twice; keep one")
    return [_one(word, where) for word in words]


def _one(word: str, where: str) -> MethodSpec:
    from tare.methods import registry
    from tare.plan.resolve import require_gradients

    key, _, rest = word.partition(":")
    keys = registry.keys()
    if key not in keys:
        raise InputError(f"{where}: unknown method {key!r}{nearest(key, keys)}; methods: {', '.join(keys)}")
    require_gradients([key])
    options: dict[str, Any] = {}
    storage: dict[str, Any] = {}
    dense, centre = 1.0, None
    known = ["lr", *registry.options(key)]
    for part in (part.strip() for part in _SPLIT.split(rest) if part.strip()):
        name, equals, shown = (piece.strip() for piece in part.partition("="))
        if not equals or not shown:
            raise InputError(f"{where}: {word!r}: {name!r} has no value; write {key}:{name}=VALUE")
        if name == DENSE_LR:
            dense = _positive(shown, f"{where}: {word!r}: {DENSE_LR}")
        elif name == "lr" and shown.startswith("~"):
            centre = _positive(shown[1:], f"{where}: {word!r}: lr")
        elif name.startswith("storage."):
            storage[name.removeprefix("storage.")] = value(shown)
        elif name in known or registry.PUBLISHED_NAMES.get(name) in known:
            options[name] = value(shown)
        else:
            hint = nearest(name, [*known, DENSE_LR])
            raise InputError(
                f"{where}: method {key!r} has no option {name!r}{hint}; options: {', '.join(known)}, {DENSE_LR}"
            )
    return MethodSpec(word, key, options, storage, dense, centre)


def _positive(text: str, where: str) -> float:
    number = value(text)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise InputError(f"{where}: expected a number > 0, got {text!r}")
    return float(number)


def value(text: str) -> Any:
    """What an option's text means: a number, true, false, none, a list in brackets, else the text itself.

    >>> value("1e-3"), value("none"), value("[0.9, 0.99]"), value("svd")
    (0.001, None, [0.9, 0.99], 'svd')
    """
    from tare.train.configfile import scalar

    if text == "none":
        return None
    if text.startswith("[") and text.endswith("]"):
        return [scalar(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    return scalar(text)


def everything() -> list[MethodSpec]:
    """Every registered method with its presets; not `compose`, which without arguments is GaLore again."""
    from tare.methods import registry

    return [MethodSpec(key, key) for key in registry.keys("gradient") if key != "compose"]
