"""AdamW and Lion with block-wise 8-bit moments: decode, update, write the weight, encode; one pass, one launch. And the codec alone.

Bytes a parameter with bf16 weights and gradients: 2 + 2 + 2 + 4 codes + 16/256 of scales = 10.06 for AdamW, 8.03 for Lion. Twins:
`plain.adamw8bit_`, `plain.lion8bit_`; the codec is that of `blockwise`, code for code. Dettmers et al. (2022), arXiv:2110.02861.
"""

import torch
from torch import Tensor

from tare.kernels import blockwise
from tare.kernels.triton import dispatch, parts
from tare.kernels.triton.dispatch import BF16, FLOATS, FP32
from tare.kernels.triton.language import tl, triton


@triton.jit(do_not_specialize=["seed"])
def _adamw(
    w, low, g, c1, a1, c2, a2, values1, thresholds1, values2, thresholds2, n, seed,
    beta1, rest1, beta2, rest2, decay, alpha, eps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr, G_BF16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    mask, blocks = at < n, row * BLOCK < n
    gradient = parts.read(g, at, mask, G_BF16)
    m = parts.decode(tl.load(c1 + at, mask=mask, other=127), tl.load(a1 + row, mask=blocks, other=0.0), values1)
    v = parts.decode(tl.load(c2 + at, mask=mask, other=0), tl.load(a2 + row, mask=blocks, other=0.0), values2)
    m = m * beta1 + gradient * rest1
    v = v * beta2 + gradient * rest2 * gradient
    update = parts.adam_direction(m, v, eps)
    weight = parts.load_weight(w, low, at, mask, FORM)
    parts.store_weight(w, low, at, weight * decay - update * alpha, mask, seed, FORM)
    code, peak = parts.encode(m, thresholds1, True)
    tl.store(c1 + at, code.to(tl.uint8), mask=mask)
    tl.store(a1 + row, peak, mask=blocks)
    code, peak = parts.encode(v, thresholds2, False)
    tl.store(c2 + at, code.to(tl.uint8), mask=mask)
    tl.store(a2 + row, peak, mask=blocks)


@triton.jit(do_not_specialize=["seed"])
def _lion(
    w, low, g, c, a, values, thresholds, n, seed, beta1, rest1, beta2, rest2, decay, alpha,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr, G_BF16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, blocks = at < n, row * BLOCK < n
    gradient = parts.read(g, at, mask, G_BF16)
    m = parts.decode(tl.load(c + at, mask=mask, other=127), tl.load(a + row, mask=blocks, other=0.0), values)
    update = parts.sign(m * beta1 + gradient * rest1)
    weight = parts.load_weight(w, low, at, mask, FORM)
    parts.store_weight(w, low, at, weight * decay - update * alpha, mask, seed, FORM)
    code, peak = parts.encode(m * beta2 + gradient * rest2, thresholds, True)
    tl.store(c + at, code.to(tl.uint8), mask=mask)
    tl.store(a + row, peak, mask=blocks)


@triton.jit
def _encode(
    x, c, a, thresholds, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SIGNED: tl.constexpr, X_BF16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < n
    code, peak = parts.encode(parts.read(x, at, mask, X_BF16), thresholds, SIGNED)
    tl.store(c + at, code.to(tl.uint8), mask=mask)
    tl.store(a + row, peak, mask=row * BLOCK < n)


@triton.jit
def _decode(out, c, a, values, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < n
    absmax = tl.load(a + row, mask=row * BLOCK < n, other=0.0)
    tl.store(out + at, parts.decode(tl.load(c + at, mask=mask, other=0), absmax, values), mask=mask)


_CODES = (torch.uint8,)


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
) -> bool:
    """One AdamW step with 8-bit moments; see `native.adamw8bit_` for the arguments.

    Returns:
        True when done; False when nothing was touched and `plain.adamw8bit_` must do it.
    """
    n = weight.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    moments = (codes1, _CODES, None), (absmax1, (FP32,), scales), (codes2, _CODES, None), (absmax2, (FP32,), scales)
    fits = dispatch.block_fits(block)
    if not fits or not dispatch.takes(n, (weight, FLOATS, None), (grad, FLOATS, None), *moments):
        return False
    rounding = dispatch.rounding_of(weight, key, start)
    if rounding is None:
        return False
    signed, unsigned = blockwise._tables(True, weight), blockwise._tables(False, weight)
    rows = max(1, dispatch.tile_elements() // block)
    w = dispatch.bits(weight)
    with dispatch.on(weight):
        _adamw[(triton.cdiv(scales, rows),)](
            w, w, dispatch.bits(grad), codes1, absmax1, codes2, absmax2,
            signed.values, signed.thresholds, unsigned.values, unsigned.thresholds, n, rounding.seed,
            beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, eps,
            BLOCK=block, ROWS=rows, FORM=rounding.form, G_BF16=grad.dtype == BF16, enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(weight, codes1, absmax1, codes2, absmax2)
    return True


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
) -> bool:
    """One Lion step with an 8-bit moment; see `native.lion8bit_` for the arguments.

    Returns:
        True when done; False when nothing was touched and `plain.lion8bit_` must do it.
    """
    n = weight.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    moment = (codes, _CODES, None), (absmax, (FP32,), scales)
    fits = dispatch.block_fits(block)
    if not fits or not dispatch.takes(n, (weight, FLOATS, None), (grad, FLOATS, None), *moment):
        return False
    rounding = dispatch.rounding_of(weight, key, start)
    if rounding is None:
        return False
    tables = blockwise._tables(True, weight)
    rows = max(1, dispatch.tile_elements() // block)
    w = dispatch.bits(weight)
    with dispatch.on(weight):
        _lion[(triton.cdiv(scales, rows),)](
            w, w, dispatch.bits(grad), codes, absmax, tables.values, tables.thresholds, n, rounding.seed,
            beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha,
            BLOCK=block, ROWS=rows, FORM=rounding.form, G_BF16=grad.dtype == BF16, enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(weight, codes, absmax)
    return True


def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = blockwise.BLOCK) -> bool:
    """`blockwise.encode_into` for fp32 and bf16; True when done, False when nothing was touched."""
    n = x.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    fits = dispatch.block_fits(block)
    if not fits or not dispatch.takes(n, (x, FLOATS, None), (codes, _CODES, None), (absmax, (FP32,), scales)):
        return False
    rows = max(1, dispatch.tile_elements() // block)
    with dispatch.on(x):
        _encode[(triton.cdiv(scales, rows),)](
            dispatch.bits(x), codes, absmax, blockwise._tables(signed, x).thresholds, n,
            BLOCK=block, ROWS=rows, SIGNED=signed, X_BF16=x.dtype == BF16, enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(codes, absmax)
    return True


def decode_into(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor, block: int = blockwise.BLOCK) -> bool:
    """`blockwise.decode(..., out=out)`; True when done, False when nothing was touched."""
    n = codes.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    fits = dispatch.block_fits(block)
    if not fits or not dispatch.takes(n, (out, (FP32,), None), (codes, _CODES, None), (absmax, (FP32,), scales)):
        return False
    rows = max(1, dispatch.tile_elements() // block)
    with dispatch.on(out):
        _decode[(triton.cdiv(scales, rows),)](
            out, codes, absmax, blockwise._tables(signed, out).values, n, BLOCK=block, ROWS=rows, enable_fp_fusion=False
        )
    dispatch.written(out)
    return True
