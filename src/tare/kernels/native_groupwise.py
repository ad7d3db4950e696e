"""The native kernels of affine groups, called through ctypes; see `native` for how they are built, trusted and refused.

The twins are in `groupwise`, and in `nibbles` for two codes a byte.
"""

from typing import Literal

import torch
from torch import Tensor

from tare.kernels import library
from tare.kernels.blockwise import absmax_numel
from tare.kernels.calls import CODES, FLOATS, FP32, fits, kernel, noise, written
from tare.kernels.library import Step
from tare.kernels.nibbles import packed_numel

_FORMS = ("symmetric", "affine", "clamped")  # numbered as in groupwise.hpp
_MOST = 4096  # elements of a group: the kernel's buffers


@kernel
def step_(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    update: Tensor,
    *,
    group: int,
    form: Literal["symmetric", "affine", "clamped"],
    decay: float,
    alpha: float,
    key: int | None = None,
    start: int = 0,
) -> bool:
    """W <- encode(decay W - alpha U) for 8-bit codes with new scales, in one pass: the codes of the twin, `encode_affine` of that.

    Args:
        codes: uint8, whole groups of a weight, contiguous; as all tensors here.
        scale: [ceil(numel / group)] fp32.
        zero: the same; None for `symmetric`.
        update: fp32, as many elements as `codes`: U.
        group: elements that share a scale, up to 4096.
        form: as `Int8Weight` names it.
        decay, alpha: as written here.
        key: stochastic rounding with this key; None rounds to nearest.
        start: number of the first element for `key`.

    Returns:
        True when done; False when nothing was touched.
    """
    n = codes.numel()
    groups = absmax_numel(n, group)
    zeros = [] if zero is None else [(zero, FP32, groups)]
    if not 1 <= group <= _MOST or (zero is None) != (form == "symmetric"):
        return False
    if not fits(n, (codes, CODES, None), (scale, FP32, groups), *zeros, (update, FP32, None)):
        return False
    hashed, native = noise(key, start, n), library.load()
    if native is None or hashed is None:
        return False
    native.tare_groups_step(
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        update.data_ptr(),
        n,
        group,
        _FORMS.index(form),
        torch.get_num_threads(),
        Step(0, 0, 0, 0, decay, alpha, 0, hashed),
    )
    written(codes, scale, *(() if zero is None else (zero,)))
    return True


@kernel
def decode_into(
    codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, group: int, packed: bool = False
) -> bool:
    """(code - zero) * scale into `out`, fp32 or bf16; zero: fp32 or uint8, None for 128. packed: 4-bit codes as `nibbles.pack` has them.

    Returns:
        True when done; False when nothing was touched.
    """
    n = out.numel()
    groups = absmax_numel(n, group)
    zeros = [] if zero is None else [(zero, (*FP32, *CODES), groups)]
    if not 1 <= group <= _MOST or (packed and group % 2):
        return False
    sizes = (codes, CODES, packed_numel(n) if packed else None), (scale, FP32, groups), (out, FLOATS, None)
    native = library.load()
    if native is None or not fits(n, *sizes, *zeros):
        return False
    bytes_ = zero is not None and zero.dtype == torch.uint8
    native.tare_groups_decode(
        codes.data_ptr(),
        packed,
        scale.data_ptr(),
        None if zero is None or bytes_ else zero.data_ptr(),
        zero.data_ptr() if zero is not None and bytes_ else None,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        n,
        group,
        torch.get_num_threads(),
    )
    written(out)
    return True
