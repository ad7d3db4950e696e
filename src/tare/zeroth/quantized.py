"""QuantizedLinear: a linear layer whose weight is whole numbers in 4 or 8 bits and one scale for each group of inputs.

W[o, i] = scale[o, g] (code[o, i] - zero[o, g]). Codes and zeros are buffers and stay as they are; the scales are its parameter.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tare.core.errors import InputError
from tare.core.leaf import Leaf, named_roles
from tare.core.recipe import Match, matches
from tare.kernels import groupwise, nibbles
from tare.kernels.blockwise import chunk_elements


class QuantizedLinear(nn.Module):
    """y = x W^T + b. The dense W exists while the product runs, in the dtype of x.

    Args:
        in_features, out_features: n and m.
        bits: 4, two codes a byte, or 8.
        group: inputs that share a scale; None: all of them, one scale for each output. The last group may be short.
        bias: whether there is one.
        dtype: of the scales, default fp32: steps of a scale are far smaller than the gap between two 16-bit numbers.
        ordered: whether inputs are taken in another order than they come (groups that are no neighbours, GPTQ's `desc_act`).

    Raises:
        InputError: bits other than 4 or 8; a group that is no positive number.

    >>> layer = QuantizedLinear.from_linear(nn.Linear(64, 32), bits=4, group=16)
    >>> layer(torch.ones(2, 64)).shape, [(n, tuple(p.shape)) for n, p in layer.named_parameters()]
    (torch.Size([2, 32]), [('scale', (32, 4)), ('bias', (32,))])
    """

    codes: Tensor  # uint8 [m, n], or packed [m, ceil(n / 2)]
    zero: Tensor  # uint8 [m, groups]
    order: Tensor | None  # int64 [n]: stored input number -> input

    def __init__(
        self, in_features: int, out_features: int, bits: int = 4, group: int | None = 128, bias: bool = True, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, ordered: bool = False,
    ):  # fmt: skip
        super().__init__()
        if bits not in (4, 8):
            raise InputError(f"quantised layer: bits must be 4 or 8, got {bits!r}")
        group = in_features if group is None else group
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise InputError(f"quantised layer: group must be a whole number of at least 1, or None, got {group!r}")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group = min(group, in_features)
        width = in_features if bits == 8 else nibbles.packed_numel(in_features)
        groups = (out_features, -(-in_features // self.group))
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("zero", torch.zeros(groups, dtype=torch.uint8, device=device))
        self.register_buffer("order", torch.arange(in_features, device=device) if ordered else None)
        self.scale = nn.Parameter(torch.zeros(groups, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, bits: int = 4, group: int | None = 128, symmetric: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> "QuantizedLinear":  # fmt: skip
        """A layer rounded to the nearest codes. symmetric: the zero is the middle code, and a scale reaches from it to max |w|; else
        codes span the group's least and greatest weight and 0."""
        w = linear.weight.detach()
        made = cls(w.shape[1], w.shape[0], bits, group, linear.bias is not None, dtype=dtype, device=w.device)
        codes, first = torch.empty(w.shape, dtype=torch.uint8, device=w.device), 0
        whole = made.in_features // made.group
        for count, width in ((whole, made.group), (1, made.in_features - whole * made.group)):
            if not count or not width:
                continue
            columns, groups = slice(first * made.group, first * made.group + count * width), slice(first, first + count)
            part = w[:, columns].contiguous()
            found, scale, zero = groupwise.encode_affine(
                part, bits, width, symmetric=symmetric, span_zero=not symmetric
            )
            codes[:, columns] = found
            made.scale[:, groups] = scale.view(-1, count).to(dtype)
            made.zero[:, groups] = zero.view(-1, count).to(torch.uint8)
            first += count
        made.write(codes)
        if made.bias is not None and linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return made.train(linear.training)

    # -- codes ---------------------------------------------------------------------------------------------------------

    def write(self, codes: Tensor) -> None:
        """Keep these codes: [m, n] uint8, in stored order."""
        if self.bits == 8:
            self.codes.copy_(codes)
            return
        padded = F.pad(codes, (0, self.in_features % 2)) if self.in_features % 2 else codes
        self.codes.view(-1).copy_(nibbles.pack(padded.reshape(-1), padded.shape[1]))

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first .. last - 1 of the codes: [rows, n] uint8, in stored order."""
        kept = self.codes[first:last]
        if self.bits == 8:
            return kept
        width = 2 * kept.shape[1]
        return nibbles.unpack(kept.reshape(-1), kept.shape[0] * width, width).view(-1, width)[:, : self.in_features]

    # -- the weight ------------------------------------------------------------------------------------------------

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of W in stored order, in the dtype of the arithmetic: [last - first, n]. Differentiable with respect to the scales."""
        scale, zero = self.scale[first:last], self.zero[first:last]
        wide = torch.promote_types(scale.dtype, torch.float32)
        codes, scale, zero = self.read(first, last).to(wide), scale.to(wide), zero.to(wide)
        whole = self.in_features // self.group * self.group
        if whole == self.in_features:
            grouped = codes.view(last - first, -1, self.group)
            return ((grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)).view(last - first, -1)
        at = torch.arange(self.in_features, device=codes.device) // self.group
        return (codes - zero[:, at]) * scale[:, at]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W in stored order, [m, n]. Outside autograd it is put together from pieces of rows, so that nothing else of its size exists."""
        if torch.is_grad_enabled() and self.scale.requires_grad:
            return self.rows(0, self.out_features).to(dtype)
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        step = max(1, chunk_elements(self.codes.device) // max(1, self.in_features))
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            out[first:last] = self.rows(first, last)
        return out

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary layer with the weight that this one stands for."""
        made = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.codes.device, dtype=dtype
        )
        weight = self.dense(dtype)
        if self.order is None:
            made.weight.copy_(weight)
        else:
            made.weight.data[:, self.order] = weight
        if self.bias is not None and made.bias is not None:
            made.bias.copy_(self.bias)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.order is not None:
            x = x.index_select(-1, self.order)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dense(dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


@torch.no_grad()
def quantize_linear_(
    model: nn.Module, bits: int = 4, group: int | None = 128, targets: Match | Iterable[Match] = ("linear",),
    symmetric: bool = False, dtype: torch.dtype = torch.float32,
) -> list[str]:  # fmt: skip
    """Replace linear layers of `model` by `QuantizedLinear` ones, rounded to nearest, in place. What else there is stays as it is.

    Args:
        model: changed in place.
        bits, group, symmetric, dtype: as `QuantizedLinear.from_linear`; 4 bits in groups of 128, as QZO has them.
        targets: roles or globs on the names of weights, as in a recipe; default linear layers without the output head.

    Returns:
        The names of the layers.

    Raises:
        InputError: nothing matches, or a weight that matches is tied to another one or is no plain linear layer's.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2, bias=False))
    >>> quantize_linear_(model, group=4), [name for name, _ in model.named_parameters()]
    (['0', '2'], ['0.scale', '0.bias', '2.scale'])
    """
    wanted = (targets,) if isinstance(targets, str) or callable(targets) else tuple(targets)
    users: dict[Tensor, list[str]] = {}  # names of the weights of different modules
    for path, module in model.named_modules():
        for own, p in module._parameters.items():
            if p is not None:
                users.setdefault(p, []).append(f"{path}.{own}" if path else own)
    chosen = []
    for name, p, role in list(named_roles(model)):
        leaf = Leaf(name, tuple(p.shape), p.dtype, role)
        if not name.endswith("weight") or not any(matches(match, leaf) for match in wanted):
            continue
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if type(module) is not nn.Linear or attribute != "weight":
            raise InputError(f"targets: {name} belongs to a {type(module).__name__}, not to an nn.Linear; leave it out")
        if len(users[p]) > 1:
            raise InputError(f"targets: {name} is tied to {users[p][1]}, which would lose the tie; leave it out")
        if not owner:
            raise InputError("quantize_linear_: the model is itself a layer; call QuantizedLinear.from_linear(model)")
        chosen.append(owner)
    if not chosen:
        raise InputError(
            f"targets: {wanted!r} matches no linear layer of {type(model).__name__}; give roles or globs on names"
        )
    for name in chosen:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(model, name, QuantizedLinear.from_linear(linear, bits, group, symmetric, dtype))
    return chosen


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of a module, under every name that it has."""
    old = model.get_submodule(name)
    for owner in list(model.modules()):
        for attribute, child in owner._modules.items():
            if child is old:
                owner._modules[attribute] = new


def quantized_bytes(in_features: int, out_features: int, bits: int, group: int | None, scale_bytes: int = 4) -> int:
    """Bytes of codes, zeros and scales of a layer, before it is built.

    >>> quantized_bytes(4096, 4096, 4, 128)
    9043968
    """
    groups = out_features * math.ceil(in_features / min(group or in_features, in_features))
    return out_features * (in_features if bits == 8 else nibbles.packed_numel(in_features)) + groups * (1 + scale_bytes)
