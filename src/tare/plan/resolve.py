"""One place where a method key becomes constructor arguments, so that what is planned is what is run."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tare.core.errors import InputError, nearest
from tare.core.optimizer import Optimizer
from tare.core.storage import Storage
from tare.core.weights import quantize_weights_
from tare.methods import registry
from tare.plan.shapes import named


@dataclass(frozen=True)
class Choice:
    """A method with everything that `registry.build` wants to know."""

    key: str
    lr: float
    options: dict[str, Any]  # constructor arguments of the method, without lr, storage and release
    storage: Storage
    release: bool = False

    def build(self, params: Any, seed: int = 0) -> Optimizer:
        """The optimizer."""
        more = {"release": self.release} if "release" in registry.options(self.key) else {}
        return registry.build(self.key, params, self.lr, **self.options, **more, storage=self.storage, seed=seed)


def resolve(
    key: str,
    model: str | Path | None = None,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    hyper: dict[str, Any] | None = None,
    storage: dict[str, Any] | Storage | None = None,
    release: bool = False,
) -> Choice:
    """The method's preset for the model, overridden by `hyper` and `storage`.

    Args:
        key: a registered method.
        model: a named model has presets of its own.
        dtype: of the weights; bf16 weights are rounded stochastically unless `storage` or the method says otherwise.
        hyper: constructor arguments, `lr` among them; None values are ignored.
        storage: single fields go on top of the method's own storage (8-bit methods stay 8-bit); a `Storage` replaces it.
        release: step inside backward.

    Raises:
        InputError: an unknown key or option, or a method that cannot step inside backward.
    """
    wanted = {name: value for name, value in (hyper or {}).items() if value is not None}
    options = {**registry.preset(key, (named(str(model)) if model else None) or "*"), **wanted}
    if release and registry.card(key).release == "no":
        raise InputError(f"method {key!r} cannot step inside backward: leave out --release")
    lr = float(options.pop("lr", 1e-3))
    known = registry.options(key)
    for name in options:
        if name not in known and registry.PUBLISHED_NAMES.get(name) not in known:
            raise InputError(
                f"method {key!r} has no option {name!r}{nearest(name, list(known))}; options: {', '.join(known)}"
            )
    if isinstance(storage, Storage):
        return Choice(key, lr, options, storage, release)
    own = _own_storage(key, lr)
    changes: dict[str, Any] = {"weight": "stochastic"} if dtype == "bf16" and own.weight == "plain" else {}
    changes.update(storage or {})
    Storage.of(changes)  # names and values are checked before they meet the method's own
    return Choice(key, lr, options, dataclasses.replace(own, **changes), release)


@lru_cache
def _own_storage(key: str, lr: float) -> Storage:
    """The storage that a method has when nothing is said about it."""
    probe: nn.Module = nn.Linear(2, 2)
    quantize_weights_(probe)  # which goes with any storage
    try:
        return registry.build(key, probe, lr).storage
    except InputError:  # a method that wants a list of blocks, as those do that stream them
        return registry.build(key, nn.ModuleList([nn.Linear(2, 2)]), lr).storage


def require_gradients(keys: Iterable[str]) -> None:
    """Raise InputError for a method that steps by `step(closure)` alone, where single steps with gradients are looked at."""
    for key in keys:
        if registry.card(key).kind != "gradient":
            raise InputError(
                f"method {key!r} evaluates losses in opt.step(closure), and this measures steps with gradients: see tare plan, tare train"
            )


def applicable(key: str, hyper: dict[str, Any], alone: bool = True) -> dict[str, Any]:
    """The part of `hyper` that this method has a use for (a rank means nothing to AdamW).

    alone: False where several methods share `hyper`; one made for rank 1 (apollo-mini) then stays what it is.
    """
    known = registry.options(key)
    if not alone and "rank" in known and known["rank"].default == 1:
        hyper = {name: value for name, value in hyper.items() if name != "rank"}
    return {
        name: value
        for name, value in hyper.items()
        if name in ("lr", *known) or registry.PUBLISHED_NAMES.get(name) in known
    }


def check_known(hyper: dict[str, Any], keys: list[str]) -> None:
    """Raise InputError for an option that none of the methods has."""
    names = sorted({"lr", *registry.PUBLISHED_NAMES, *(name for key in keys for name in registry.options(key))})
    for name in hyper:
        if name not in names:
            raise InputError(f"no method among {', '.join(keys)} has an option {name!r}{nearest(name, names)}")
