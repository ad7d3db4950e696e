"""Int8Weight: a parameter kept as 8-bit codes with one scale for each group, that the model and autograd see as an ordinary float tensor.

Its gradient is dense and lies in `.grad`, so clipping, hooks and any optimizer find it there. Products decode it for the length of the
product, in forward and again in backward. Zhang et al. (2024), "Q-GaLore", arXiv:2407.08296.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from tare.core.errors import InputError
from tare.core.tensors import is_fake
from tare.kernels import groupwise, native_groupwise
from tare.kernels.blockwise import chunk_elements

ZeroForm = Literal["symmetric", "affine", "clamped"]
MIDDLE = 128  # the code of 0 in the symmetric form
aten = torch.ops.aten
# Each is told of a weight that is about to be decoded: kernels that do so read codes where none of torch's modes sees it.
LISTENERS: list[Callable[["Int8Weight"], None]] = []


class Int8Weight(Tensor):
    """W = (code - zero) * scale, codes uint8 in the shape of W, one scale (and zero) for `group` consecutive elements, row-major.

    `symmetric`: scale = max |W| / 127 of the group, zero = 128 and not kept: 1 + 4 / group bytes a weight. `affine`: steps between
    the least and the greatest, with a zero that is any whole number: 1 + 8 / group. `clamped`: the zero cut to a byte, as Q-GaLore's
    published code does; a group of one sign is destroyed by it (weights of 0.5 come back as 0.0099); only to reproduce.

    Views of it are dense copies. Writing in place (`copy_`, `zero_`, `mul_`) encodes anew, rounding to nearest.
    """

    codes: Tensor  # uint8, contiguous
    scale: Tensor  # [groups] fp32
    zero: Tensor | None  # [groups] fp32; None in the symmetric form
    group: int
    form: ZeroForm

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, zero: Tensor | None, group: int, form: ZeroForm, dtype: torch.dtype
    ) -> "Int8Weight":
        made: Int8Weight = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        return made

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, group: int, form: ZeroForm, dtype: torch.dtype
    ) -> None:
        self.codes, self.scale, self.zero, self.group, self.form = codes, scale, zero, group, form

    @classmethod
    def encode(cls, x: Tensor, group: int = groupwise.GROUP, form: ZeroForm = "symmetric") -> "Int8Weight":
        """A float tensor, rounded to the nearest codes; it keeps looking like the dtype of `x`.

        Raises:
            InputError: neither fp32 nor bf16, or a group or form that does not exist.
        """
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"int8 weights: expected float32 or bfloat16, got {x.dtype}; cast the model first")
        if form not in get_args(ZeroForm):
            raise InputError(f"int8 weights: zero {form!r} is not one of {', '.join(get_args(ZeroForm))}")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise InputError(f"int8 weights: group must be a whole number of at least 1, got {group!r}")
        if is_fake(x):
            codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
            scale, zero = (torch.empty(-(-x.numel() // group), device=x.device, dtype=torch.float32) for _ in range(2))
        else:
            codes, scale, zero = groupwise.encode_affine(
                x.detach().contiguous(), 8, group, symmetric=form == "symmetric", clamp_zero=form == "clamped"
            )
        return cls(codes, scale, None if form == "symmetric" else zero, group, form, x.dtype)

    # -- numbers ---------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> Tensor:
        """W as fp32, flat, elements start .. stop - 1; `start` is a multiple of `group`."""
        self._tell()
        out = torch.empty(stop - start, dtype=torch.float32, device=self.codes.device)
        return self._decode(self.codes.view(-1)[start:stop], *self._groups(start, stop), out)

    def _tell(self) -> None:
        for listener in LISTENERS:
            listener(self)

    def _decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> Tensor:
        if not native_groupwise.decode_into(codes, scale, zero, out, self.group):
            middle = scale.new_full((), MIDDLE).expand_as(scale) if zero is None else zero
            groupwise.decode_affine(codes, scale, middle, self.group, out)
        return out

    def write(self, start: int, x: Tensor, key: int | None = None, uniform: Tensor | None = None) -> None:
        """Replace elements from `start` (a multiple of `group`) by the fp32 numbers `x` [n], with new scales.

        key: rounds stochastically, by element number; None to nearest. uniform: recorded numbers for the rounding instead.
        """
        stop = start + x.numel()
        codes, scale, zero = groupwise.encode_affine(
            x,
            8,
            self.group,
            symmetric=self.form == "symmetric",
            clamp_zero=self.form == "clamped",
            key=key,
            start=start,
            uniform=uniform,
        )
        self.codes.view(-1)[start:stop].copy_(codes)
        own_scale, own_zero = self._groups(start, stop)
        own_scale.copy_(scale)
        if own_zero is not None:
            own_zero.copy_(zero)

    def step(self, start: int, update: Tensor, decay: float, alpha: float, key: int | None) -> None:
        """W <- decay W - alpha U for the elements from `start` (a multiple of `group`) on that fp32 `update` [n] has, with new scales.

        key: as in `write`.
        """
        stop = start + update.numel()
        scale, zero = self._groups(start, stop)
        codes = self.codes.view(-1)[start:stop]
        done = native_groupwise.step_(
            codes, scale, zero, update, group=self.group, form=self.form, decay=decay, alpha=alpha, key=key, start=start
        )
        if not done:
            self.write(start, self.read(start, stop).mul_(decay).sub_(update.mul(alpha)), key)

    def _groups(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        at = slice(start // self.group, -(-stop // self.group))
        return self.scale[at], None if self.zero is None else self.zero[at]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as a plain tensor of its own dtype, or of another; outside autograd."""
        self._tell()
        with torch.no_grad():
            out = torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device)
            if is_fake(self.codes):  # as below, without the loop over chunks
                if not native_groupwise.decode_into(self.codes, self.scale, self.zero, out, self.group):
                    torch.empty(min(chunk_elements(self.codes.device), out.numel()), device=out.device)
                return out
            return self._decode(self.codes, self.scale, self.zero, out)

    def rows(self, index: Tensor) -> Tensor:
        """The rows W[index] as a plain tensor [*index, ...]: nothing else is decoded."""
        self._tell()
        width = math.prod(self.codes.shape[1:])
        flat = index.reshape(-1, 1) * width + torch.arange(width, device=index.device)
        groups = flat // self.group
        zero = MIDDLE if self.zero is None else self.zero[groups]
        found = (self.codes.view(-1)[flat].to(torch.float32) - zero) * self.scale[groups]
        return found.to(self.dtype).view(*index.shape, *self.codes.shape[1:])

    def parts(self) -> dict[str, Tensor]:
        """The plain tensors that it consists of, by name."""
        return {"codes": self.codes, "scale": self.scale} | ({} if self.zero is None else {"zero": self.zero})

    # -- what torch asks of a tensor -------------------------------------------------------------------------------

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "Int8Weight":
        zero = None if self.zero is None else change(self.zero)
        return Int8Weight(change(self.codes), change(self.scale), zero, self.group, self.form, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.parts()), {"group": self.group, "form": self.form, "dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: dict[str, Any], *_: Any) -> "Int8Weight":
        return cls(inner["codes"], inner["scale"], inner.get("zero"), meta["group"], meta["form"], meta["dtype"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Weight":
        if id(self) not in memo:
            twin = self._with(Tensor.clone)
            memo[id(self)] = _dressed(twin, self.requires_grad, getattr(self, "_is_param", False))
            if self.grad is not None:
                memo[id(self)].grad = self.grad.detach().clone()
        twin = memo[id(self)]
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kept = (self.codes, self.scale, self.zero, self.group, self.form, self.dtype)
        return rebuild, (*kept, self.requires_grad, getattr(self, "_is_param", False))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, {self.dtype}, {self.form}, group={self.group})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = _FUNCTIONS.get(func)
        if own is not None:
            found = own(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Int8Weight):
            if func in (aten.detach.default, aten.alias.default, aten.lift_fresh.default):
                return first._with(lambda part: part.view(part.shape))
            if func is aten.clone.default:
                return first._with(Tensor.clone)
            if func is aten._to_copy.default and (kwargs.get("dtype") or torch.float32).is_floating_point:
                device = kwargs.get("device")
                return first._with(lambda part: part.to(device=device, copy=True), kwargs.get("dtype"))
            if func in _LIKE:
                return func(first.codes, *args[1:], **{**kwargs, "dtype": kwargs.get("dtype") or first.dtype})
            if func is aten.copy_.default and isinstance(args[1], Int8Weight) and first._alike(args[1]):
                for mine, theirs in zip(first.parts().values(), args[1].parts().values(), strict=True):
                    mine.copy_(theirs)
                return first
        return _on_dense(func, args, kwargs)

    def _alike(self, other: "Int8Weight") -> bool:
        return (self.shape, self.group, self.form) == (other.shape, other.group, other.form)


def _dressed(weight: Int8Weight, requires_grad: bool, parameter: bool) -> Int8Weight:
    weight.requires_grad_(requires_grad)
    if parameter:
        weight._is_param = True  # what makes isinstance(weight, nn.Parameter) true
    return weight


def rebuild(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group: int, form: ZeroForm, dtype: torch.dtype,
    requires_grad: bool, parameter: bool,
) -> Int8Weight:  # fmt: skip
    """Unpickling; safe, so `torch.load(weights_only=True)` may call it."""
    return _dressed(Int8Weight(codes, scale, zero, group, form, dtype), requires_grad, parameter)


torch.serialization.add_safe_globals([Int8Weight, rebuild])

# Fresh tensors in the shape of a weight: nothing of it is decoded.
_LIKE = {
    getattr(aten, name).default
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros")
}  # fmt: skip


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other operator: on decoded tensors; what it writes in place is encoded again."""
    written: list[tuple[Int8Weight, Tensor]] = []

    def decoded(weight: Int8Weight) -> Tensor:
        for known, dense in written:
            if known is weight:
                return dense
        dense = weight.dense()
        written.append((weight, dense))
        return dense

    plain_args, plain_kwargs = tree_map_only(Int8Weight, decoded, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable:
        names = [argument.name for argument in func._schema.arguments if argument.is_write]
        given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
        for weight, dense in written:
            if any(given.get(name) is weight for name in names):
                weight.write(0, dense.reshape(-1).float())
                out = weight if out is dense else out
    return out


# -- products ------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """x W^T + b. Keeps x and the codes for backward, and decodes twice: never a dense W between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = grad @ weight.dense(grad.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            gw = (flat.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            gb = flat.sum(0)
        return gx, gw, gb


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Int8Weight, padding: int, by_frequency: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rest = (weight.shape[0], padding, by_frequency)
        return weight.rows(index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return None, aten.embedding_dense_backward(grad, index, *ctx.rest), None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Int8Weight) or isinstance(x, Int8Weight) or isinstance(bias, Int8Weight):
        return NotImplemented
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if not isinstance(weight, Int8Weight):
        return NotImplemented
    if max_norm is not None or sparse:
        raise InputError("int8 weights: an embedding with max_norm or sparse gradients cannot be int8; leave it out")
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(input, weight, padding, scale_grad_by_freq)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {F.linear: _linear, F.embedding: _embedding}
