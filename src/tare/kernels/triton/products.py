"""Matrix products with what surrounds them: lift into a rounded weight, and projection with the gradient's norms from the same tiles.

`lift_` reads and writes the weight once (plain torch forms the whole update first); `project` reads the gradient once for R and for its
column or row norms. Accumulation is fp32. fp32 inputs go through tensor cores as three tf32 products (relative error about 1e-6).
"""

from typing import Literal

import torch
from torch import Tensor

from tare.kernels.triton import dispatch, parts
from tare.kernels.triton.dispatch import BF16, FLOATS, FP32
from tare.kernels.triton.language import tl, triton

# Tiles (rows, columns, depth, warps) by "the factors are bf16": the largest that neither spill registers nor ask for more shared memory
# than a consumer card has, as compiled for sm_80 and sm_90; not yet tuned on a device.
_LIFT = {True: (128, 128, 64, 8), False: (64, 128, 32, 8)}
_PROJECT = {True: (64, 128, 64, 4), False: (64, 128, 32, 8)}
_INTERPRETED = (256, 256, 256, 4)


@triton.jit
def _tile(base, at, mask, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):
    """A tile for a product: fp32, or bf16 on tensor cores; the interpreter cannot multiply bf16, so it gets fp32 of the same value."""
    if IS_BF16 and NATIVE:
        return tl.load(base + at, mask=mask, other=0).to(tl.bfloat16, bitcast=True)
    else:
        return parts.read(base, at, mask, IS_BF16)


@triton.jit(do_not_specialize=["seed"])
def _lift(
    w, low, left, right, m, n, r, left_row, left_column, right_row, right_column, seed, decay, alpha, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr, IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, r, BK):
        rank = k + inner
        a = _tile(
            left, row[:, None] * left_row + rank[None, :] * left_column,
            (row[:, None] < m) & (rank[None, :] < r), IS_BF16, NATIVE,
        )  # fmt: skip
        b = _tile(
            right, rank[:, None] * right_row + column[None, :] * right_column,
            (rank[:, None] < r) & (column[None, :] < n), IS_BF16, NATIVE,
        )  # fmt: skip
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = row[:, None].to(tl.int64) * n + column[None, :]  # [BM, BN]
    mask = (row[:, None] < m) & (column[None, :] < n)
    weight = parts.load_weight(w, low, at, mask, FORM)
    parts.store_weight(w, low, at, weight * decay - total * scale * alpha, mask, seed, FORM)


@triton.jit
def _project(
    g, p, out, squares, long, short, r, long_stride, short_stride, p_row, p_column, out_long, out_rank,
    BL: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The gradient is seen as [long, short]: strides make P^T G the transpose of this same product.
    line = tl.program_id(0) * BL + tl.arange(0, BL)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    inner = tl.arange(0, BK)
    total = tl.zeros((BL, BR), tl.float32)
    square = tl.zeros((BL,), tl.float32)
    for k in range(0, short, BK):
        deep = k + inner
        a = _tile(
            g, line[:, None].to(tl.int64) * long_stride + deep[None, :].to(tl.int64) * short_stride,
            (line[:, None] < long) & (deep[None, :] < short), IS_BF16, NATIVE,
        )  # fmt: skip
        b = _tile(
            p, deep[:, None] * p_row + rank[None, :] * p_column,
            (deep[:, None] < short) & (rank[None, :] < r), IS_BF16, NATIVE,
        )  # fmt: skip
        total = tl.dot(a, b, total, input_precision=PRECISION)
        wide = a.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    at = line[:, None].to(tl.int64) * out_long + rank[None, :].to(tl.int64) * out_rank
    tl.store(out + at, total, mask=(line[:, None] < long) & (rank[None, :] < r))
    if tl.program_id(1) == 0:
        tl.store(squares + line, square, mask=line < long)


def _precision() -> str:
    """tf32x3 keeps fp32 accuracy on tensor cores; one tf32 product where the user has allowed that for torch itself."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _factors(weight: Tensor, *factors: Tensor) -> bool:
    """Whether the factors of a product may be read through their strides: 2-D, one dtype, on the weight's device."""
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.ndim == 2 and x.device == weight.device and x.numel() < 1 << 31
        and x.dtype in FLOATS and x.dtype == factors[0].dtype and x.layout == torch.strided and not x.is_neg()
        for x in factors
    )  # fmt: skip


