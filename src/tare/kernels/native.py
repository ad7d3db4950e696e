"""The native kernels, called through ctypes: one pass over memory where plain torch operations need about thirty.

Compiled on first use with the machine's C++ compiler and tested against the plain twins before anything trusts it. Every call returns
True when it did the work and False when it cannot (no compiler, a CUDA or fake or strided tensor, another dtype): then the caller uses
the twin in `blockwise`, `plain` or `rounding`, which gives the same codes. `TARE_NATIVE=0` in the environment turns it off.
"""

import torch
from torch import Tensor

from tare.kernels import blockwise, library
from tare.kernels.calls import BF16 as _BF16
from tare.kernels.calls import CODES as _CODES
from tare.kernels.calls import FLOATS as _FLOATS
from tare.kernels.calls import FP32 as _FP32
from tare.kernels.calls import block_fits as _block_fits
from tare.kernels.calls import fits as _fits
from tare.kernels.calls import kernel, on_paper
from tare.kernels.calls import noise as _noise
from tare.kernels.calls import written as _written
from tare.kernels.library import Step, available, reason

__all__ = [
    "adamw8bit_",
    "available",
    "decode_into",
    "encode_into",
    "lion8bit_",
    "on_paper",
    "reason",
    "write_stochastic_",
]


@kernel
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
    """One AdamW step with 8-bit moments, in place and in one pass.

    m = beta1 m + (1 - beta1) G;  v = beta2 v + (1 - beta2) G^2;  W <- decay W - alpha m / (sqrt(v) + eps), with the new moments before
    they are encoded. A NaN in G makes its block's scale NaN, and with it every later moment of the block: it cannot pass unseen.

    Args:
        weight: fp32 or bf16, any shape, contiguous; as all tensors here.
        grad: fp32 or bf16, as many elements.
        codes1, absmax1: first moment, signed map: uint8, as many elements, and [ceil(numel / block)] fp32.
        codes2, absmax2: second moment, unsigned map.
        beta1, beta2: decay rates of the moments.
        decay: 1 - lr * weight_decay for decay before the step; for decay after it, multiply `alpha` by it as well.
        alpha: lr * sqrt(1 - beta2^t) / (1 - beta1^t).
        eps: added to sqrt(v) before bias correction; for torch's convention pass eps * sqrt(1 - beta2^t).
        block: elements to a scale; a multiple of 16 up to 4096.
        key: stochastic rounding of a bf16 weight (see `rounding`); None rounds to nearest. Without effect on fp32.
        start: index of the first element for `key`.

    Returns:
        True when done; False when nothing was touched and `plain.adamw8bit_` must do it.
    """
    n = weight.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    if not _block_fits(block) or not _fits(
        n,
        (weight, _FLOATS, None),
        (grad, _FLOATS, None),
        (codes1, _CODES, None),
        (absmax1, _FP32, scales),
        (codes2, _CODES, None),
        (absmax2, _FP32, scales),
    ):
        return False
    noise, native = _noise(key, start, n), library.load()
    if noise is None or native is None:
        return False
    native.tare_adamw(
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        codes1.data_ptr(),
        absmax1.data_ptr(),
        codes2.data_ptr(),
        absmax2.data_ptr(),
        n,
        block,
        torch.get_num_threads(),
        Step(beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, eps, noise),
    )
    _written(weight, codes1, absmax1, codes2, absmax2)
    return True


@kernel
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
    """One Lion step with an 8-bit moment, in place and in one pass.

    W <- decay W - alpha sign(beta1 m + (1 - beta1) G);  m = beta2 m + (1 - beta2) G, encoded with the signed map.

    Args:
        weight, grad: as in `adamw8bit_`.
        codes, absmax: the moment, signed map.
        beta1, beta2: read-out interpolation, and decay rate of the moment.
        decay: 1 - lr * weight_decay.
        alpha: lr.
        block, key, start: as in `adamw8bit_`.

    Returns:
        True when done; False when nothing was touched and `plain.lion8bit_` must do it.
    """
    n = weight.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    if not _block_fits(block) or not _fits(
        n, (weight, _FLOATS, None), (grad, _FLOATS, None), (codes, _CODES, None), (absmax, _FP32, scales)
    ):
        return False
    noise, native = _noise(key, start, n), library.load()
    if noise is None or native is None:
        return False
    native.tare_lion(
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        codes.data_ptr(),
        absmax.data_ptr(),
        n,
        block,
        torch.get_num_threads(),
        Step(beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, 0.0, noise),
    )
    _written(weight, codes, absmax)
    return True


@kernel
def write_stochastic_(weight: Tensor, update: Tensor, *, decay: float, alpha: float, key: int, start: int = 0) -> bool:
    """W <- SR(decay W - alpha U) for a bf16 weight and an fp32 update; bit-identical to `rounding.write_stochastic_`.

    Returns:
        True when done; False when nothing was touched.
    """
    n = weight.numel()
    if not _fits(n, (weight, _BF16, None), (update, _FP32, None)):
        return False
    noise, native = _noise(key, start, n), library.load()
    if noise is None or native is None:
        return False
    step = Step(0, 0, 0, 0, decay, alpha, 0, noise)
    native.tare_write(weight.data_ptr(), update.data_ptr(), n, torch.get_num_threads(), step)
    _written(weight)
    return True


@kernel
def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = blockwise.BLOCK) -> bool:
    """`blockwise.encode_into` for fp32 and bf16; True when done, False when nothing was touched."""
    n = x.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    if not _block_fits(block) or not _fits(n, (x, _FLOATS, None), (codes, _CODES, None), (absmax, _FP32, scales)):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_encode(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        codes.data_ptr(),
        absmax.data_ptr(),
        n,
        block,
        signed,
        torch.get_num_threads(),
    )
    _written(codes, absmax)
    return True


@kernel
def decode_into(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor, block: int = blockwise.BLOCK) -> bool:
    """`blockwise.decode(..., out=out)`; True when done, False when nothing was touched."""
    n = codes.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    if not _block_fits(block) or not _fits(n, (codes, _CODES, None), (absmax, _FP32, scales), (out, _FP32, None)):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_decode(out.data_ptr(), codes.data_ptr(), absmax.data_ptr(), n, block, signed, torch.get_num_threads())
    _written(out)
    return True
