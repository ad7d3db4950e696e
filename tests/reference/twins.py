"""Slow, readable twins of the update rules, written from the method cards' equations in float64: one step each, one matrix at a time.

Each takes W and G [m, n], its own dictionary `s` of what it remembers, and returns the new W. Loops over columns stand where the library
broadcasts. Nothing here calls the library.
"""

import math
from typing import Any

import torch
from torch import Tensor

Memory = dict[str, Any]
GUARD = 1e-8


def _c(t: int, betas: tuple[float, float]) -> float:
    """Adam's bias correction c_t = sqrt(1 - b2^t) / (1 - b1^t)."""
    return math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def _adam(r: Tensor, s: Memory, betas: tuple[float, float], eps: float) -> Tensor:
    """N = M / (sqrt(V) + eps): the direction before bias correction, eps before it too."""
    b1, b2 = betas
    s["M"] = b1 * s.get("M", torch.zeros_like(r)) + (1 - b1) * r
    s["V"] = b2 * s.get("V", torch.zeros_like(r)) + (1 - b2) * r * r
    return s["M"] / (s["V"].sqrt() + eps)


def _tick(s: Memory) -> int:
    s["t"] = s.get("t", 0) + 1
    return s["t"]


def adamw(w: Tensor, g: Tensor, s: Memory, *, lr: float, betas: tuple[float, float], eps: float, wd: float) -> Tensor:
    """torch.optim.AdamW: decay first, eps after bias correction."""
    t = _tick(s)
    b1, b2 = betas
    s["M"] = b1 * s.get("M", torch.zeros_like(g)) + (1 - b1) * g
    s["V"] = b2 * s.get("V", torch.zeros_like(g)) + (1 - b2) * g * g
    m_hat, v_hat = s["M"] / (1 - b1**t), s["V"] / (1 - b2**t)
    return w - lr * wd * w - lr * m_hat / (v_hat.sqrt() + eps)


def lion(w: Tensor, g: Tensor, s: Memory, *, lr: float, betas: tuple[float, float], wd: float) -> Tensor:
    """Card 11: u = sign(b1 m + (1 - b1) G); m = b2 m + (1 - b2) G."""
    b1, b2 = betas
    m = s.get("m", torch.zeros_like(g))
    u = torch.sign(b1 * m + (1 - b1) * g)
    s["m"] = b2 * m + (1 - b2) * g
    return w * (1 - lr * wd) - lr * u


def momentum(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, momentum: float, dampening: float, nesterov: bool
) -> Tensor:
    """torch.optim.SGD: the buffer is the first gradient, not (1 - dampening) of it."""
    s["b"] = g if "b" not in s else momentum * s["b"] + (1 - dampening) * g
    return w - lr * (g + momentum * s["b"] if nesterov else s["b"])


def adafactor_direction(
    r: Tensor, s: Memory, *, lr: float, beta1: float | None, decay_rate: float, eps: float, clip: float
) -> Tensor:
    """The transformers form: R^2 + eps, row and column means, RMS clipped, first moment of the lr-scaled update."""
    t = _tick(s)
    beta2 = 1 - t**decay_rate
    square = r * r + eps
    s["row"] = beta2 * s.get("row", torch.zeros_like(square[:, 0])) + (1 - beta2) * square.mean(1)
    s["col"] = beta2 * s.get("col", torch.zeros_like(square[0])) + (1 - beta2) * square.mean(0)
    v = torch.outer(s["row"], s["col"]) / s["row"].mean()
    u = r / v.sqrt()
    u = u / max(1.0, (u.square().mean().sqrt() / clip).item())
    u = lr * u
    if beta1 is not None:
        s["u"] = beta1 * s.get("u", torch.zeros_like(u)) + (1 - beta1) * u
        u = s["u"]
    return u


def adafactor(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, wd: float, scale_parameter: float | None, **own: Any
) -> Tensor:
    """scale_parameter: the floor of RMS(W), or None for a learning rate as it stands."""
    relative = max(scale_parameter, w.square().mean().sqrt().item()) if scale_parameter is not None else 1.0
    return w * (1 - lr * wd) - adafactor_direction(g, s, lr=lr * relative, **own)


def basis(g: Tensor, rank: int, side: str) -> Tensor:
    """The top singular vectors of the wanted side, from the thin SVD of G as it stands."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u[:, :rank] if side == "left" else vh[:rank].T


def published_side(g: Tensor, proj_type: str = "std") -> str:
    """Square counts as tall, tall is projected on the right; reverse_std the other way."""
    tall = g.shape[0] >= g.shape[1]
    return "right" if tall == (proj_type == "std") else "left"


def _subspace(g: Tensor, s: Memory, rank: int, period: int, side: str, recorded: dict[int, Tensor] | None) -> Tensor:
    k = s.get("t", 0)
    if recorded is not None:
        s["P"] = recorded.get(k, s.get("P"))
    elif k % period == 0:
        s["P"] = basis(g, rank, side)
    return s["P"]


def galore(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, period: int, alpha: float, betas: tuple[float, float],
    eps: float, wd: float, side: str, recorded: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Card 1, steps 1-6; decay after the update, unscaled by alpha."""
    p = _subspace(g, s, rank, period, side, recorded)
    t = _tick(s)
    r = p.T @ g if side == "left" else g @ p
    n = _adam(r, s, betas, eps)
    lifted = p @ n if side == "left" else n @ p.T
    w = w - lr * _c(t, betas) * alpha * lifted
    return w - lr * wd * w


