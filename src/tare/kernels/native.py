"""The native kernels, called through ctypes: one pass over memory where plain torch operations need about thirty.

Compiled on first use with the machine's C++ compiler and tested against the plain twins before anything trusts it. Every call returns
True when it did the work and False when it cannot (no compiler, a CUDA or fake or strided tensor, another dtype): then the caller uses
the twin in `blockwise`, `plain` or `rounding`, which gives the same codes. `TARE_NATIVE=0` in the environment turns it off.
"""

import ctypes
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from tare.kernels import blockwise, build, rounding

_INTERFACE = 1
_FLOATS = (torch.float32, torch.bfloat16)
_FP32, _CODES, _BF16 = (torch.float32,), (torch.uint8,), (torch.bfloat16,)


class _Noise(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint32), ("on", ctypes.c_int), ("index", ctypes.c_uint32)]


class _Step(ctypes.Structure):
    _fields_ = [(x, ctypes.c_float) for x in ("beta1", "rest1", "beta2", "rest2", "decay", "alpha", "eps")] + [
        ("noise", _Noise)
    ]


_lock = threading.Lock()
_trial = threading.local()  # the library that this thread is testing; nobody else sees it before it has passed
_library: ctypes.CDLL | None = None
_reason: str | None = None  # None until the first attempt


def _declare(library: ctypes.CDLL) -> None:
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    step = ctypes.POINTER(_Step)
    for name, arguments in {
        "tare_tables": [p, p, p, p],
        "tare_adamw": [p, i, p, i, p, p, p, p, n, i, i, step],
        "tare_lion": [p, i, p, i, p, p, n, i, i, step],
        "tare_write": [p, p, n, i, step],
        "tare_encode": [p, i, p, p, n, i, i, i],
        "tare_decode": [p, p, p, n, i, i, i],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None


def _accept(library: ctypes.CDLL) -> str | None:
    from tare.kernels import selftest  # it imports this module

    try:
        if library.tare_interface() != _INTERFACE:
            return "the compiled library has another interface"
        _declare(library)
    except AttributeError as error:
        return f"the compiled library lacks {error}"
    tables = [
        (ctypes.c_float * 256)(*x(s)) for s in (False, True) for x in (blockwise.map_values, blockwise.map_thresholds)
    ]
    library.tare_tables(*tables)
    _trial.library = library
    try:
        return selftest.objection()
    finally:
        _trial.library = None


def _load() -> ctypes.CDLL | None:
    global _library, _reason
    on_trial: ctypes.CDLL | None = getattr(_trial, "library", None)
    if on_trial is not None:
        return on_trial
    if os.environ.get("TARE_NATIVE", "1") == "0":
        return None
    if _reason is None:
        with _lock:
            if _reason is None:
                try:
                    _library = build.library(Path(__file__).with_name("native.cpp"), _accept)
                    threads = "threads" if _library.tare_threaded() else "one thread"
                    _reason = f"C++ kernels in use ({_library.tare_lanes()} lanes, {threads})"
                except build.Unavailable as error:
                    _reason = f"plain torch kernels: {error}"
                except Exception as error:  # a kernel that cannot be had must never stop a run
                    _reason = f"plain torch kernels: {type(error).__name__}: {error}".splitlines()[0]
    return _library


def available() -> bool:
    """Whether native calls are taken. Compiles on the first call (about two seconds, once for a machine)."""
    return _load() is not None


def reason() -> str:
    """One line for people: what runs, and if it is the plain twins, why. Compiles on the first call."""
    if os.environ.get("TARE_NATIVE", "1") == "0":
        return "plain torch kernels: TARE_NATIVE=0"
    _load()
    return _reason or "plain torch kernels"


def _fits(numel: int, *tensors: tuple[Tensor, tuple[torch.dtype, ...], int | None]) -> bool:
    """The one place that decides whether raw pointers may be taken. `None` as a size means `numel`."""
    for x, dtypes, size in tensors:
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:  # fake, distributed and other wrapped tensors
            return False
        if x.device.type != "cpu" or x.dtype not in dtypes or x.layout != torch.strided:
            return False
        if x.numel() != (numel if size is None else size) or not x.is_contiguous() or x.is_neg():
            return False
    return numel > 0 and not torch.compiler.is_compiling()


def _block_fits(block: int) -> bool:
    return 16 <= block <= 4096 and block % 16 == 0


def _written(*tensors: Tensor) -> None:
    """Tell autograd, which cannot see a write through a pointer."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _noise(key: int | None, start: int, numel: int) -> _Noise | None:
    """None when the elements' indices cross a multiple of 2^32, where the hash's base changes: left to the twin."""
    if key is None:
        return _Noise(0, 0, 0)
    if start < 0 or start >> 32 != (start + numel - 1) >> 32:
        return None
    return _Noise(rounding.base(key, start >> 32), 1, start & rounding.MASK)


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
    noise, library = _noise(key, start, n), _load()
    if noise is None or library is None:
        return False
    library.tare_adamw(
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
        _Step(beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, eps, noise),
    )
    _written(weight, codes1, absmax1, codes2, absmax2)
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
    noise, library = _noise(key, start, n), _load()
    if noise is None or library is None:
        return False
    library.tare_lion(
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        codes.data_ptr(),
        absmax.data_ptr(),
        n,
        block,
        torch.get_num_threads(),
        _Step(beta1, 1 - beta1, beta2, 1 - beta2, decay, alpha, 0.0, noise),
    )
    _written(weight, codes, absmax)
    return True


def write_stochastic_(weight: Tensor, update: Tensor, *, decay: float, alpha: float, key: int, start: int = 0) -> bool:
    """W <- SR(decay W - alpha U) for a bf16 weight and an fp32 update; bit-identical to `rounding.write_stochastic_`.

    Returns:
        True when done; False when nothing was touched.
    """
    n = weight.numel()
    if not _fits(n, (weight, _BF16, None), (update, _FP32, None)):
        return False
    noise, library = _noise(key, start, n), _load()
    if noise is None or library is None:
        return False
    step = _Step(0, 0, 0, 0, decay, alpha, 0, noise)
    library.tare_write(weight.data_ptr(), update.data_ptr(), n, torch.get_num_threads(), step)
    _written(weight)
    return True


def encode_into(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = blockwise.BLOCK) -> bool:
    """`blockwise.encode_into` for fp32 and bf16; True when done, False when nothing was touched."""
    n = x.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    if not _block_fits(block) or not _fits(n, (x, _FLOATS, None), (codes, _CODES, None), (absmax, _FP32, scales)):
        return False
    library = _load()
    if library is None:
        return False
    library.tare_encode(
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


def decode_into(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor, block: int = blockwise.BLOCK) -> bool:
    """`blockwise.decode(..., out=out)`; True when done, False when nothing was touched."""
    n = codes.numel()
    scales = blockwise.absmax_numel(n, block) if block > 0 else 0
    if not _block_fits(block) or not _fits(n, (codes, _CODES, None), (absmax, _FP32, scales), (out, _FP32, None)):
        return False
    library = _load()
    if library is None:
        return False
    library.tare_decode(out.data_ptr(), codes.data_ptr(), absmax.data_ptr(), n, block, signed, torch.get_num_threads())
    _written(out)
    return True
