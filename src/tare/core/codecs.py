"""Codecs: one slot's tensors to and from fp32, whole or a block-aligned slice; the one place that knows what each form keeps.

Native kernels where they take the call, else their plain twins, which give the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from tare.core.random import make_key
from tare.core.storage import Slot
from tare.kernels import blockwise, fourbit, groupwise, native, native_fourbit, native_groupwise, nibbles, rounding


def fresh(slot: Slot, device: torch.device) -> dict[str, Tensor]:
    """The slot's tensors at their initial value."""
    raw = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape, dtype in slot.parts()}
    if slot.form == "plain":
        raw[slot.name].fill_(slot.spec.init)
    elif slot.form == "int8":
        raw[f"{slot.name}_codes"].fill_(blockwise.zero_code(slot.spec.signed))
    elif slot.form == "int4":
        raw[f"{slot.name}_codes"].fill_(fourbit.zero_byte(slot.spec.signed))
    if slot.form not in ("plain", "seed") and slot.spec.init != 0.0:
        encode(slot, raw, torch.full(slot.spec.shape, slot.spec.init, device=device), None, 0)
    return raw


def cut(tensor: Tensor, window: slice | None, per: int = 1) -> Tensor:
    """The part of a tensor with one entry for `per` elements that belongs to a slice of elements."""
    if window is None:
        return tensor
    return tensor.view(-1)[window.start // per : -(-window.stop // per)]


def decode(slot: Slot, raw: dict[str, Any], window: slice | None) -> Tensor:
    """A new fp32 tensor: in the slot's shape, or flat where a slice is asked for.

    Args:
        slot: of form `bf16`, `int8`, `int4`, `affine8` or `affine4`.
        raw: the leaf's state.
        window: elements, starting at a block; None for all.
    """
    name = slot.name
    if slot.form == "bf16":
        return cut(raw[name], window).float()
    if slot.form == "int8":
        codes = cut(raw[f"{name}_codes"], window)
        absmax = cut(raw[f"{name}_absmax"], window, slot.block)
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        if not native.decode_into(codes, absmax, slot.spec.signed, out, slot.block):
            blockwise.decode(codes, absmax, slot.spec.signed, slot.block, out=out)
        return out
    codes = raw[f"{name}_codes"]
    if slot.form == "int4":
        shape = slot.spec.shape if window is None else (window.stop - window.start,)
        codes, absmax = cut(codes, window, 2), cut(raw[f"{name}_absmax"], window, slot.block)
        out = torch.empty(shape, dtype=torch.float32, device=codes.device)
        if not native_fourbit.decode_into(codes, absmax, slot.spec.signed, out, slot.block):
            fourbit.decode(codes, absmax, out.numel(), slot.spec.signed, slot.block, out=out)
        return out
    assert window is None, "affine state is kept for whole matrices"
    packed, scale, zero = slot.form == "affine4", raw[f"{name}_scale"], raw[f"{name}_zero"]
    out = torch.empty(slot.kept_shape, dtype=torch.float32, device=codes.device)
    if not native_groupwise.decode_into(codes, scale, zero, out, slot.block, packed):
        if packed:
            codes = nibbles.unpack(codes, slot.numel, slot.block)
        groupwise.decode_affine(codes, scale, zero, slot.block, out)
    return out.mT.contiguous() if slot.spec.transposed else out


def encode(slot: Slot, raw: dict[str, Any], value: Tensor, window: slice | None, key: int) -> None:
    """Write a value into the slot's tensors.

    Args:
        slot, raw, window: as in `decode`.
        value: floating, as many elements as the slot or the slice has.
        key: of the leaf's noise in this step, for forms that round stochastically.
    """
    name = slot.name
    if slot.form == "bf16":
        start = window.start if window else 0
        rounding.round_stochastic_(cut(raw[name], window), value.contiguous(), make_key(key, name), start)
        return
    codes = raw[f"{name}_codes"]
    if slot.form in ("int8", "int4"):
        codes = cut(codes, window, 1 if slot.form == "int8" else 2)
        absmax = cut(raw[f"{name}_absmax"], window, slot.block)
        fast, twin = (native, blockwise) if slot.form == "int8" else (native_fourbit, fourbit)
        if not fast.encode_into(value, codes, absmax, slot.spec.signed, slot.block):
            twin.encode_into(value, codes, absmax, slot.spec.signed, slot.block)
        return
    assert window is None, "affine state is kept for whole matrices"
    if slot.spec.transposed:
        value = value.reshape(slot.spec.shape).mT
    bits = 8 if slot.form == "affine8" else 4
    found, scale, zero = groupwise.encode_affine(value, bits, slot.block, span_zero=True)
    if bits == 8:
        codes.copy_(found.view(codes.shape))
    else:
        nibbles.pack(found.view(-1), slot.block, out=codes)
    raw[f"{name}_scale"].copy_(scale)
    raw[f"{name}_zero"].copy_(zero)