def galore_both(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, period: int, alpha: float, betas: tuple[float, float],
    eps: float, wd: float,
) -> Tensor:  # fmt: skip
    """Card 1, proj_type full: R = U^T G V."""
    if s.get("t", 0) % period == 0:
        s["U"], s["V2"] = basis(g, rank, "left"), basis(g, rank, "right")
    t = _tick(s)
    n = _adam(s["U"].T @ g @ s["V2"], s, betas, eps)
    w = w - lr * _c(t, betas) * alpha * (s["U"] @ n @ s["V2"].T)
    return w - lr * wd * w


def galore_adafactor(
    w: Tensor,
    g: Tensor,
    s: Memory,
    *,
    lr: float,
    rank: int,
    period: int,
    alpha: float,
    wd: float,
    side: str,
    **own: Any,
) -> Tensor:
    """Card 1, Adafactor variant: decay before; the direction is already lr-scaled, then lifted and scaled by alpha."""
    p = _subspace(g, s, rank, period, side, None)
    r = p.T @ g if side == "left" else g @ p
    u = adafactor_direction(r, s, lr=lr, **own)
    lifted = p @ u if side == "left" else u @ p.T
    return w * (1 - lr * wd) - alpha * lifted


def _ratios(n: Tensor, r: Tensor, side: str) -> list[float]:
    """|N_j| / (|R_j| + 1e-8), one column (left) or row (right) at a time."""
    if side == "right":
        n, r = n.T, r.T
    return [(n[:, j].norm() / (r[:, j].norm() + GUARD)).item() for j in range(n.shape[1])]


def _limit(x: Tensor, s: Memory, gamma: float | None, zero: str) -> Tensor:
    """The norm-growth limiter, with Python numbers."""
    if gamma is None:
        return x
    norm = x.norm().item()
    if zero == "skip" and norm == 0.0:
        return x
    q = 1.0
    if "rho" in s:
        q = max(norm / (s["rho"] + GUARD), gamma) / gamma
    s["rho"] = norm / q
    return x / q


def fira(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, period: int, alpha: float, betas: tuple[float, float],
    eps: float, wd: float, side: str, form: str, gamma: float | None, zero: str = "skip",
    recorded: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Card 5. code: S from G - alpha lift(R) and uncorrected N, c_t on both. paper: Algorithm 1, corrected N, alpha on both."""
    p = _subspace(g, s, rank, period, side, recorded)
    t = _tick(s)
    c = _c(t, betas)
    r = p.T @ g if side == "left" else g @ p
    n = _adam(r, s, betas, eps)
    if form == "paper":
        n = c * n
    back = p @ r if side == "left" else r @ p.T
    outside = g - (alpha if form == "code" else 1.0) * back
    phi = torch.tensor(_ratios(n, r, side), dtype=g.dtype)
    outside = outside * (phi[None, :] if side == "left" else phi[:, None])
    outside = _limit(outside, s, gamma, zero)
    s["S"] = outside
    lifted = p @ n if side == "left" else n @ p.T
    if form == "code":
        w = w - lr * c * (alpha * lifted + outside)
    else:
        w = w - lr * alpha * (lifted + outside)
    return w - lr * wd * w


def apollo(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, period: int, scale: float, betas: tuple[float, float],
    eps: float, wd: float, side: str, lift: str, scale_front: bool, gamma: float | None,
    recorded: dict[int, Tensor] | None, zero: str = "skip",
) -> Tensor:  # fmt: skip
    """Card 7: U = G phi; sqrt(scale) before or after the limiter; c_t last."""
    p = _subspace(g, s, rank, period, side, recorded)
    t = _tick(s)
    r = p.T @ g if side == "left" else g @ p
    n = _adam(r, s, betas, eps)
    if lift == "channel":
        phi = torch.tensor(_ratios(n, r, side), dtype=g.dtype)
        u = g * (phi[None, :] if side == "left" else phi[:, None])
    else:
        u = g * (n.norm() / (r.norm() + GUARD))
    if scale_front:
        u = u * math.sqrt(scale)
    u = _limit(u, s, gamma, zero)
    if not scale_front:
        u = u * math.sqrt(scale)
    w = w - lr * _c(t, betas) * u
    return w - lr * wd * w