def lift_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    decay: float,
    alpha: float,
    scale: float = 1.0,
    key: int | None = None,
    start: int = 0,
    low: Tensor | None = None,
) -> bool:
    """W <- round(decay W - alpha scale left @ right), accumulated in fp32 and written once.

    Args:
        weight: [m, n] fp32 or bf16, contiguous.
        left: [m, r]; right: [r, n]; both fp32 or both bf16, of any strides.
        decay, alpha, scale: numbers.
        key, start: stochastic rounding of a bf16 weight; None rounds to nearest.
        low: int8, the low parts of a split weight.

    Returns:
        True when done; False when nothing was touched.
    """
    lows = [] if low is None else [(low, (torch.int8,), None)]
    if weight.ndim != 2 or not dispatch.takes(weight.numel(), (weight, FLOATS, None), *lows):
        return False
    (m, n), r = weight.shape, left.shape[-1]
    if not _factors(weight, left, right) or left.shape != (m, r) or right.shape != (r, n) or r == 0:
        return False
    rounding = dispatch.rounding_of(weight, key, start, low)
    if rounding is None:
        return False
    w, half = dispatch.bits(weight), left.dtype == BF16
    a, b = dispatch.bits(left), dispatch.bits(right)
    bm, bn, bk, warps = _LIFT[half] if not dispatch.interpreting() else _INTERPRETED
    with dispatch.on(weight):
        _lift[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
            w, w if low is None else low, a, b, m, n, r, *a.stride(), *b.stride(), rounding.seed, decay, alpha, scale,
            BM=bm, BN=bn, BK=bk, FORM=rounding.form, IS_BF16=half, NATIVE=not dispatch.interpreting(),
            PRECISION=_precision(), num_warps=warps, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(weight, *([] if low is None else [low]))
    return True


def project(grad: Tensor, basis: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor] | None:
    """R and the squared norms of the gradient's lines, in one reading of the gradient.

    Args:
        grad: [m, n] fp32 or bf16, contiguous.
        basis: `left`: P [m, r], R = P^T G; `right`: P [n, r], R = G P. In the gradient's dtype, of any strides.
        side: which.

    Returns:
        `left`: R [r, n] and the squared norms of G's columns [n]; `right`: R [m, r] and those of its rows [m]; all fp32. None when the
        kernel cannot take the call.
    """
    if grad.ndim != 2 or not dispatch.takes(grad.numel(), (grad, FLOATS, None)):
        return None
    left = side == "left"
    m, n = grad.shape
    (short, long), r = (m, n) if left else (n, m), basis.shape[-1]
    if not _factors(grad, basis) or basis.dtype != grad.dtype or tuple(basis.shape) != (short, r) or r == 0:
        return None
    out = torch.empty((r, n) if left else (m, r), dtype=FP32, device=grad.device)
    squares = torch.empty(long, dtype=FP32, device=grad.device)
    g, p, half = dispatch.bits(grad), dispatch.bits(basis), grad.dtype == BF16
    bl, most, bk, warps = _PROJECT[half] if not dispatch.interpreting() else _INTERPRETED
    br = min(most, max(16, triton.next_power_of_2(r)))
    with dispatch.on(grad):
        _project[(triton.cdiv(long, bl), triton.cdiv(r, br))](
            g, p, out, squares, long, short, r, *((1, n) if left else (n, 1)), *p.stride(),
            *((1, n) if left else (r, 1)),
            BL=bl, BR=br, BK=bk, IS_BF16=half, NATIVE=not dispatch.interpreting(), PRECISION=_precision(),
            num_warps=warps, num_stages=3 if half else 2, enable_fp_fusion=False,
        )  # fmt: skip
    return out, squares
