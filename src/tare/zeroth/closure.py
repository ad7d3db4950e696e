"""Closures: what they may return, and which models they may run."""

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.clipping import numbers_of
from tare.core.errors import InputError


def loss_from(value: Any) -> Tensor | float:
    """What a closure returned as one number: a 0-d tensor, still on its device, or a float. Raises InputError where it is none."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            what = "complex numbers" if value.is_complex() else f"a tensor of shape {tuple(value.shape)}"
            raise InputError(f"closure: expected a loss of one element, got {what}; return the mean over the batch")
        return value.detach().reshape(())
    if isinstance(value, Real):
        return float(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array of NumPy without dimensions
        return loss_from(value.item())
    hint = "; return its .loss" if getattr(value, "loss", None) is not None else "; return the loss"
    raise InputError(f"closure: expected a tensor of one element or a number, got {type(value).__name__}{hint}")


def as_number(value: Any) -> float:
    """A loss as a number. Raises InputError where it is none."""
    return float(loss_from(value))


def numbers(losses: Iterable[Tensor | float]) -> list[float]:
    """Losses as numbers; the host waits once for each device, however many there are."""
    found = list(losses)
    read = iter(numbers_of([loss for loss in found if isinstance(loss, Tensor)]))
    return [float(next(read)) if isinstance(loss, Tensor) else loss for loss in found]


def mean(losses: list[float]) -> float:
    """NaN for none, or where one is not finite."""
    if not losses or not all(map(math.isfinite, losses)):
        return math.nan
    return math.fsum(losses) / len(losses)


class Watch:
    """What makes losses at two points differ for other reasons than the points, looked for in a model; None: there is none to look at."""

    def __init__(self, model: nn.Module | None):
        named = list(model.named_modules()) if model is not None else []
        norms = nn.modules.batchnorm._NormBase
        self._norms = [(name, m) for name, m in named if isinstance(m, norms) and m.track_running_stats]
        self._drops = [(name, m) for name, m in named if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
        self._told: set[str] = set()

    def model(self) -> None:
        """Before a step. Raises InputError for statistics that every evaluation would move."""
        for name, module in self._norms:
            if module.training:
                raise InputError(
                    f"{name or 'the model'}: batch normalisation in training mode changes its statistics at every evaluation; call "
                    "model.eval(), or put these modules in eval mode"
                )
        dropping = [name for name, module in self._drops if module.training]
        if dropping:
            others = f" and {len(dropping) - 1} more" if len(dropping) > 1 else ""
            self._once(
                "dropout",
                f"{dropping[0]}{others} drop out: every evaluation of a step drops the same, but model.eval() gives less noise, and is "
                "what MeZO does",
            )

    def loss(self, value: Tensor | float) -> None:
        """After an evaluation."""
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
            self._once(
                "loss",
                f"the loss is {str(value.dtype).removeprefix('torch.')}: differences of less than 1 % are lost in it; return it in "
                "float32, from logits.float()",
            )

    def gradients(self, parameters: Iterable[Tensor]) -> None:
        """Before the first step."""
        if "gradients" not in self._told and any(p.grad is not None for p in parameters):
            self._once(
                "gradients", "parameters have gradients: this method does not read them; leave out loss.backward()"
            )
        self._told.add("gradients")

    def _once(self, subject: str, text: str) -> None:
        if subject not in self._told:
            self._told.add(subject)
            warnings.warn(text, stacklevel=5)


def explained(error: RuntimeError) -> InputError | None:
    """The line for an error of torch that a closure of a gradient method runs into here; None for any other."""
    if "does not require grad" in str(error) and torch.is_grad_enabled() is False:
        return InputError(
            "closure: it must not call backward(), no gradient is computed here; return the loss and nothing else"
        )
    return None
