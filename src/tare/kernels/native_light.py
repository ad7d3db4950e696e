"""The native kernels of element-wise rules other than Adam, called through ctypes; see `native` for how they are built and trusted.

fp32 and bf16 weights, gradients and moments; weights in 24 bits too. The twins are in `plain_light`.
"""

import ctypes

import torch
from torch import Tensor

from tare.kernels import library
from tare.kernels.calls import BF16, FLOATS, fits, kernel, noise, written
from tare.kernels.library import Light, Noise
from tare.kernels.plain_light import Map, Write

_INT8 = (torch.int8,)
_MAPS: dict[str, int] = {"none": 0, "sign": 1, "dead-zone": 2, "huber": 3}
# numbers of the rules in light.hpp; those with a map are followed by one for each
_LION, _ADAN, _DIFFGRAD, _MOMENTUM, _MAPPED = 0, 4, 6, 8, 10
_MOST = 4  # moments of a rule


def _run(
    rule: int,
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, ...],
    low: Tensor | None,
    write: Write,
    **rates: float,
) -> bool:
    """One call. rates: fields of `Light`."""
    n = weight.numel()
    wanted = [(weight, BF16 if low is not None else FLOATS, None), (grad, FLOATS, None)]
    wanted += [(m, (moments[0].dtype,) if number else FLOATS, None) for number, m in enumerate(moments)]
    if low is not None:
        wanted.append((low, _INT8, None))
    if not fits(n, *wanted):
        return False
    keys = write.keys or (None,) * len(moments)
    own, native = noise(write.key, write.start, n), library.load()
    drawn = [x for x in (noise(key, write.start, n) for key in keys) if x is not None]
    if native is None or own is None or len(drawn) < len(keys):
        return False
    light = Light(**rates, factor=write.factor, decay=write.decay, alpha=write.alpha, weight=own)
    light.moments = (Noise * _MOST)(*drawn)
    native.tare_light(
        rule,
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        None if low is None else low.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        (ctypes.c_void_p * _MOST)(*(m.data_ptr() for m in moments)),
        len(moments),
        bool(moments) and moments[0].dtype == torch.bfloat16,
        n,
        torch.get_num_threads(),
        light,
    )
    written(weight, *moments, *(() if low is None else (low,)))
    return True


@kernel
def mapped_(
    weight: Tensor, grad: Tensor, low: Tensor | None, write: Write, *, kind: Map = "none", width: float = 0.0
) -> bool:
    """One step without state: U = map(G), in place and in one pass.

    Args:
        weight: bf16 or fp32, any shape, contiguous; as all tensors here.
        grad: fp32 or bf16, as many elements; may be `weight` itself where that is not read (see `Write`).
        low: int8, the corrections of a bf16 weight in 24 bits (see `split24`), or None.
        write: how U becomes the new weight, and how the gradient is read.
        kind: the map: `none`, `sign`, `dead-zone` (sign(x) where |x| > width, else 0) or `huber` (clip(x / width, -1, 1)).
        width: of the map, in units of the gradient.

    Returns:
        True when done; False when nothing was touched and `plain_light.mapped_` must do it.
    """
    return _run(_MAPPED + _MAPS[kind], weight, grad, (), low, write, width=width)


@kernel
def lion_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    low: Tensor | None,
    write: Write,
    *,
    beta1: float,
    beta2: float,
    kind: Map = "sign",
    width: float = 0.0,
) -> bool:
    """One Lion step: U = map(beta1 m + (1 - beta1) G); m = beta2 m + (1 - beta2) G.

    Args:
        weight, grad, low, write, kind, width: as in `mapped_`.
        exp_avg: the moment, fp32 or bf16.
        beta1, beta2: read-out interpolation, and decay rate of the moment.

    Returns:
        True when done; False when nothing was touched.
    """
    rates = {"beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "width": width}
    return _run(_LION + _MAPS[kind], weight, grad, (exp_avg,), low, write, **rates)


@kernel
def adan_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    previous: Tensor,
    low: Tensor | None,
    write: Write,
    *,
    betas: tuple[float, float, float],
    mix: float,
    eps: float,
    first: bool,
) -> bool:
    """One Adan step: d = G - previous (0 at first); m, v average G and d; n averages (G + b2 d)^2; U = (m + mix v) / (sqrt(n) + eps).

    Args:
        weight, grad, low, write: as in `mapped_`.
        exp_avg, exp_avg_diff, exp_avg_sq, previous: m, v, n and the last gradient, all fp32 or all bf16.
        betas: of m, v and n.
        mix: b2 (1 - b1^t) / (1 - b2^t), where alpha has the corrections of m and n.
        eps: added to sqrt(n) before bias correction.
        first: whether there is no last gradient.

    Returns:
        True when done; False when nothing was touched.
    """
    b1, b2, b3 = betas
    rates = {"beta1": b1, "rest1": 1 - b1, "beta2": b2, "rest2": 1 - b2, "beta3": b3, "rest3": 1 - b3}
    kept = (exp_avg, exp_avg_diff, exp_avg_sq, previous)
    return _run(_ADAN + (not first), weight, grad, kept, low, write, **rates, mix=mix, eps=eps)


@kernel
def diffgrad_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    previous: Tensor | None,
    low: Tensor | None,
    write: Write,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> bool:
    """One diffGrad step: m and v as in Adam; U = sigmoid(|previous - G|) m / (sqrt(v) + eps).

    Args:
        weight, grad, low, write: as in `mapped_`.
        exp_avg, exp_avg_sq: the moments; previous: the last gradient; all fp32 or all bf16. None: U without the sigmoid.
        beta1, beta2: decay rates.
        eps: added to sqrt(v) before bias correction.

    Returns:
        True when done; False when nothing was touched.
    """
    kept = (exp_avg, exp_avg_sq) if previous is None else (exp_avg, exp_avg_sq, previous)
    rates = {"beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps}
    return _run(_DIFFGRAD + (previous is None), weight, grad, kept, low, write, **rates)


@kernel
def momentum_(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    low: Tensor | None,
    write: Write,
    *,
    beta: float,
    rest: float,
    nesterov: bool = False,
) -> bool:
    """One step with momentum: b = beta b + rest G; U = b, or G + beta b.

    Args:
        weight, grad, low, write: as in `mapped_`.
        buffer: b, fp32 or bf16.
        beta, rest: see above.
        nesterov: whether U looks ahead.

    Returns:
        True when done; False when nothing was touched.
    """
    return _run(_MOMENTUM + nesterov, weight, grad, (buffer,), low, write, beta1=beta, rest1=rest)
