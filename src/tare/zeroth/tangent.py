"""Tangents: loss and exact directional derivative in one pass of forward-mode differentiation (Baydin et al. 2022, arXiv 2202.08587).

The direction of every trained leaf is held for that long, unlike where losses are compared; so are the tangents of a layer's activations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tare.core.errors import InputError
from tare.zeroth.closure import loss_from
from tare.zeroth.memory import Moved
from tare.zeroth.probes import Point


def slope_at(model: nn.Module | None, leaves: list[Moved], point: Point, closure: Callable[[], Any]) -> tuple[Any, Any]:
    """(loss, derivative) of the closure at theta along `point.along`, each as `loss_from` gives it.

    Raises:
        InputError: the optimizer was not built from a module; the closure's loss is no tensor that the weights lead to; an operation
            of the model has no forward-mode derivative.
    """
    if model is None:
        raise InputError("forward gradient: weights are replaced inside the modules; give the model itself as params")
    with (
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the fused attention kernels have no forward-mode derivative
        with _dual(model, leaves, point):
            try:
                value = closure()
            except NotImplementedError as error:
                what = str(error).partition("\n")[0]
                raise InputError(f"forward gradient: {what}; use probe='two-sided'") from error
        if not isinstance(value, Tensor):
            raise InputError(
                f"closure: a forward gradient is read from the loss as a tensor, got {type(value).__name__}; return the tensor itself"
            )
        loss, slope = forward_ad.unpack_dual(value)
        if slope is None:
            raise InputError(
                "closure: the loss does not depend on the weights in a differentiable way; use probe='two-sided'"
            )
        return loss_from(loss), loss_from(slope)


@contextmanager
def _dual(model: nn.Module, leaves: list[Moved], point: Point) -> Iterator[None]:
    """Each module's own trained weights with a tangent, while inside."""
    duals: dict[Tensor, Tensor] = {}
    for leaf in leaves:
        weight = leaf.parameter.detach()
        tangent = torch.zeros_like(weight)
        leaf.add_(tangent, Point(point.along))
        duals[leaf.parameter] = forward_ad.make_dual(weight, tangent)
    owned: list[tuple[nn.Module, str, Tensor]] = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and p in duals
    ]
    try:
        for module, name, p in owned:
            module._parameters[name] = duals[p]  # type: ignore[assignment]  # read by forward as any parameter
        yield
    finally:
        for module, name, p in owned:
            module._parameters[name] = p  # type: ignore[assignment]
