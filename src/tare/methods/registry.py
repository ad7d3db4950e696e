"""The registry: the single list of methods that the command, the planner, the docs, the benchmarks and the generic tests read."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tare.core.errors import InputError, nearest
from tare.core.optimizer import Optimizer


@dataclass(frozen=True)
class Trial:
    """How the generic checks run a forward-only method on something small.

    lr, hyper: constructor arguments. steps: after which the loss must have fallen by a tenth. problem: where the little problem is made,
    as `module:function`; see `tare.testing.forward.Problem`. exempt: checks that its nature forbids, by name, each with the reason.
    """

    lr: float = 2e-2
    hyper: dict[str, Any] = field(default_factory=dict)
    steps: int = 60
    problem: str = "tare.testing.forward:regression"
    exempt: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """What a method is, for people: its paper, its choices, its limits, and where paper and published code part ways.

    presets: per named model, the constructor arguments to start from. auto_rank: place in the planner's order of
    preference for `--method auto` (lower first, among those that fit). release: whether it steps inside backward, and
    whether it then accumulates small projected gradients over micro-batches. coupled: leaves that are stepped together share a
    number, so that one alone steps otherwise than in company. every_leaf: of a method that steps few leaves at a time, the constructor
    arguments under which it steps them all at every update, for checks that look at single leaves. kind: whether it steps with
    gradients, or evaluates losses in `step(closure)`. trial: how the generic checks of the latter run it.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str
    idea: str
    axes: dict[str, str]
    defaults: dict[str, str]
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    reproduced: str = ""
    auto_rank: int = 100
    release: Literal["yes", "accumulates", "no"] = "yes"
    coupled: bool = False
    every_leaf: dict[str, Any] = field(default_factory=dict)
    kind: Literal["gradient", "forward"] = "gradient"
    state: str = ""  # state bytes of an m x n matrix, in words
    trial: Trial = field(default_factory=Trial)


_METHODS: dict[str, type[Optimizer]] = {}
_CARDS: dict[str, Card] = {}
_COMMON = ("params", "lr")
# What the published codes call the same thing; `create` takes either.
PUBLISHED_NAMES = {"update_proj_gap": "period", "alpha": "scale", "proj": "basis", "scale_type": "lift"}

M = TypeVar("M", bound=type[Optimizer])


def register(card: Card) -> Callable[[M], M]:
    """Class decorator: enter a named constructor under its card's key."""

    def enter(cls: M) -> M:
        if card.key in _METHODS and _METHODS[card.key].__qualname__ != cls.__qualname__:
            raise InputError(f"method key {card.key!r} is registered twice")
        _METHODS[card.key] = cls
        _CARDS[card.key] = card
        cls.CARD = card  # type: ignore[attr-defined]
        return cls

    return enter


@functools.cache
def _load() -> None:
    """Import every file of this package once; each registers itself."""
    package = importlib.import_module("tare.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"tare.methods.{module.name}")


def keys(kind: Literal["gradient", "forward"] | None = None) -> list[str]:
    """The method keys, in alphabetical order; of one kind, or all."""
    _load()
    return sorted(key for key in _METHODS if kind in (None, _CARDS[key].kind))


def _known(key: str) -> str:
    if key not in keys():
        raise InputError(f"method: {key!r} is unknown{nearest(key, keys())}; known: {', '.join(keys())}")
    return key


def card(key: str) -> Card:
    """The card of a method. Raises InputError naming the known keys."""
    return _CARDS[_known(key)]


def method_class(key: str) -> type[Optimizer]:
    """The named constructor of a method."""
    return _METHODS[_known(key)]


def options(key: str) -> dict[str, inspect.Parameter]:
    """The constructor's own arguments, by name, without `params` and `lr`."""
    parameters = inspect.signature(method_class(key).__init__).parameters
    return {n: p for n, p in parameters.items() if n not in (*_COMMON, "self")}


def build(key: str, params: Any, lr: float, **hyper: Any) -> Optimizer:
    """An optimizer by registry key, with the method's own hyperparameters.

    >>> import torch
    >>> build("galore", torch.nn.Linear(8, 6), lr=1e-2, rank=2).leaves[0].role
    'linear'

    Raises:
        InputError: unknown key or option (the nearest is named), or a value out of range.
    """
    known = options(key)
    renamed = {PUBLISHED_NAMES.get(n, n) if n not in known else n: v for n, v in hyper.items()}
    for name in renamed:
        if name not in known:
            raise InputError(
                f"method {key!r} has no option {name!r}{nearest(name, list(known))}; options: {', '.join(known)}"
            )
    return method_class(key)(params, lr, **renamed)  # type: ignore[arg-type]


def preset(key: str, model_name: str) -> dict[str, Any]:
    """Constructor arguments (lr included) for a named model; the card's `*` entry for others."""
    presets = card(key).presets
    return dict(presets.get(model_name, presets.get("*", {})))
