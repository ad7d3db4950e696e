"""A trial on each device before anything trusts the kernels there: a few hundred numbers through two of them and through their twins.

A kernel that cannot be compiled or launched (no C compiler for Triton's launcher, an old driver, a device that it does not know) must never
stop a run: the plain twins serve instead, and `dispatch.reason` says why.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tare.kernels import blockwise, plain, rounding


def _wave(n: int, step: float, device: torch.device) -> Tensor:
    """Fixed numbers over seven decades, without touching any random generator."""
    t = torch.arange(n, dtype=torch.float64)
    return (torch.sin(t * step) * torch.pow(10.0, 3.5 * torch.cos(t * step * 0.37) - 5.0)).to(torch.float32).to(device)


def _differences(device: torch.device) -> str | None:
    from tare.kernels.triton import dense, eightbit  # Triton itself is imported here

    n = 601
    u = _wave(n, 0.3, device)
    u[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    ours = _wave(n, 0.2, device).to(torch.bfloat16)
    theirs = ours.clone()
    done = dense.write_stochastic_(ours, u, decay=0.9, alpha=0.3, key=77, start=5)
    rounding.write_stochastic_(theirs, u, decay=0.9, alpha=0.3, key=77, start=5)
    if not done or not torch.equal(ours.view(torch.int16), theirs.view(torch.int16)):
        return "stochastic rounding differs from the plain twin"
    moments = [
        y
        for signed in (True, False)
        for y in blockwise.encode(torch.zeros(n, dtype=torch.float32, device=device), signed)
    ]
    a, b = ([_wave(n, 1.3, device), *(x.clone() for x in moments)] for _ in range(2))
    for step in (0.9, 1.1):
        g = _wave(n, step, device)
        rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "decay": 0.999, "alpha": 0.01, "eps": 1e-8}
        done = eightbit.adamw8bit_(a[0], g, *a[1:], **rates)
        plain.adamw8bit_(b[0], g, *b[1:], **rates)
    if not done or not all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)):
        return "8-bit codes differ from the plain twin's"
    if not torch.allclose(a[0], b[0], rtol=2e-6, atol=1e-7):
        return "8-bit AdamW differs from the plain twin"
    return None


def objection(device: torch.device) -> str | None:
    """None when kernels run on the device and agree with the plain twins; else one line that says why not. Never raises."""
    try:
        with _disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
            return _differences(device)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
