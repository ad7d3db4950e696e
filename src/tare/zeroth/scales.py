"""Scales: what a quantised model has that is continuous (QZO, arXiv 2505.13430). Where they are in a model, and a law relative to them.

Found are `QuantizedLinear` layers, tensors made of codes and scales (`Int8Weight`, the subclasses of torchao), and modules that hold
`scales` beside whole numbers (GPTQ's and AQLM's layers of other packages).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tare.core.errors import InputError
from tare.core.state import State
from tare.zeroth.directions import Draw
from tare.zeroth.memory import Site
from tare.zeroth.quantized import QuantizedLinear
from tare.zeroth.wrapped import Wrapped

KNOWN = (
    "QuantizedLinear (tare.quantize_linear_), Int8Weight (tare.quantize_weights_), torchao tensors with scales of their own, modules with "
    "qweight or codes beside scales (GPTQ, AQLM)"
)
_CODES = ("qdata", "int_data", "codes")  # of a tensor made of others
_WHOLE = ("qweight", "codes")  # of a module
# parts of class names by which quantised layers are told from layers that have an integer buffer for another reason
_HINTS = ("quant", "4bit", "8bit", "int4", "int8", "awq", "hqq", "eetq", "fp4", "nf4", "marlin", "wqlinear", "qlinear")
_SMALL = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)


@dataclass(frozen=True, eq=False)
class Scale:
    """The scales of one quantised weight.

    name: in the model. tensor: a parameter that shares their memory. site: where a forward reads them; None where `tensor` is a parameter
    of a module.
    """

    name: str
    tensor: nn.Parameter
    site: Site | None = None

    def here(self) -> Tensor:
        """The scales that the model holds now."""
        if self.site is None:
            return self.tensor
        found = self.site.get()
        for name in self.site.part:
            found = getattr(found, name)
        assert isinstance(found, Tensor)
        return found

    def linked(self) -> bool:
        """Whether `tensor` is still what the model computes with."""
        here = self.here()
        return here.data_ptr() == self.tensor.data_ptr() and here.shape == self.tensor.shape

    def relink(self) -> None:
        """Make it so, after both were copied."""
        if not self.linked():
            self.tensor.data = self.here().detach()


def find_scales(model: nn.Module) -> list[Scale]:
    """The scales of every quantised layer, in the order of modules, tied ones once.

    Raises:
        InputError: a layer that is quantised in a way that is not known.
    """
    found: list[Scale] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        scales = list(_of_module(path, module))
        if not scales:
            _refuse_unknown(path, module)
        for scale in scales:
            place = scale.here().data_ptr() or id(scale.here())  # on the meta device nothing has a place
            if place not in seen:
                seen.add(place)
                found.append(scale)
    return found


def _of_module(path: str, module: nn.Module) -> Iterator[Scale]:
    prefix = f"{path}." if path else ""
    if isinstance(module, QuantizedLinear):
        yield Scale(f"{prefix}scale", module.scale)
        return
    own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    for name, tensor in own.items():
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            for part in _parts(tensor):
                site = Site(module, name, part)
                yield _alias(f"{prefix}{name}.{'.'.join(part)}", site)
    whole = any(name in own and not _is_float(own[name]) for name in _WHOLE)
    scales = own.get("scales", module.__dict__.get("scales"))
    if whole and isinstance(scales, Tensor) and scales.is_floating_point():
        yield _alias(f"{prefix}scales", Site(module, "scales"))


def _alias(name: str, site: Site) -> Scale:
    held = site.get()
    if not site.part and isinstance(held, nn.Parameter):
        return Scale(name, held)
    scale = Scale(name, nn.Parameter(torch.empty(0)), site)
    return replace(scale, tensor=nn.Parameter(scale.here().detach()))


def _parts(tensor: Any) -> Iterator[tuple[str, ...]]:
    """Where the scales of codes are within a tensor made of others: `scale` beside codes, at any depth."""
    inner = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    scale = inner.get("scale")
    if any(name in inner for name in _CODES) and isinstance(scale, Tensor) and scale.is_floating_point():
        yield ("scale",)
        return
    for name, part in inner.items():
        if is_traceable_wrapper_subclass(part):
            yield from ((name, *rest) for rest in _parts(part))


def _is_float(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _refuse_unknown(path: str, module: nn.Module) -> None:
    """Nothing was found in the module itself: is it a quantised layer all the same?"""
    own = {**module._parameters, **module._buffers}
    hinted = any(hint in type(module).__name__.lower() for hint in _HINTS)
    odd = next(
        (n for n, t in own.items() if t is not None and is_traceable_wrapper_subclass(t) and _holds_codes(t)), None
    )
    whole = next((n for n, t in own.items() if t is not None and t.dtype in _SMALL and t.ndim >= 1), None)
    packed = hasattr(module, "_packed_params") or (hinted and whole is not None)
    if odd is None and not packed and whole != "weight":
        return
    what = f"{type(own[odd]).__name__} {odd} in {type(module).__name__}" if odd is not None else type(module).__name__
    raise InputError(
        f"{path or 'the model'} ({what}): a quantised layer of a kind whose scales are not known; known are {KNOWN}; quantise it in one of "
        "these ways, or leave it in float"
    )


def _holds_codes(tensor: Any) -> bool:
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return any(_holds_codes(t) if is_traceable_wrapper_subclass(t) else t.dtype in _SMALL for t in inner)


@dataclass(frozen=True)
class Relative(Wrapped):
    """theta z: each number is perturbed and stepped by a share of itself, theta (1 + eps z) and theta (1 - lr delta z).

    A 4-bit scale of weights near 0.05 is 7e-3, so an absolute perturbation of 1e-3 is no small one. V is that of the gradient with
    respect to the logarithm.
    """

    reads_weight = True

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = draw.leaf.numel if stop is None else stop
        z = self.law.draw(draw, state, weight, start, stop)
        return z * weight.reshape(-1)[start:stop].to(z.dtype)

    def describe(self) -> str:
        return f"{self.law.describe()}, relative"
