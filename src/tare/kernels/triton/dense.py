"""Element-wise passes over a weight: AdamW with plain or bf16 moments, and the writes that round. One launch each.

`adamw16_` is also the small Adam of a projected gradient: on R in the place of the weight, with decay 0 and alpha 1, it leaves -N there.
Its rates may come from a tensor on the device, so that a captured graph sees them change. Twins: `plain.adamw16_`,
`rounding.write_stochastic_`, `split24.write_split_`.
"""

import torch
from torch import Tensor

from tare.kernels.triton import dispatch, parts
from tare.kernels.triton.dispatch import BF16, FLOATS, FP32, NEAREST, PLAIN, STOCHASTIC
from tare.kernels.triton.language import tl, triton

_INT8 = (torch.int8,)


@triton.jit(do_not_specialize=["seed", "seed1", "seed2"])
def _adamw(
    w, low, g, m_, v_, live, n, seed, seed1, seed2, beta1, rest1, beta2, rest2, decay, alpha, eps,
    SIZE: tl.constexpr, FORM: tl.constexpr, G_BF16: tl.constexpr, M_FORM: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < n
    if LIVE:
        decay, alpha, eps = tl.load(live), tl.load(live + 1), tl.load(live + 2)
    gradient = parts.read(g, at, mask, G_BF16)
    m = parts.load_weight(m_, m_, at, mask, M_FORM) * beta1 + gradient * rest1
    v = parts.load_weight(v_, v_, at, mask, M_FORM) * beta2 + gradient * rest2 * gradient
    weight = parts.load_weight(w, low, at, mask, FORM)
    update = parts.adam_direction(m, v, eps)
    parts.store_weight(w, low, at, weight * decay - update * alpha, mask, seed, FORM)
    parts.store_weight(m_, m_, at, m, mask, seed1, M_FORM)
    parts.store_weight(v_, v_, at, v, mask, seed2, M_FORM)


@triton.jit(do_not_specialize=["seed"])
def _write(
    w, low, u, n, seed, decay, alpha, scale, SIZE: tl.constexpr, FORM: tl.constexpr, U_BF16: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < n
    update = parts.read(u, at, mask, U_BF16) * scale
    weight = parts.load_weight(w, low, at, mask, FORM)
    parts.store_weight(w, low, at, weight * decay - update * alpha, mask, seed, FORM)


@triton.jit(do_not_specialize=["seed"])
def _scaled(
    w, low, g, factor, rows, columns, row_stride, column_stride, seed, decay, alpha, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORM: tl.constexpr, G_BF16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = row * columns + column  # [ROWS, COLUMNS]
    mask = (row < rows) & (column < columns)
    # a stride of 0 spreads the factor: [m, 1], [1, n] and 0-d are one kernel
    phi = tl.load(factor + row * row_stride + column * column_stride, mask=mask, other=0.0) * scale
    update = parts.read(g, at, mask, G_BF16) * phi
    weight = parts.load_weight(w, low, at, mask, FORM)
    parts.store_weight(w, low, at, weight * decay - update * alpha, mask, seed, FORM)


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
    live: Tensor | None = None,
) -> bool:
    """One AdamW step with plain or bf16 moments: `native16.adamw16_`, where all arguments but the last are explained.

    Args:
        weight: may be `grad` itself: each element is read before it is written.
        live: [3] fp32 on the same device: decay, alpha and eps in the place of the numbers, which a captured graph would freeze.

    Returns:
        True when done; False when nothing was touched and `plain.adamw16_` must do it.
    """
    n = weight.numel()
    kept = (exp_avg.dtype,) if exp_avg.dtype in FLOATS else ()
    more = [(x, dtypes, size) for x, dtypes, size in ((low, _INT8, None), (live, (FP32,), 3)) if x is not None]
    weights = FLOATS if low is None else (BF16,)
    if not dispatch.takes(
        n, (weight, weights, None), (grad, FLOATS, None), (exp_avg, kept, None), (exp_avg_sq, kept, None), *more
    ):
        return False
    rounding = dispatch.rounding_of(weight, key, start, low)
    seeds = [dispatch.seed_of(k, start, n) for k in keys or (None, None)]
    if rounding is None or None in seeds:
        return False
    moments = PLAIN if exp_avg.dtype != BF16 else NEAREST if keys is None else STOCHASTIC
    w, size = dispatch.bits(weight), dispatch.tile_elements()
    with dispatch.on(weight):
        _adamw[(triton.cdiv(n, size),)](
            w, w if low is None else low, dispatch.bits(grad), dispatch.bits(exp_avg), dispatch.bits(exp_avg_sq),
            exp_avg if live is None else live, n, rounding.seed, *seeds,
            beta1, (beta1 - 1) if ascend else (1 - beta1), beta2, 1 - beta2, decay, alpha, eps,
            SIZE=size, FORM=rounding.form, G_BF16=grad.dtype == BF16, M_FORM=moments, LIVE=live is not None,
            enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(weight, exp_avg, exp_avg_sq, *([] if low is None else [low]))
    return True


def write_(
    weight: Tensor,
    update: Tensor,
    *,
    decay: float,
    alpha: float,
    scale: float = 1.0,
    key: int | None = None,
    start: int = 0,
    low: Tensor | None = None,
) -> bool:
    """W <- round(decay W - alpha (scale U)), in the weight's form; bit-identical to the twins.

    Args:
        weight: fp32 or bf16, contiguous, as all tensors here.
        update: fp32 or bf16, as many elements: U.
        decay, alpha, scale: numbers.
        key, start: stochastic rounding of a bf16 weight; None rounds to nearest.
        low: int8, the low parts of a split weight.

    Returns:
        True when done; False when nothing was touched.
    """
    n = weight.numel()
    lows = [] if low is None else [(low, _INT8, None)]
    if not dispatch.takes(n, (weight, FLOATS, None), (update, FLOATS, None), *lows):
        return False
    rounding = dispatch.rounding_of(weight, key, start, low)
    if rounding is None:
        return False
    w, size = dispatch.bits(weight), dispatch.tile_elements()
    with dispatch.on(weight):
        _write[(triton.cdiv(n, size),)](
            w, w if low is None else low, dispatch.bits(update), n, rounding.seed, decay, alpha, scale,
            SIZE=size, FORM=rounding.form, U_BF16=update.dtype == BF16, enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(weight, *([] if low is None else [low]))
    return True


def write_stochastic_(weight: Tensor, update: Tensor, *, decay: float, alpha: float, key: int, start: int = 0) -> bool:
    """W <- SR(decay W - alpha U) for a bf16 weight; bit-identical to `rounding.write_stochastic_`. True when done."""
    return weight.dtype == BF16 and write_(weight, update, decay=decay, alpha=alpha, key=key, start=start)


def write_split_(
    weight: Tensor, low: Tensor, update: Tensor, *, decay: float, alpha: float, key: int | None = None, start: int = 0
) -> bool:
    """W <- decay W - alpha U for a weight in 24 bits; bit-identical to `split24.write_split_`. True when done."""
    fits = weight.dtype == BF16
    return fits and write_(weight, update, decay=decay, alpha=alpha, key=key, start=start, low=low)


def write_scaled_(
    weight: Tensor,
    grad: Tensor,
    factor: Tensor,
    *,
    decay: float,
    alpha: float,
    scale: float = 1.0,
    key: int | None = None,
    start: int = 0,
    low: Tensor | None = None,
) -> bool:
    """W <- round(decay W - alpha G * (scale * factor)); the factor is broadcast: one pass, nothing materialised.

    Args:
        weight: [m, n] fp32 or bf16, contiguous.
        grad: [m, n] fp32 or bf16, contiguous.
        factor: fp32; [m, 1], [1, n], or one element.
        decay, alpha, scale: numbers.
        key, start, low: as in `write_`.

    Returns:
        True when done; False when nothing was touched.
    """
    n = weight.numel()
    lows = [] if low is None else [(low, _INT8, None)]
    if weight.ndim != 2 or grad.shape != weight.shape or factor.ndim not in (0, 2):
        return False
    rows, columns = weight.shape
    strides = {(): (0, 0), (1, 1): (0, 0), (rows, 1): (1, 0), (1, columns): (0, 1)}.get(tuple(factor.shape))
    if strides is None or not dispatch.takes(
        n, (weight, FLOATS, None), (grad, FLOATS, None), (factor, (FP32,), factor.numel()), *lows
    ):
        return False
    rounding = dispatch.rounding_of(weight, key, start, low)
    if rounding is None:
        return False
    w = dispatch.bits(weight)
    high, wide = (32, 256) if dispatch.interpreting() else (4, 256)
    with dispatch.on(weight):
        _scaled[(triton.cdiv(rows, high), triton.cdiv(columns, wide))](
            w, w if low is None else low, dispatch.bits(grad), factor, rows, columns, *strides, rounding.seed,
            decay, alpha, scale,
            ROWS=high, COLUMNS=wide, FORM=rounding.form, G_BF16=grad.dtype == BF16, enable_fp_fusion=False,
        )  # fmt: skip
    dispatch.written(weight, *([] if low is None else [low]))
    return True
