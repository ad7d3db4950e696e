"""Leaf: one parameter tensor with its name, shape, dtype and role; and how roles are found.

Roles come from the modules when an `nn.Module` is given, from names when only names are known, else from the number of dimensions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tare.core.errors import InputError, nearest

Role = Literal["linear", "embedding", "head", "norm", "bias", "conv", "expert", "scalar"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Leaf:
    """One parameter tensor, symbolically.

    >>> Leaf("conv.weight", (8, 3, 5, 5), torch.float32, "conv").matrix
    (8, 75)
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """(m, n) as a low-rank rule sees it: a convolution is (out, in * kernel), experts are many such matrices; None for
        what is no matrix."""
        if len(self.shape) < 2 or self.numel == 0:
            return None
        if self.role == "expert" and len(self.shape) > 2:
            return self.shape[-2], self.shape[-1]
        return self.shape[0], self.numel // self.shape[0]

    @property
    def stack(self) -> tuple[int, ...]:
        """() for a single matrix, (E,) for E experts in one tensor [E, m, n]: each is a matrix of its own."""
        return (math.prod(self.shape[:-2]),) if self.role == "expert" and len(self.shape) > 2 else ()

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which rules for matrices see this leaf: [m, n], or [E, m, n]."""
        assert self.matrix is not None
        return (*self.stack, *self.matrix)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 for float64 parameters, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def role_of_module(module: nn.Module, attribute: str, parameter: Tensor) -> Role | None:
    """Role of a parameter owned by a known kind of module; None when the module says nothing."""
    kind = type(module).__name__
    if attribute == "bias":
        return "bias"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if "norm" in kind.lower():
        return "norm"
    if isinstance(module, nn.Linear) or (kind == "Conv1D" and parameter.ndim == 2):
        return "linear"
    return None


def role_of_name(name: str, shape: tuple[int, ...]) -> Role:
    """Role from a dotted name and a shape; with an empty name the shape alone decides (2-D linear, 1-D norm)."""
    parts = name.lower().split(".")
    last, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
    if len(shape) == 0:
        return "scalar"
    if last == "bias":
        return "bias"
    if len(shape) == 1:
        return "norm"
    if len(shape) == 3:
        return "expert"
    if len(shape) > 3:
        return "conv"
    if owner in ("lm_head", "head", "classifier", "score", "embed_out", "output"):
        return "head"
    if "embed" in owner or "embed" in last or owner in ("wte", "wpe"):
        return "embedding"
    return "linear"


def named_roles(model: nn.Module) -> Iterator[tuple[str, Tensor, Role]]:
    """(name, parameter, role) of every distinct parameter; a tied weight appears once, under its first name."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner_name, _, attribute = name.rpartition(".")
        module = owners[owner_name]
        by_name = role_of_name(name, tuple(parameter.shape))
        role = role_of_module(module, attribute, parameter) or by_name
        if role == "linear" and (module is output or by_name == "head"):
            role = "head"
        yield name, parameter, role


def check_role(role: Any) -> Role:
    if role not in ROLES:
        raise InputError(f"role: {role!r} is not one of {', '.join(ROLES)}{nearest(str(role), ROLES)}")
    return role


def normalise_group(group: dict[str, Any]) -> tuple[dict[str, Any], dict[Tensor, Role]]:
    """A parameter group in torch's form (named tuples stay named), and the role of each of its parameters."""
    group = dict(group)
    forced = group.pop("role", None)
    params = group["params"]
    roles: dict[Tensor, Role] = {}
    if isinstance(params, nn.Module):
        listed = list(named_roles(params))
        group["params"] = [(name, p) for name, p, _ in listed]
        roles = {p: role for _, p, role in listed}
    else:
        if isinstance(params, Tensor):
            params = [params]
        elif isinstance(params, set):
            raise TypeError("params: a set has no fixed order; give a list, so that runs can be repeated")
        items: list[Any] = list(params)
        group["params"] = items
        for item in items:
            name, p = item if isinstance(item, tuple) else ("", item)
            if isinstance(p, Tensor):
                roles[p] = role_of_name(name, tuple(p.shape))
    if forced is not None:
        roles = dict.fromkeys(roles, check_role(forced))
    return group, roles


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Whatever the user gave (module, tensors, named tensors, groups) as a list of groups, before normalising."""
    if isinstance(params, nn.Module):
        if next(params.parameters(), None) is None:
            raise InputError(f"params: the module {type(params).__name__} has no parameters")
        return [{"params": params}]
    if isinstance(params, Tensor):
        raise TypeError(
            "params: expected a module, or an iterable of tensors, (name, tensor) pairs or groups; got one Tensor"
        )
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected a module or an iterable of tensors or groups, got {type(params).__name__}")
    if isinstance(params, set):
        raise TypeError("params: a set has no fixed order; give a list, so that runs can be repeated")
    items = list(params)
    if not items:
        raise InputError("params: the optimizer got an empty parameter list; give a module with trainable parameters")
    return items if isinstance(items[0], dict) else [{"params": items}]
