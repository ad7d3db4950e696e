"""Weights of whole models: made int8 and back, and as plain tensors for files, whatever form each is kept in."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight, ZeroForm
from tare.core.leaf import Leaf, named_roles
from tare.core.recipe import Match, matches


@torch.no_grad()
def quantize_weights_(
    model: nn.Module, targets: Match | Iterable[Match] = ("linear",), group: int = 256, zero: ZeroForm = "symmetric"
) -> list[str]:
    """Replace parameters of `model` by int8 ones, in place: `Int8Weight`, which behave like the float tensors they stand for.

    Every group of `group` consecutive elements shares a scale; the last one may be short. Gradients stay dense, of the old dtype.
    Train with `Storage(weight="int8")`; build the optimizer after this call, because parameters are new objects.

    Args:
        model: fp32 or bf16; what is int8 already is left alone.
        targets: roles or globs on names, as in a recipe; default linear layers, as in Q-GaLore (arXiv 2407.08296).
        group: default 256, of the paper (Q-APOLLO: 128).
        zero: `symmetric` (default): 1 + 4 / group bytes a weight; `affine` or `clamped`: see `Int8Weight`.

    Returns:
        The names that were replaced; tied ones once.

    Raises:
        InputError: nothing matches, or a dtype, group or zero that cannot be.

    >>> layer = nn.Linear(64, 64)
    >>> quantize_weights_(layer), weight_bytes(layer)
    (['weight'], 4416)
    """
    wanted = (targets,) if isinstance(targets, str) or callable(targets) else tuple(targets)
    chosen = []
    replaced: dict[Tensor, nn.Parameter] = {}
    for name, p, role in list(named_roles(model)):
        leaf = Leaf(name, tuple(p.shape), p.dtype, role)
        if not any(matches(match, leaf) for match in wanted):
            continue
        chosen.append(name)
        if not isinstance(p, Int8Weight):
            replaced[p] = nn.Parameter(Int8Weight.encode(p, group, zero), requires_grad=p.requires_grad)
            if was_read(p):
                mark_read(replaced[p])
    if not chosen:
        raise InputError(
            f"targets: {wanted!r} matches no parameter of {type(model).__name__}; give roles or globs on names"
        )
    _replace(model, replaced)
    return chosen


@torch.no_grad()
def dequantize_weights_(model: nn.Module) -> list[str]:
    """The way back: int8 parameters become ordinary ones of the dtype they stood for. Returns their names."""
    found = [(name, p) for name, p in model.named_parameters() if isinstance(p, Int8Weight)]
    _replace(model, {p: nn.Parameter(p.dense(), requires_grad=p.requires_grad) for _, p in found})
    return [name for name, _ in found]


def _replace(model: nn.Module, new: dict[Tensor, nn.Parameter]) -> None:
    """Everywhere: a tied weight stays tied."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p in new:
                module._parameters[name] = new[p]


def mark_read(p: nn.Parameter) -> None:
    """Note on a parameter that its values come from a file, so that they need not be kept elsewhere while it is frozen."""
    p._tare_read = True  # type: ignore[attr-defined]


def was_read(p: Tensor) -> bool:
    """Whether `mark_read` was called on it."""
    return bool(getattr(p, "_tare_read", False))


def plain_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A weight as named plain tensors that share its memory: itself, or `name.codes`, `name.scale` (and `name.zero`)."""
    if isinstance(tensor, Int8Weight):
        return {f"{name}.{part}": inner for part, inner in tensor.parts().items()}
    return {name: tensor}


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with int8 weights decoded: what any other program loads."""
    decoded: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Int8Weight):  # a tied one once, so that it stays tied
            place = tensor.codes.data_ptr()
            tensor = decoded.setdefault(place, decoded[place] if place in decoded else tensor.dense())
        state[name] = tensor
    return state


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are kept, tied ones once."""
    parts = (part for p in model.parameters() for part in plain_parts("", p.detach()).values())
    return sum(part.numel() * part.element_size() for part in parts)


def is_quantized(model: nn.Module) -> bool:
    """Whether any parameter is int8."""
    return any(isinstance(p, Int8Weight) for p in model.parameters())


def holds_int8(params: Any) -> tuple[Any, bool]:
    """Whether what an optimizer is given (module, tensors, named tensors, groups) has int8 weights; and `params`, unspent."""
    if isinstance(params, nn.Module):
        return params, is_quantized(params)
    if isinstance(params, Tensor) or not isinstance(params, Iterable) or isinstance(params, set):
        return params, False  # refused by the optimizer itself
    items = list(params)
    found = False
    for number, item in enumerate(items):
        inner = item.get("params", ()) if isinstance(item, dict) else (item,)
        if isinstance(item, dict) and not isinstance(inner, nn.Module | Tensor | set):
            inner = list(inner)
            items[number] = {**item, "params": inner}
        if isinstance(inner, nn.Module):
            found = found or is_quantized(inner)
            continue
        inner = (inner,) if isinstance(inner, Tensor) else inner
        found = found or any(isinstance(x[1] if isinstance(x, tuple) else x, Int8Weight) for x in inner)
    return items, found
