"""Models held in 4 or 8 bits while they are trained: how that is written, planned, done, and undone when the model is saved."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tare.plan.activations import Workload

_FORM = re.compile(r"int([48])(?::group=([1-9]\d*|none))?")


@dataclass(frozen=True)
class Quantization:
    """Linear layers, the output head apart, as whole numbers of `bits` with a scale for every `group` inputs; None: for all of them."""

    bits: int
    group: int | None = 128

    @classmethod
    def parse(cls, text: str, where: str = "model.quantize") -> "Quantization":
        """From a setting.

        >>> Quantization.parse("int4:group=64"), Quantization.parse("int8")
        (Quantization(bits=4, group=64), Quantization(bits=8, group=128))

        Raises:
            InputError: it is written otherwise.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise InputError(f"{where}: expected int4 or int8, with :group=N or :group=none behind it, got {text!r}")
        group = match[2] or "128"
        return cls(int(match[1]), None if group == "none" else int(group))

    def apply_(self, model: "nn.Module") -> int:
        """Round a model's linear layers; returns how many. Raises `InputError` where there are none."""
        from tare.zeroth.quantized import quantize_linear_

        return len(quantize_linear_(model, self.bits, self.group))

    def sketch_(self, model: "nn.Module") -> None:
        """The same without numbers: for models on fake tensors or the meta device."""
        from torch import nn

        from tare.core.leaf import named_roles
        from tare.zeroth.quantized import QuantizedLinear, replace_module

        for name, p, role in list(named_roles(model)):
            owner, _, own = name.rpartition(".")
            linear = model.get_submodule(owner)
            if role == "linear" and own == "weight" and type(linear) is nn.Linear:
                rows, columns, bias = linear.out_features, linear.in_features, linear.bias is not None
                made = QuantizedLinear(columns, rows, self.bits, self.group, bias, device=p.device)
                if bias:
                    made.bias = linear.bias
                replace_module(model, owner, made.train(linear.training))


def check_methods(quantize: str | None, methods: list[str] | None) -> None:
    """Raise `InputError` unless a model is quantised for methods that train its scales, and for no others; None: it is not said which."""
    from tare.methods import registry

    if quantize is None:
        for key in filter(trains_scales, methods or []):
            raise InputError(
                f"model.quantize: missing; {key} trains the scales of a quantised model: set it (--quantize int4:group=128), or use mezo"
            )
        return
    for key in methods or ["auto"]:
        if key == "auto" or not trains_scales(key):
            able = ", ".join(filter(trains_scales, registry.keys("forward")))
            raise InputError(f"model.quantize: {key} trains weights, not scales; leave it out, or use {able}")


def trains_scales(key: str) -> bool:
    """Whether a method trains the scales of quantised models."""
    from tare.methods import registry

    return bool(getattr(registry.method_class(key), "trains_scales", False))


def planned(work: "Workload | None", quantization: Quantization, batch: int, seq: int) -> "Workload":
    """A workload, or packed text, on a model held in few bits."""
    from tare.train.altered import Altered

    return Altered(work, batch, seq, quantization.sketch_, [quantization.bits, quantization.group])


def dense_state(model: "nn.Module", dtype: Any) -> "dict[str, Tensor] | None":
    """The state dict with the weights that codes and scales stand for; None where nothing is quantised."""
    from tare.zeroth.quantized import QuantizedLinear

    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not found:
        return None
    state = dict(model.state_dict())
    for name, module in found.items():
        for part in ("codes", "zero", "scale", "order"):
            state.pop(f"{name}.{part}", None)
        state[f"{name}.weight"] = module.to_linear(dtype).weight.detach()
    return state
