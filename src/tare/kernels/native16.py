"""The native kernels of 16-bit weights, called through ctypes; see `native` for how they are built, trusted and refused.

The twins are in `plain` and `split24`.
"""

import torch
from torch import Tensor

from tare.kernels import library
from tare.kernels.calls import BF16, FLOATS, FP32, fits, kernel, noise, written
from tare.kernels.library import Rates, Step

_INT8 = (torch.int8,)


@kernel
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
) -> bool:
    """One AdamW step with plain or bf16 moments, in place and in one pass.

    m = beta1 m + (1 - beta1) G;  v = beta2 v + (1 - beta2) G^2;  W <- decay W - alpha m / (sqrt(v) + eps), with the new moments before
    they are rounded.

    Args:
        weight: bf16 or fp32, any shape, contiguous; as all tensors here.
        grad: fp32 or bf16, as many elements.
        exp_avg, exp_avg_sq: the moments, both fp32 or both bf16.
        low: int8, the corrections of a bf16 weight in 24 bits (see `split24`).
        beta1, beta2, decay, alpha, eps: as in `native.adamw8bit_`.
        ascend: step with -G.
        key: stochastic rounding of a bf16 weight (see `rounding`), of a split one at its 24th bit; None: to nearest.
        keys: the same for bf16 moments, one each.
        start: index of the first element for the keys.

    Returns:
        True when done; False when nothing was touched and `plain.adamw16_` must do it.
    """
    n = weight.numel()
    wanted = [(weight, BF16 if low is not None else FLOATS, None), (grad, FLOATS, None)]
    wanted += [(exp_avg, FLOATS, None), (exp_avg_sq, (exp_avg.dtype,), None)]
    if low is not None:
        wanted.append((low, _INT8, None))
    if not fits(n, *wanted):
        return False
    first, second = keys if keys is not None else (None, None)
    hashed, native = [noise(k, start, n) for k in (key, first, second)], library.load()
    if native is None or None in hashed:
        return False
    native.tare_adamw16(
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        None if low is None else low.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        exp_avg.dtype == torch.bfloat16,
        n,
        torch.get_num_threads(),
        Rates(
            Step(beta1, (beta1 - 1) if ascend else (1 - beta1), beta2, 1 - beta2, decay, alpha, eps, hashed[0]),
            hashed[1],
            hashed[2],
        ),
    )
    written(weight, exp_avg, exp_avg_sq, *(() if low is None else (low,)))
    return True


@kernel
def write_split_(
    weight: Tensor, low: Tensor, update: Tensor, *, decay: float, alpha: float, key: int | None = None, start: int = 0
) -> bool:
    """W <- decay W - alpha U for a weight in 24 bits and an fp32 update; `split24.write_split_`, but for the payload of NaNs.

    Returns:
        True when done; False when nothing was touched.
    """
    n = weight.numel()
    if not fits(n, (weight, BF16, None), (low, _INT8, None), (update, FP32, None)):
        return False
    hashed, native = noise(key, start, n), library.load()
    if native is None or hashed is None:
        return False
    step = Step(0, 0, 0, 0, decay, alpha, 0, hashed)
    native.tare_write_split(weight.data_ptr(), low.data_ptr(), update.data_ptr(), n, torch.get_num_threads(), step)
    written(weight, low)
    return True
