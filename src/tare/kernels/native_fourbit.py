"""The native kernels of 4-bit states, called through ctypes; see `native` for how they are built, trusted and refused.

A block must be a multiple of 32 up to 4096. The twins are in `fourbit` and `plain`.
"""

import torch
from torch import Tensor

from tare.kernels import fourbit, library
from tare.kernels.blockwise import absmax_numel
from tare.kernels.calls import CODES, FLOATS, FP32, block_fits, fits, kernel, noise, written
from tare.kernels.library import Step
from tare.kernels.nibbles import packed_numel

_HALVES = 32  # each half of a block is whole vectors of up to 16 lanes


@kernel
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
    """One AdamW step with 4-bit moments, in place and in one pass: `native.adamw8bit_` with two codes a byte.

    Args:
        weight, grad: fp32 or bf16, any shape, contiguous; as all tensors here.
        codes1, absmax1: first moment, signed map: [ceil(numel / 2)] uint8 and [ceil(numel / block)] fp32.
        codes2, absmax2: second moment, unsigned map.
        beta1, beta2, decay, alpha, eps, key, start: as in `native.adamw8bit_`.
        block: elements to a scale; a multiple of 32 up to 4096.

    Returns:
        True when done; False when nothing was touched and `plain.adamw4bit_` must do it.
    """
    n = weight.numel()
    half, scales = packed_numel(n), absmax_numel(n, block) if block > 0 else 0
    if not block_fits(block, _HALVES) or not fits(
        n,
        (weight, FLOATS, None),
        (grad, FLOATS, None),
        (codes1, CODES, half),
        (absmax1, FP32, scales),
        (codes2, CODES, half),
        (absmax2, FP32, scales),
    ):
        return False
    hashed, native = noise(key, start, n), library.load()
    if hashed is None or native is None:
        return False
    native.tare_adamw4(
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
        Step(beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, eps, hashed),
    )
    written(weight, codes1, absmax1, codes2, absmax2)
    return True


@kernel
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
    """One Lion step with a 4-bit moment, in place and in one pass; see `native.lion8bit_` and `adamw4bit_`.

    Returns:
        True when done; False when nothing was touched and `plain.lion4bit_` must do it.
    """
    n = weight.numel()
    half, scales = packed_numel(n), absmax_numel(n, block) if block > 0 else 0
    if not block_fits(block, _HALVES) or not fits(
        n, (weight, FLOATS, None), (grad, FLOATS, None), (codes, CODES, half), (absmax, FP32, scales)
    ):
        return False
    hashed, native = noise(key, start, n), library.load()
    if hashed is None or native is None:
        return False
    native.tare_lion4(
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        codes.data_ptr(),
        absmax.data_ptr(),
        n,
        block,
        torch.get_num_threads(),
        Step(beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, 0.0, hashed),
    )
    written(weight, codes, absmax)
    return True


@kernel
def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = fourbit.BLOCK) -> bool:
    """`fourbit.encode_into` for fp32 and bf16; True when done, False when nothing was touched."""
    n = x.numel()
    half, scales = packed_numel(n), absmax_numel(n, block) if block > 0 else 0
    if not block_fits(block, _HALVES) or not fits(n, (x, FLOATS, None), (codes, CODES, half), (absmax, FP32, scales)):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_encode4(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        codes.data_ptr(),
        absmax.data_ptr(),
        n,
        block,
        signed,
        torch.get_num_threads(),
    )
    written(codes, absmax)
    return True


@kernel
def decode_into(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor, block: int = fourbit.BLOCK) -> bool:
    """`fourbit.decode(..., out=out)`; True when done, False when nothing was touched."""
    n = out.numel()
    half, scales = packed_numel(n), absmax_numel(n, block) if block > 0 else 0
    if not block_fits(block, _HALVES) or not fits(n, (out, FP32, None), (codes, CODES, half), (absmax, FP32, scales)):
        return False
    native = library.load()
    if native is None:
        return False
    native.tare_decode4(out.data_ptr(), codes.data_ptr(), absmax.data_ptr(), n, block, signed, torch.get_num_threads())
    written(out)
    return True
