"""Slow, readable twins of the state-light methods, from the method cards' equations in float64. Nothing here calls the library."""

import math
from typing import Any

import torch
from torch import Tensor

Memory = dict[str, Any]


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The quintic iteration, one matrix [m, n], transposed when it has more rows than columns."""
    turned = x.shape[0] > x.shape[1]
    y = x.T if turned else x
    y = y / (y.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        a = y @ y.T
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return y.T if turned else y


def polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def muon(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, momentum: float, nesterov: bool, factor: float, wd: float,
    exact: bool = False,
) -> Tensor:  # fmt: skip
    """w [m, n], [E, m, n] (each by itself) or [out, in, k, k] (flattened)."""
    s["M"] = momentum * s.get("M", torch.zeros_like(g)) + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * s["M"] if nesterov else s["M"]
    f = polar if exact else newton_schulz
    o = torch.stack([f(x) for x in u]) if u.ndim == 3 else f(u.flatten(1)).view_as(u)
    return w * (1 - lr * wd) - lr * factor * o


def scion(
    w: Tensor,
    g: Tensor,
    s: Memory,
    *,
    lr: float,
    a: float,
    scale: float,
    norm: str,
    constrained: bool,
    ratio: float = 1.0,
) -> Tensor:
    s["B"] = (1 - a) * s.get("B", torch.zeros_like(g)) + a * g
    return (1 - lr if constrained else 1.0) * w - lr * ratio * scale * lmo(s["B"], norm)


def lmo(b: Tensor, norm: str) -> Tensor:
    if b.ndim < 2:
        return b / (b.square().mean().sqrt() + 1e-8)
    m, n = b.shape
    if norm == "spectral":
        return newton_schulz(b) * math.sqrt(m / n)
    if norm == "sign":
        return b.sign() / n
    out = b.clone()
    if norm == "col-norm":
        for j in range(n):
            out[:, j] = b[:, j] / (b[:, j].square().mean().sqrt() + 1e-8)
    else:
        for i in range(m):
            out[i] = b[i] / (b[i].norm() * math.sqrt(n) + 1e-8)
    return out


def lanton(
    ws: list[Tensor],
    gs: list[Tensor],
    s: Memory,
    *,
    lr: float,
    betas: tuple[float, float],
    alpha: float,
    norms: list[str],
) -> list[Tensor]:
    """One group of leaves; H from the second step on."""
    b1, b2 = betas
    noise = s.setdefault("H", [0.0] * len(ws))
    rates = []
    for i, g in enumerate(gs):
        if "previous" in s:
            d = g - s["previous"][i]
            noise[i] = b2 * noise[i] + (1 - b2) * (lmo(d, norms[i]) * d).sum().item() ** 2
        rates.append(alpha / math.sqrt(alpha**2 + noise[i]))
    s["previous"] = [g.clone() for g in gs]
    s["rates"] = [lr * math.sqrt(a / max(rates)) for a in rates]
    out = []
    for i, (w, g) in enumerate(zip(ws, gs, strict=True)):
        own = s.setdefault(f"leaf {i}", {})
        out.append(scion(w, g, own, lr=s["rates"][i], a=1 - b1, scale=1.0, norm=norms[i], constrained=False))
    return out


def sinkhorn(g: Tensor, iterations: int) -> Tensor:
    x = g.clone()
    m, n = x.shape
    for _ in range(iterations):
        for i in range(m):
            if x[i].norm() > 0:
                x[i] = math.sqrt(n) * x[i] / x[i].norm()
        for j in range(n):
            if x[:, j].norm() > 0:
                x[:, j] = math.sqrt(m) * x[:, j] / x[:, j].norm()
    return x


def sinkgd(w: Tensor, g: Tensor, s: Memory, *, lr: float, scale: float, iterations: int, wd: float) -> Tensor:
    return w * (1 - lr * wd) - lr * scale * sinkhorn(g, iterations)


def swan(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, scale: float, centred: bool, iterations: int, wd: float
) -> Tensor:
    turned = g.shape[0] > g.shape[1]
    x = (g.T if turned else g).clone()
    for i in range(x.shape[0]):
        row = x[i] - x[i].mean() if centred else x[i]
        x[i] = row / row.square().mean().sqrt()
    a = x @ x.T
    size = a.norm()
    y, z, eye = a / size, torch.eye(len(a), dtype=a.dtype), torch.eye(len(a), dtype=a.dtype)
    for _ in range(iterations):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    d = z @ x / size.sqrt()
    d = d * x.norm() / d.norm()
    return w * (1 - lr * wd) - lr * scale * (d.T if turned else d)


def lion_kappa(
    w: Tensor, g: Tensor, s: Memory, *, lr: float, betas: tuple[float, float], kappa: str, width: float, wd: float
) -> Tensor:
    """size = unit: the bare gradient of K."""
    b1, b2 = betas
    m = s.get("m", torch.zeros_like(g))
    x = b1 * m + (1 - b1) * g
    s["m"] = b2 * m + (1 - b2) * g
    if kappa == "l1":
        u = x.sign()
    elif kappa == "l2":
        u = x / x.square().sum().sqrt()
    elif kappa == "nuclear":
        u = polar(x)
    elif kappa == "dead-zone":
        u = x.sign() * (x.abs() > width)
    else:
        u = torch.where(x.abs() <= width, x / width, x.sign())
    return w * (1 - lr * wd) - lr * u
