"""A few hundred numbers through a freshly loaded library and through the plain twins; any difference rejects the library."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tare.kernels import blockwise, native, plain, rounding


def adversarial(signed: bool) -> Tensor:
    """Numbers on which a codec goes wrong first: every threshold and value of the map with both neighbours, zeros, tiny and huge ones.

    Returns:
        [n] fp32, magnitudes up to 1.
    """
    fixed = torch.tensor(
        blockwise.map_thresholds(signed)[:-1] + blockwise.map_values(signed), dtype=torch.float32, device="cpu"
    )
    up = torch.nextafter(fixed, torch.full_like(fixed, torch.inf))
    down = torch.nextafter(fixed, torch.full_like(fixed, -torch.inf))
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-30, 1e-8, -1e-8], device="cpu")
    return torch.cat([fixed, up, down, tiny]).clamp_(-1.0, 1.0)


def _wave(n: int, step: float) -> Tensor:
    """Fixed numbers over seven decades, without touching any random generator."""
    t = torch.arange(n, dtype=torch.float64, device="cpu")
    return (torch.sin(t * step) * torch.pow(10.0, 3.5 * torch.cos(t * step * 0.37) - 5.0)).to(torch.float32)


def _codec(signed: bool) -> bool:
    x = adversarial(signed)
    ones = torch.ones(-(-x.numel() // 255), 1, device="cpu")  # a 1 in every block of 256 keeps the scale at 1
    x = torch.cat([torch.nn.functional.pad(x, (0, ones.numel() * 255 - x.numel())).view(-1, 255), ones], dim=1).view(-1)
    odd = torch.tensor([torch.nan, torch.inf, 1e-40, 3e38], device="cpu").repeat_interleave(256)  # a block of each
    odd[1::2] *= 0.3
    x = torch.cat([x, torch.zeros(256, device="cpu"), odd, _wave(601, 0.7)])
    want, scales = blockwise.encode(x, signed)
    codes, absmax = torch.empty_like(want), torch.empty_like(scales)
    out = torch.empty_like(x)
    return (
        native.encode_into(x, codes, absmax, signed)
        and torch.equal(codes, want)
        and torch.allclose(absmax, scales, rtol=0, atol=0, equal_nan=True)
        and native.decode_into(codes, absmax, signed, out)
        and torch.allclose(out, blockwise.decode(codes, absmax, signed), rtol=0, atol=0, equal_nan=True)
    )


def _state(n: int, *signs: bool) -> list[Tensor]:
    return [y for signed in signs for y in blockwise.encode(torch.zeros(n, device="cpu"), signed)]


def _steps(dtype: torch.dtype, key: int | None) -> bool:
    """Two steps of each rule from zero states: equal codes, and weights that differ by no more than a rounding of the square root."""
    n = 601
    rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "decay": 0.999, "alpha": 0.01, "key": key, "start": 5}
    w = _wave(n, 1.3).to(dtype)
    good = True
    ours, theirs = [w.clone(), *_state(n, True, False)], [w.clone(), *_state(n, True, False)]
    for step in (0.9, 1.1):
        g = _wave(n, step)
        good &= native.adamw8bit_(ours[0], g, *ours[1:], eps=1e-8, **rates)
        plain.adamw8bit_(theirs[0], g, *theirs[1:], eps=1e-8, **rates)
    good &= all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    # bf16: one step of the last place, where the square root's last bit decided a rounding
    good &= torch.allclose(
        ours[0].float(), theirs[0].float(), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-7
    )
    ours, theirs = [w.clone(), *_state(n, True)], [w.clone(), *_state(n, True)]
    for step in (0.9, 1.1):
        g = _wave(n, step).to(dtype)
        good &= native.lion8bit_(ours[0], g, *ours[1:], **rates)
        plain.lion8bit_(theirs[0], g, *theirs[1:], **rates)
    return good and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _rounding() -> bool:
    u = torch.cat([_wave(1500, 0.3), torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 0.0], device="cpu")])
    ours = _wave(u.numel(), 0.2).to(torch.bfloat16)
    theirs = ours.clone()
    done = native.write_stochastic_(ours, u, decay=0.9, alpha=0.3, key=77, start=(1 << 32) - 2000)
    rounding.write_stochastic_(theirs, u, decay=0.9, alpha=0.3, key=77, start=(1 << 32) - 2000)
    return done and torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def objection() -> str | None:
    """None when the library on trial agrees with the plain twins; else one line that names what does not."""
    with _disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
        for name, good in (
            ("signed codes", lambda: _codec(True)),
            ("unsigned codes", lambda: _codec(False)),
            ("fp32 steps", lambda: _steps(torch.float32, None)),
            ("bf16 steps", lambda: _steps(torch.bfloat16, 3)),
            ("stochastic rounding", _rounding),
        ):
            if not good():
                return f"self-test failed: {name} differ from the plain twin"
    return None
