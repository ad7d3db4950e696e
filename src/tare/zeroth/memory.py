"""Memory plans: how a model comes to stand at theta + a perturbation for the time of one evaluation.

| name | class | writes weights | memory beyond inference | restores |
|---|---|---|---|---|
| `forward` | `InForward` | never | the leaves of the module that runs | nothing to restore |
| `in-place-exact` | `ExactInPlace` | 4 times a two-sided step | about a tenth of the trained leaves | bit for bit |
| `in-place` | `InPlace` | 3 times | nothing | up to rounding, as published codes |
"""

from typing import Any

from torch import nn

from tare.core.errors import InputError
from tare.zeroth.inforward import InForward
from tare.zeroth.inplace import Displacement, ExactInPlace, InPlace
from tare.zeroth.moved import Loss, Memory, Moved
from tare.zeroth.swaps import Site

__all__ = ["Displacement", "ExactInPlace", "InForward", "InPlace", "Loss", "Memory", "Moved", "Site", "choose"]


def choose(name: str, params: Any) -> Memory:
    """The plan by name: `auto` perturbs inside forward where `params` is a module, else in place and exactly.

    Raises:
        InputError: a name that is none, or a plan that cannot be.
    """
    module = params if isinstance(params, nn.Module) else None
    if name == "forward" and module is None:
        raise InputError("memory: 'forward' perturbs inside the modules; give the model itself as params")
    if module is not None and name in ("auto", "forward"):
        return InForward(module)
    if name in ("auto", "in-place-exact"):
        return ExactInPlace()
    if name == "in-place":
        return InPlace()
    raise InputError(f"memory: expected auto, forward, in-place or in-place-exact, got {name!r}")
