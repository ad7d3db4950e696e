"""Slow float64 twins of FRUGAL, Online Subspace Descent, DCT-AdamW, Trion, GaLore+ and Q-GaLore's calendar, from the cards' equations.

As in `twins`: W, G [m, n], a memory `s`, the new W; nothing here calls the library. Full matrices and loops stand where it gathers.
"""

import math
from typing import Any

import torch
from reference.twins import Memory, basis, published_side
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # Newton-Schulz of Muon


def _adam(r: Tensor, s: Memory, t: int, betas: tuple[float, float], eps: float, name: str = "") -> Tensor:
    """Adam's direction with eps after bias correction."""
    b1, b2 = betas
    s["M" + name] = b1 * s.get("M" + name, torch.zeros_like(r)) + (1 - b1) * r
    s["V" + name] = b2 * s.get("V" + name, torch.zeros_like(r)) + (1 - b2) * r * r
    return (s["M" + name] / (1 - b1**t)) / ((s["V" + name] / (1 - b2**t)).sqrt() + eps)


def frugal(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, period: int, kappa: float, eps: float, wd: float, chosen: Any,
    outside: str = "sign",
) -> Tensor:  # fmt: skip
    """Card 6. chosen(k, g): a 0/1 mask of entries, or a basis (side, P), valid from update k on; moments start anew there."""
    k = s.get("k", 0)
    if k % period == 0:
        s["choice"], s["since"] = chosen(k, g), 0
        s.pop("M", None), s.pop("V", None)
    s["k"], s["since"] = k + 1, s["since"] + 1
    w = w * (1 - lr * wd)
    choice = s["choice"]
    if isinstance(choice, tuple):
        side, p = choice
        r = p.T @ g if side == "left" else g @ p
        n = _adam(r, s, s["since"], (0.9, 0.999), eps)
        inside = p @ n if side == "left" else n @ p.T
        rest = g - (p @ r if side == "left" else r @ p.T)
    else:
        inside = _adam(g * choice, s, s["since"], (0.9, 0.999), eps) * choice
        rest = g * (1 - choice)
    rest = {"sign": torch.sign(rest), "sgd": rest, "none": torch.zeros_like(rest)}[outside]
    return w - lr * inside - lr * kappa * rest


def online_subspace(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, first_lr: float, rank: int, gap: int, alpha: float, wd: float
) -> Tensor:
    """Card 8, Adam inside with eps 1e-6 before bias correction; P's gradient by autograd through the loss as written."""
    side = published_side(g)
    t = s["t"] = s.get("t", 0) + 1
    if t == 1:
        s["P"] = basis(g, rank, side)
    p = s["P"]
    r = p.T @ g if side == "left" else g @ p
    s["M"] = 0.9 * s.get("M", 0) + 0.1 * r
    s["V"] = 0.999 * s.get("V", 0) + 0.001 * r * r
    c = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    n = s["M"] / (s["V"].sqrt() + 1e-6)
    w = w - lr * c * alpha * (p @ n if side == "left" else n @ p.T)
    w = w - lr * wd * w
    if t > 1:
        h = g / g.norm()
        h = h if side == "left" else h.T
        q = p.clone().requires_grad_()
        ((q @ q.T @ h - h) ** 2).sum().backward()
        step = _adam(q.grad, s, t - 1, (0.9, 0.999), 1e-8, "P")
        rate = lr / first_lr / gap
        s["P"] = p * (1 - rate * 0.01) - rate * step
    return w


def cosines(size: int) -> Tensor:
    """D[i, j] = sqrt(2 / s) cos(pi i (2 j + 1) / (2 s)), row 0 divided by sqrt(2), entry by entry."""
    d = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            d[i, j] = math.sqrt(2 / size) * math.cos(math.pi * i * (2 * j + 1) / (2 * size))
    d[0] /= math.sqrt(2)
    return d


