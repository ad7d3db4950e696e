"""The native kernel of random directions, called through ctypes; see `native` for how it is built, trusted and refused.

The twin is `directions`.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tare.kernels import library
from tare.kernels.calls import BF16, fits, kernel, noise, written
from tare.kernels.directions import Law, segments, words
from tare.kernels.library import Directions

_FORMS = (torch.float32, torch.bfloat16, torch.float64)  # numbered as in directions.hpp
_LAWS: tuple[Law, ...] = ("gaussian", "signs")


@kernel
def write_(
    weight: Tensor, keys: Sequence[int], coefficients: Sequence[float], *, law: Law = "gaussian", decay: float = 1.0,
    alpha: float = -1.0, scale: float = 1.0, start: int = 0, source: Tensor | None = None, low: Tensor | None = None,
    key: int | None = None, of: Tensor | None = None, limit: float | Tensor = math.inf,
) -> bool:  # fmt: skip
    """`directions.write_`, where the arguments are explained, in one pass; the same bits.

    Args:
        weight: fp32, bf16 or fp64. of: of the same dtype.

    Returns:
        True when done; False when nothing was touched.
    """
    n = weight.numel()
    wanted: list[tuple[Tensor, tuple[torch.dtype, ...], int | None]] = [(weight, _FORMS if low is None else BF16, None)]
    if source is not None:
        wanted.append((source, (weight.dtype,), None))
    if of is not None:
        wanted.append((of, (weight.dtype,), None))
    if low is not None:
        wanted.append((low, (torch.int8,), None))
    if not fits(n, *wanted) or (low is not None and (source is not None or decay == 0.0)):
        return False
    native = library.load()
    if native is None:
        return False
    members, done = len(keys), 0
    sizes, bound = weight.element_size(), 0.0 if of is None else float(limit)
    numbers = (ctypes.c_double * members)(*coefficients)
    for high, first, count in segments(start, n):
        rounded = noise(key if weight.dtype == torch.bfloat16 else None, (high << 32) + first, count)
        assert rounded is not None  # a segment crosses no multiple of 2^32
        at = weight.data_ptr() + done * sizes
        native.tare_directions(
            _LAWS.index(law),
            at,
            at if source is None else source.data_ptr() + done * sizes,
            _FORMS.index(weight.dtype),
            None if low is None else low.data_ptr() + done,
            (ctypes.c_uint32 * (3 * members))(*(word for k in keys for word in words(k, high))),
            numbers,
            members,
            count,
            first,
            torch.get_num_threads(),
            Directions(decay, alpha, scale, rounded),
            None if of is None else of.data_ptr() + done * sizes,
            bound,
        )
        done += count
    written(weight, *(() if low is None else (low,)))
    return True
