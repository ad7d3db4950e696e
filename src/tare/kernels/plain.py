"""Fused 8-bit and 4-bit steps in plain torch operations, chunk by chunk: twins of the native entry points, and their fall-back.

The signatures are those of `native` and `native_fourbit`. Products and sums are separate operations here and there, so the
states come out equal.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tare.kernels import blockwise, fourbit, rounding, split24
from tare.kernels.nibbles import packed_numel
from tare.kernels.paper import few


def _chunks(weight: Tensor, block: int) -> Iterator[tuple[slice, slice]]:
    """(elements, scales) of chunks of whole blocks."""
    chunk = max(1, blockwise.chunk_elements(weight.device) // block) * block
    for start in few(range(0, weight.numel(), chunk)):
        stop = min(start + chunk, weight.numel())
        yield slice(start, stop), slice(start // block, blockwise.absmax_numel(stop, block))


def _write(weight: Tensor, update: Tensor, decay: float, alpha: float, key: int | None, start: int) -> None:
    """weight, update: [n]; update is overwritten."""
    if key is None or weight.dtype != torch.bfloat16:
        weight.copy_(weight.to(torch.float32).mul(decay).sub_(update.mul_(alpha)))
    else:
        rounding.write_stochastic_(weight, update, decay=decay, alpha=alpha, key=key, start=start)


@torch.no_grad()
def adamw8bit_(
    weight: Tensor,
    grad: Tensor,
    codes1: Tensor,
    absmax1: Tensor,
    codes2: Tensor,
    absmax2: Tensor,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    alpha: float,
    eps: float,
    block: int = blockwise.BLOCK,
    key: int | None = None,
    start: int = 0,
) -> None:
    """One AdamW step with 8-bit moments; see `native.adamw8bit_` for the arguments. All tensors contiguous."""
    w, g, q1, q2 = weight.view(-1), grad.view(-1), codes1.view(-1), codes2.view(-1)
    for at, of in _chunks(w, block):
        gradient = g[at].to(torch.float32)
        m = blockwise.decode(q1[at], absmax1[of], True, block).mul_(beta1).add_(gradient * (1 - beta1))
        v = (
            blockwise.decode(q2[at], absmax2[of], False, block)
            .mul_(beta2)
            .add_((gradient * (1 - beta2)).mul_(gradient))
        )
        blockwise.encode_into(m, q1[at], absmax1[of], True, block)
        blockwise.encode_into(v, q2[at], absmax2[of], False, block)
        _write(w[at], m.div_(v.sqrt_().add_(eps)), decay, alpha, key, start + at.start)


@torch.no_grad()
def lion8bit_(
    weight: Tensor,
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    alpha: float,
    block: int = blockwise.BLOCK,
    key: int | None = None,
    start: int = 0,
) -> None:
    """One Lion step with an 8-bit moment; see `native.lion8bit_` for the arguments. All tensors contiguous."""
    w, g, q = weight.view(-1), grad.view(-1), codes.view(-1)
    for at, of in _chunks(w, block):
        gradient = g[at].to(torch.float32)
        m = blockwise.decode(q[at], absmax[of], True, block)
        read_out = (m * beta1).add_(gradient * (1 - beta1))
        update = read_out.sign().addcmul_(read_out, read_out.new_zeros(()))  # a NaN stays one; its sign alone is 0
        m.mul_(beta2).add_(gradient * (1 - beta2))
        blockwise.encode_into(m, q[at], absmax[of], True, block)
        _write(w[at], update, decay, alpha, key, start + at.start)


def _packed(weight: Tensor, block: int) -> Iterator[tuple[slice, slice, slice]]:
    """(elements, bytes of 4-bit codes, scales) of chunks of whole blocks."""
    for at, of in _chunks(weight, block):
        yield at, slice(at.start // 2, packed_numel(at.stop)), of


@torch.no_grad()
def adamw4bit_(
    weight: Tensor,
    grad: Tensor,
    codes1: Tensor,
    absmax1: Tensor,
    codes2: Tensor,
    absmax2: Tensor,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    alpha: float,
    eps: float,
    block: int = fourbit.BLOCK,
    key: int | None = None,
    start: int = 0,
) -> None:
    """One AdamW step with 4-bit moments; see `native_fourbit.adamw4bit_` for the arguments. All tensors contiguous."""
    w, g = weight.view(-1), grad.view(-1)
    for at, half, of in _packed(w, block):
        gradient, n = g[at].to(torch.float32), at.stop - at.start
        m = fourbit.decode(codes1[half], absmax1[of], n, True, block).mul_(beta1).add_(gradient * (1 - beta1))
        v = fourbit.decode(codes2[half], absmax2[of], n, False, block).mul_(beta2)
        v.add_((gradient * (1 - beta2)).mul_(gradient))
        fourbit.encode_into(m, codes1[half], absmax1[of], True, block)
        fourbit.encode_into(v, codes2[half], absmax2[of], False, block)
        _write(w[at], m.div_(v.sqrt_().add_(eps)), decay, alpha, key, start + at.start)


@torch.no_grad()
def lion4bit_(
    weight: Tensor,
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    alpha: float,
    block: int = fourbit.BLOCK,
    key: int | None = None,
    start: int = 0,
) -> None:
    """One Lion step with a 4-bit moment; see `native_fourbit.lion4bit_` for the arguments. All tensors contiguous."""
    w, g = weight.view(-1), grad.view(-1)
    for at, half, of in _packed(w, block):
        gradient = g[at].to(torch.float32)
        m = fourbit.decode(codes[half], absmax[of], at.stop - at.start, True, block)
        read_out = (m * beta1).add_(gradient * (1 - beta1))
        update = read_out.sign().addcmul_(read_out, read_out.new_zeros(()))  # a NaN stays one; its sign alone is 0
        m.mul_(beta2).add_(gradient * (1 - beta2))
        fourbit.encode_into(m, codes[half], absmax[of], True, block)
        _write(w[at], update, decay, alpha, key, start + at.start)


@torch.no_grad()
def adamw16_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    alpha: float,
    eps: float,
    ascend: bool = False,
    key: int | None = None,
    keys: tuple[int, int] | None = None,
    start: int = 0,
) -> None:
    """One AdamW step with plain or bf16 moments; see `native16.adamw16_` for the arguments. All tensors contiguous."""
    w, g, c = weight.view(-1), grad.view(-1), None if low is None else low.view(-1)
    for at, _ in _chunks(w, 1):
        gradient = g[at].to(torch.float32)
        if ascend:
            gradient = -gradient
        m = exp_avg.view(-1)[at].to(torch.float32) * beta1 + gradient * (1 - beta1)
        v = exp_avg_sq.view(-1)[at].to(torch.float32) * beta2 + (gradient * (1 - beta2)).mul_(gradient)
        for moment, exact, own in zip((exp_avg, exp_avg_sq), (m, v), keys or (None, None), strict=True):
            if own is None or moment.dtype != torch.bfloat16:
                moment.view(-1)[at].copy_(exact)
            else:
                rounding.round_stochastic_(moment.view(-1)[at], exact, own, start + at.start)
        update = m.div_(v.sqrt_().add_(eps))
        if c is None:
            _write(w[at], update, decay, alpha, key, start + at.start)
        else:
            split24.write_split_(w[at], c[at], update, decay=decay, alpha=alpha, key=key, start=start + at.start)