def _columns(x: Tensor, q: Tensor, rank: int, norm: int) -> list[int]:
    scores = [float((x @ q[:, j]).abs().pow(norm).sum()) for j in range(q.shape[1])]
    return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:rank])


def dct_adamw(
    w: Tensor,
    g: Tensor,
    s: Memory,
    *,
    lr: float,
    rank: int,
    period: int,
    wd: float,
    norm: int,
    transform: str,
    feedback: bool,
) -> Tensor:
    """Card 9 with rotation, as a full matrix: moments live at all columns of Q, and are cleared where a column is not kept."""
    if g.shape[0] < g.shape[1]:  # wide is tall, transposed
        return dct_adamw(
            w.T, g.T, s, lr=lr, rank=rank, period=period, wd=wd, norm=norm, transform=transform, feedback=feedback
        ).T
    t = s["t"] = s.get("t", 0) + 1
    q = cosines(g.shape[1])
    q = q if transform == "matmul" else q.T
    w = w * (1 - lr * wd)
    a = g + s.get("E", 0)
    if t == 1 or t % period == 0:
        chosen = _columns(a, q, rank, norm)
        kept = [j for j in chosen if j in s.get("I", [])]
        mask = torch.zeros(q.shape[1], dtype=g.dtype)
        mask[kept] = 1
        s["M"], s["V"], s["I"] = s.get("M", 0) * mask, s.get("V", 0) * mask, chosen
    now = torch.zeros(q.shape[1], dtype=g.dtype)
    now[s["I"]] = 1
    r = a @ q * now
    if feedback:
        s["E"] = a - r @ q.T
    s["M"] = (0.9 * s["M"] + 0.1 * r) * now
    s["V"] = (0.999 * s["V"] + 0.001 * r * r) * now
    c = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    n = s["M"] / (s["V"].sqrt() + 1e-8 * math.sqrt(1 - 0.999**t))
    return w - lr * c * (n * now) @ q.T


def newton_schulz(x: Tensor) -> Tensor:
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        y = x @ x.T
        x = A * x + (B * y + C * y @ y) @ x
    return x


def trion(w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, mu: float, wd: float) -> Tensor:
    """Card 9, Trion: B = M + G; b = the top-r columns of B Q; M = B - (1 - mu) b Q^T; O = NS5(b)."""
    rows, columns = g.shape
    q = cosines(min(rows, columns))
    b = s.get("M", 0) + g
    tall = rows >= columns
    chosen = _columns(b if tall else b.T, q, rank, 1)
    q = q[:, chosen]
    low = b @ q if tall else q.T @ b
    s["M"] = b - (1 - mu) * (low @ q.T if tall else q @ low)
    o = newton_schulz(low)
    return w * (1 - lr * wd) - lr * max(1.0, rows / columns) ** 0.5 * (o @ q.T if tall else q @ o)


def galore_plus(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, rank: int, period: int, alpha: float, density: float
) -> Tensor:
    """Card 3 without heads and with exact SVD: GaLore, and element-wise Adam on the fixed entries where G - lift(R) was largest."""
    side = published_side(g)
    t = s["t"] = s.get("t", 0) + 1
    if (t - 1) % period == 0:
        s["P"] = basis(g, rank, side)
    p = s["P"]
    r = p.T @ g if side == "left" else g @ p
    s["M"] = 0.9 * s.get("M", 0) + 0.1 * r
    s["V"] = 0.999 * s.get("V", 0) + 0.001 * r * r
    c = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    n = s["M"] / (s["V"].sqrt() + 1e-6)
    rest = g - (p @ r if side == "left" else r @ p.T)
    if "mask" not in s:
        count = max(1, int(density * g.numel()))
        s["mask"] = torch.zeros_like(g)
        s["mask"].view(-1)[rest.abs().view(-1).topk(count).indices] = 1
    more = _adam(rest * s["mask"], s, t, (0.9, 0.999), 1e-8, "S") * s["mask"]
    return w - lr * alpha * (c * (p @ n if side == "left" else n @ p.T) + more)
