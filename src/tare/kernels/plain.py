"""Fused 8-bit steps in plain torch operations, chunk by chunk: the twins of the native entry points, and their fall-back.

The signatures are those of `native`. Products and sums are separate operations here and there, so the states come out equal.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tare.kernels import blockwise, rounding


def _chunks(weight: Tensor, block: int) -> Iterator[tuple[slice, slice]]:
    """(elements, scales) of chunks of whole blocks."""
    chunk = max(1, blockwise.chunk_elements(weight.device) // block) * block
    for start in range(0, weight.numel(), chunk):
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
