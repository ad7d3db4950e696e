"""AdamW with block-wise 4-bit moments, two codes a byte: decode, update, write the weight, encode; one pass.

Bytes a parameter with bf16 weights and gradients: 2 + 2 + 2 + 2 of codes + 16/128 of scales = 8.13. The maps are arguments (tables), the
packing is that of `nibbles`, the codec that of `kernels.fourbit`, code for code. Li, Chen & Zhu (2023), arXiv:2309.01507.
"""

import torch
from torch import Tensor

from tare.kernels import blockwise, fourbit, nibbles
from tare.kernels.triton import dispatch, parts
from tare.kernels.triton.dispatch import BF16, FLOATS, FP32
from tare.kernels.triton.language import tl, triton


@triton.jit
def _code(x, thresholds):
    """The number of thresholds below x, by four rounds of a binary search."""
    code = tl.where(x > tl.load(thresholds + 7), 8, 0)
    code += tl.where(x > tl.load(thresholds + code + 3), 4, 0)
    code += tl.where(x > tl.load(thresholds + code + 1), 2, 0)
    return code + tl.where(x > tl.load(thresholds + code), 1, 0)


@triton.jit
def _halves(n, row, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Of blocks [rows]: which exist; bytes, elements of the low and of the high halves, and which of either exist: [rows, BLOCK / 2]."""
    HALF: tl.constexpr = BLOCK // 2
    i = tl.arange(0, HALF)[None, :]
    first = row[:, None] * BLOCK + i
    if WHOLE:
        exist = (row + 1) * BLOCK <= n
        inside = exist[:, None] & (i >= 0)
        return exist, row[:, None] * HALF + i, first, first + HALF, inside, inside
    else:  # the partial last block is halved at ceil(w / 2)
        width = tl.minimum(tl.maximum(n - row * BLOCK, 0), BLOCK)[:, None]
        half = (width + 1) // 2
        return row * BLOCK < n, row[:, None] * HALF + i, first, first + half, i < half, i < width - half


@triton.jit
def _restore(c, a, row, exist, byte, inside, values):
    """The moments of the two halves of blocks; both [rows, BLOCK / 2]."""
    code = tl.load(c + byte, mask=inside, other=0).to(tl.int32)
    scale = tl.load(a + row, mask=exist, other=0.0)[:, None]
    return tl.load(values + (code & 15)) * scale, tl.load(values + (code >> 4)) * scale


@triton.jit
def _keep(c, a, row, exist, byte, low, high, in1, in2, thresholds, ZERO: tl.constexpr):
    """Encode the two halves of blocks and store codes and scales. What lies outside must not count in the scale."""
    low, high = tl.where(in1, low, 0.0), tl.where(in2, high, 0.0)
    top = tl.max(tl.maximum(parts.magnitude(low), parts.magnitude(high)), axis=1)
    peak, factor, usable = parts.scales_of(top)
    fit = usable[:, None]
    code1 = tl.where(fit, _code(low * factor[:, None], thresholds), ZERO)
    code2 = tl.where(fit, _code(high * factor[:, None], thresholds), ZERO)
    packed = code1 | (tl.where(in2, code2, 0) << 4)  # the high half of an odd block's last byte is 0
    tl.store(c + byte, packed.to(tl.uint8), mask=in1)
    tl.store(a + row, peak, mask=exist)


@triton.jit(do_not_specialize=["seed", "skip"])
def _adamw(
    w, low, g, c1, a1, c2, a2, values1, thresholds1, values2, thresholds2, n, skip, seed,
    beta1, rest1, beta2, rest2, decay, alpha, eps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr, G_BF16: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = skip + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # blocks
    exist, byte, at1, at2, in1, in2 = _halves(n, row, BLOCK, WHOLE)
    m1, m2 = _restore(c1, a1, row, exist, byte, in1, values1)
    v1, v2 = _restore(c2, a2, row, exist, byte, in1, values2)
    g1, g2 = parts.read(g, at1, in1, G_BF16), parts.read(g, at2, in2, G_BF16)
    m1, m2 = m1 * beta1 + g1 * rest1, m2 * beta1 + g2 * rest1
    v1, v2 = v1 * beta2 + g1 * rest2 * g1, v2 * beta2 + g2 * rest2 * g2
    w1, w2 = parts.load_weight(w, low, at1, in1, FORM), parts.load_weight(w, low, at2, in2, FORM)
    u1, u2 = parts.adam_direction(m1, v1, eps), parts.adam_direction(m2, v2, eps)
    parts.store_weight(w, low, at1, w1 * decay - u1 * alpha, in1, seed, FORM)
    parts.store_weight(w, low, at2, w2 * decay - u2 * alpha, in2, seed, FORM)
    _keep(c1, a1, row, exist, byte, m1, m2, in1, in2, thresholds1, 7)
    _keep(c2, a2, row, exist, byte, v1, v2, in1, in2, thresholds2, 0)


@triton.jit(do_not_specialize=["seed", "skip"])
def _lion(
    w, low, g, c, a, values, thresholds, n, skip, seed, beta1, rest1, beta2, rest2, decay, alpha,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr, G_BF16: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = skip + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exist, byte, at1, at2, in1, in2 = _halves(n, row, BLOCK, WHOLE)
    m1, m2 = _restore(c, a, row, exist, byte, in1, values)
    g1, g2 = parts.read(g, at1, in1, G_BF16), parts.read(g, at2, in2, G_BF16)
    u1, u2 = parts.sign(m1 * beta1 + g1 * rest1), parts.sign(m2 * beta1 + g2 * rest1)
    w1, w2 = parts.load_weight(w, low, at1, in1, FORM), parts.load_weight(w, low, at2, in2, FORM)
    parts.store_weight(w, low, at1, w1 * decay - u1 * alpha, in1, seed, FORM)
    parts.store_weight(w, low, at2, w2 * decay - u2 * alpha, in2, seed, FORM)
    _keep(c, a, row, exist, byte, m1 * beta2 + g1 * rest2, m2 * beta2 + g2 * rest2, in1, in2, thresholds, 7)


@triton.jit(do_not_specialize=["skip"])
def _encode(
    x, c, a, thresholds, n, skip,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ZERO: tl.constexpr, X_BF16: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = skip + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exist, byte, at1, at2, in1, in2 = _halves(n, row, BLOCK, WHOLE)
    x1, x2 = parts.read(x, at1, in1, X_BF16), parts.read(x, at2, in2, X_BF16)
    _keep(c, a, row, exist, byte, x1, x2, in1, in2, thresholds, ZERO)


@triton.jit(do_not_specialize=["skip"])
def _decode(out, c, a, values, n, skip, BLOCK: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    row = skip + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exist, byte, at1, at2, in1, in2 = _halves(n, row, BLOCK, WHOLE)
    x1, x2 = _restore(c, a, row, exist, byte, in1, values)
    tl.store(out + at1, x1, mask=in1)
    tl.store(out + at2, x2, mask=in2)


_CODES = (torch.uint8,)


def _moment(codes: Tensor, absmax: Tensor, n: int, block: int) -> list[tuple[Tensor, tuple[torch.dtype, ...], int]]:
    """What the two tensors of one moment must be like; a size that nothing has where the block does not fit."""
    scales = blockwise.absmax_numel(n, block) if dispatch.block_fits(block) else -1
    return [(codes, _CODES, nibbles.packed_numel(n)), (absmax, (FP32,), scales)]


def _launches(n: int, block: int) -> list[tuple[bool, int, int, int]]:
    """(whole, blocks to skip, blocks to a program, programs): all whole blocks, then the partial one by itself.

    A whole block's halves lie at fixed places, so that its loads are wide; a partial one's do not.
    """
    rows, full = max(1, dispatch.tile_elements() // block), n // block
    whole = [(True, 0, rows, triton.cdiv(full, rows))] if full else []
    return whole + ([(False, full, 1, 1)] if n % block else [])


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
) -> bool:
    """One AdamW step with 4-bit moments.

    Args:
        weight, grad, beta1, beta2, decay, alpha, eps, key, start: as in `native.adamw8bit_`.
        codes1, absmax1: first moment, signed map: [ceil(numel / 2)] uint8 and [ceil(numel / block)] fp32.
        codes2, absmax2: second moment, unsigned map.
        block: elements to a scale; a power of two from 16 to 4096.

    Returns:
        True when done; False when nothing was touched and the plain codec must do it.
    """
    n = weight.numel()
    moments = _moment(codes1, absmax1, n, block) + _moment(codes2, absmax2, n, block)
    if not dispatch.takes(n, (weight, FLOATS, None), (grad, FLOATS, None), *moments):
        return False
    rounding = dispatch.rounding_of(weight, key, start)
    if rounding is None:
        return False
    signed, unsigned = fourbit._tables(True, weight), fourbit._tables(False, weight)
    w = dispatch.bits(weight)
    with dispatch.on(weight):
        for whole, skip, rows, programs in _launches(n, block):
            _adamw[(programs,)](
                w, w, dispatch.bits(grad), codes1, absmax1, codes2, absmax2,
                signed.values, signed.thresholds, unsigned.values, unsigned.thresholds, n, skip, rounding.seed,
                beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, eps,
                BLOCK=block, ROWS=rows, FORM=rounding.form, G_BF16=grad.dtype == BF16, WHOLE=whole,
                enable_fp_fusion=False,
            )  # fmt: skip
    dispatch.written(weight, codes1, absmax1, codes2, absmax2)
    return True


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
) -> bool:
    """One Lion step with a 4-bit moment; see `native.lion8bit_` and `adamw4bit_`.

    Returns:
        True when done; False when nothing was touched and `plain.lion4bit_` must do it.
    """
    n = weight.numel()
    if not dispatch.takes(n, (weight, FLOATS, None), (grad, FLOATS, None), *_moment(codes, absmax, n, block)):
        return False
    rounding = dispatch.rounding_of(weight, key, start)
    if rounding is None:
        return False
    tables, w = fourbit._tables(True, weight), dispatch.bits(weight)
    with dispatch.on(weight):
        for whole, skip, rows, programs in _launches(n, block):
            _lion[(programs,)](
                w, w, dispatch.bits(grad), codes, absmax, tables.values, tables.thresholds, n, skip, rounding.seed,
                beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha,
                BLOCK=block, ROWS=rows, FORM=rounding.form, G_BF16=grad.dtype == BF16, WHOLE=whole,
                enable_fp_fusion=False,
            )  # fmt: skip
    dispatch.written(weight, codes, absmax)
    return True


def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = fourbit.BLOCK) -> bool:
    """`fourbit.encode_into` for fp32 and bf16; True when done, False when nothing was touched."""
    n = x.numel()
    if not dispatch.takes(n, (x, FLOATS, None), *_moment(codes, absmax, n, block)):
        return False
    thresholds = fourbit._tables(signed, x).thresholds
    with dispatch.on(x):
        for whole, skip, rows, programs in _launches(n, block):
            _encode[(programs,)](
                dispatch.bits(x), codes, absmax, thresholds, n, skip, BLOCK=block, ROWS=rows,
                ZERO=fourbit.zero_code(signed), X_BF16=x.dtype == BF16, WHOLE=whole, enable_fp_fusion=False,
            )  # fmt: skip
    dispatch.written(codes, absmax)
    return True


def decode_into(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor, block: int = fourbit.BLOCK) -> bool:
    """`fourbit.decode(..., out=out)`; True when done, False when nothing was touched."""
    n = out.numel()
    if not dispatch.takes(n, (out, (FP32,), None), *_moment(codes, absmax, n, block)):
        return False
    values = fourbit._tables(signed, out).values
    with dispatch.on(out):
        for whole, skip, rows, programs in _launches(n, block):
            _decode[(programs,)](
                out, codes, absmax, values, n, skip, BLOCK=block, ROWS=rows, WHOLE=whole, enable_fp_fusion=False
            )
    dispatch.written(out)
    return True
