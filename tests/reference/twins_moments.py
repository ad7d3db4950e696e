"""Slow, readable twins of Adan, diffGrad and GradNormLoRP, from the method cards' equations in float64.

As in `twins`: each takes W and G, its own dictionary `s`, and returns the new W. Nothing here calls the library.
"""

import math

import torch
from reference.twins import Memory, _adam, _c, _subspace, _tick
from torch import Tensor


def adan(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, betas: tuple[float, float, float], eps: float, wd: float, no_prox: bool,
    max_norm: float = 0.0,
) -> Tensor:  # fmt: skip
    """Card 12."""
    t = _tick(s)
    b1, b2, b3 = betas
    if max_norm:
        g = g * min(1.0, max_norm / (g.norm().item() + eps))
    d = g - s["G"] if t > 1 else torch.zeros_like(g)
    s["G"] = g
    zero = torch.zeros_like(g)
    s["m"] = b1 * s.get("m", zero) + (1 - b1) * g
    s["v"] = b2 * s.get("v", zero) + (1 - b2) * d
    z = g + b2 * d
    s["n"] = b3 * s.get("n", zero) + (1 - b3) * z * z
    u = (s["m"] / (1 - b1**t) + b2 * s["v"] / (1 - b2**t)) / (s["n"].sqrt() / math.sqrt(1 - b3**t) + eps)
    if no_prox:
        return w * (1 - lr * wd) - lr * u
    return (w - lr * u) / (1 + lr * wd)


def diffgrad(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, betas: tuple[float, float], eps: float, wd: float, alias: bool = False
) -> Tensor:  # fmt: skip
    """Card 15. alias: the kept gradient is the gradient."""
    t = _tick(s)
    g = g + wd * w
    n = _adam(g, s, betas, eps)
    before = g if alias else s.get("G", torch.zeros_like(g))
    s["G"] = g
    return w - lr * _c(t, betas) * n / (1 + torch.exp(-(before - g).abs()))


def _norms(v: Tensor, axis: str) -> Tensor:
    return v.square().sum(1 if axis == "row" else 0, keepdim=True).sqrt()


def gradnorm_lorp(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, period: int, alpha: float, betas: tuple[float, float], eps: float,
    wd: float, side: str, axis: str, form: str, recorded: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Card 4, with v kept whole. paper: autograd's gradients of W = g v / |v|. code: as published."""
    if "v" not in s:
        s["v"], s["g"], s["a"], s["b"] = w.clone(), _norms(w, axis), {}, {}
    v, size, down = s["v"], _norms(s["v"], axis), 1 if axis == "row" else 0
    if form == "code":
        s["g"] = size
    grad_g = (g * v / size).sum(down, keepdim=True)
    grad_v = s["g"] / size * (g - v / size * grad_g) if form == "paper" else g
    p = _subspace(grad_v, s, rank, period, side, recorded)
    t = _tick(s)
    r = p.T @ grad_v if side == "left" else grad_v @ p
    n = _adam(r, s["a"], betas, eps)
    lifted = p @ n if side == "left" else n @ p.T
    v = (v - lr * _c(t, betas) * alpha * lifted) * (1 - lr * wd)
    s["g"] = (s["g"] - lr * _c(t, betas) * _adam(grad_g, s["b"], betas, eps)) * (1 - lr * wd)
    s["v"] = v
    return s["g"] * v / _norms(v, axis)
