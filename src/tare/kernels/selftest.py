"""A few hundred numbers through a freshly loaded library and through the plain twins; any difference rejects the library."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tare.kernels import (
    blockwise,
    directions,
    fourbit,
    native,
    native16,
    native_directions,
    native_fourbit,
    native_light,
    plain,
    plain_light,
    rounding,
    selftest_passes,
    split24,
)


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


def _codec4(signed: bool) -> bool:
    """The 4-bit codec on every threshold and value of its map with both neighbours, odd blocks and a tail of odd length."""
    fixed = torch.tensor(fourbit.map_thresholds(signed) + fourbit.map_values(signed), dtype=torch.float32, device="cpu")
    near = [torch.nextafter(fixed, torch.full_like(fixed, sign * torch.inf)) for sign in (1.0, -1.0)]
    x = torch.cat([torch.ones(1, device="cpu"), fixed, *near]).clamp_(-1.0, 1.0)  # 94 numbers; the 1 keeps the scale
    odd = torch.tensor([0.0, torch.nan, torch.inf, 1e-40, 3e38], device="cpu").repeat_interleave(128)  # a block of each
    odd[1::2] *= 0.3
    x = torch.cat([torch.nn.functional.pad(x, (0, 128 - x.numel())), odd, _wave(601, 0.7)])
    want, scales = fourbit.encode(x, signed)
    codes, absmax = torch.empty_like(want), torch.empty_like(scales)
    out = torch.empty_like(x)
    return (
        native_fourbit.encode_into(x, codes, absmax, signed)
        and torch.equal(codes, want)
        and torch.allclose(absmax, scales, rtol=0, atol=0, equal_nan=True)
        and native_fourbit.decode_into(codes, absmax, signed, out)
        and torch.allclose(out, fourbit.decode(codes, absmax, x.numel(), signed), rtol=0, atol=0, equal_nan=True)
    )


def _steps4(dtype: torch.dtype, key: int | None) -> bool:
    """`_steps` with 4-bit moments."""
    n = 601
    rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "decay": 0.999, "alpha": 0.01, "key": key, "start": 5}
    w, zeros = _wave(n, 1.3).to(dtype), torch.zeros(n, device="cpu")
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    good = True
    for name, signs, own in (("adamw4bit_", (True, False), {"eps": 1e-8}), ("lion4bit_", (True,), {})):
        ours, theirs = ([w.clone(), *(y for s in signs for y in fourbit.encode(zeros, s))] for _ in range(2))
        for step in (0.9, 1.1):
            g = _wave(n, step)
            good &= getattr(native_fourbit, name)(ours[0], g, *ours[1:], **own, **rates)
            getattr(plain, name)(theirs[0], g, *theirs[1:], **own, **rates)
        good &= all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
        good &= torch.allclose(ours[0].float(), theirs[0].float(), rtol=tolerance, atol=1e-7)
    return good


def _rounding() -> bool:
    u = torch.cat([_wave(1500, 0.3), torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 0.0], device="cpu")])
    ours = _wave(u.numel(), 0.2).to(torch.bfloat16)
    theirs = ours.clone()
    done = native.write_stochastic_(ours, u, decay=0.9, alpha=0.3, key=77, start=(1 << 32) - 2000)
    rounding.write_stochastic_(theirs, u, decay=0.9, alpha=0.3, key=77, start=(1 << 32) - 2000)
    return done and torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def _split(key: int | None) -> bool:
    """Weights in 24 bits: every upper half of a pattern with corrections of all kinds, and results that are NaN, infinite or huge."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu")
    ours = every.to(torch.int16).view(torch.bfloat16).repeat(2)[3:]
    low = (torch.arange(ours.numel(), dtype=torch.int32, device="cpu") * 37 % 256 - 128).to(torch.int8)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 0.0, -0.0], device="cpu").repeat(100)
    u = torch.cat([_wave(ours.numel() - odd.numel(), 0.3), odd])
    theirs, rest = ours.clone(), low.clone()
    done = native16.write_split_(ours, low, u, decay=0.9, alpha=0.3, key=key, start=7)
    split24.write_split_(theirs, rest, u, decay=0.9, alpha=0.3, key=key, start=7)
    # which of two NaNs a difference hands on is the processor's choice
    known = ~theirs.isnan()
    same = torch.equal(ours.view(torch.int16)[known], theirs.view(torch.int16)[known]) and torch.equal(low, rest)
    return done and same and torch.equal(ours.isnan(), theirs.isnan())


def _steps16(weight: torch.dtype, moment: torch.dtype, split: bool = False) -> bool:
    """Two steps of AdamW with plain or bf16 moments: equal moments, weights to a rounding of the square root."""
    n = 601
    rates: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "decay": 0.999, "alpha": 0.01, "eps": 1e-8, "start": 5}
    rates |= {"key": 3, "keys": (4, 5)}
    good = True
    for grad in (torch.float32, torch.bfloat16):
        low = [torch.zeros(n, dtype=torch.int8, device="cpu")] if split else []
        start = [_wave(n, 1.3).to(weight), *(torch.zeros(n, dtype=moment, device="cpu") for _ in range(2)), *low]
        ours, theirs = ([x.clone() for x in start] for _ in range(2))
        for step in (0.9, 1.1):
            g = _wave(n, step).to(grad)
            good &= native16.adamw16_(ours[0], g, *ours[1:], **rates)
            plain.adamw16_(theirs[0], g, *theirs[1:], **rates)
        good &= all(torch.equal(a, b) for a, b in zip(ours[1:3], theirs[1:3], strict=True))
        mine, other = (split24.join(x[0], x[3]) if split else x[0].float() for x in (ours, theirs))
        good &= torch.allclose(mine, other, rtol=2**-7 if weight == torch.bfloat16 and not split else 2**-15, atol=1e-7)
    return good


_LIGHT: tuple[tuple[str, int, dict[str, Any]], ...] = (  # entry point, moments, numbers
    *(("mapped_", 0, {"kind": kind, "width": 1e-4}) for kind in ("none", "sign", "dead-zone", "huber")),
    *(
        ("lion_", 1, {"beta1": 0.9, "beta2": 0.99, "kind": x, "width": 1e-4})
        for x in ("none", "sign", "dead-zone", "huber")
    ),
    *(("adan_", 4, {"betas": (0.98, 0.92, 0.99), "mix": 0.4, "eps": 1e-8, "first": x}) for x in (True, False)),
    *(("diffgrad_", x, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}) for x in (2, 3)),
    *(("momentum_", 1, {"beta": 0.9, "rest": 0.7, "nesterov": x}) for x in (True, False)),
)


def _light(weight: torch.dtype, moment: torch.dtype, split: bool = False) -> bool:
    """Two steps of each rule of `native_light`, of some where only the forms are others: equal moments, weights to a rounding of
    exponential, root and quotient."""
    n, good = 601, True
    write = plain_light.Write(0.999, 0.01, -0.5, 3, (4, 5, 6, 7), 5)
    low = torch.zeros(n, dtype=torch.int8, device="cpu") if split else None
    every = weight == moment == torch.float32
    for name, count, own in (x for x in _LIGHT if every or x[0] in ("lion_", "adan_")):
        kept = [_wave(n, 0.4 + 0.1 * i).abs().to(moment) for i in range(count)]
        given = [*kept, None] if name == "diffgrad_" and count == 2 else kept
        write = replace(write, keys=(4, 5, 6, 7)[:count])
        start = [_wave(n, 1.3).to(weight), *given, low]
        ours, theirs = ([x if x is None else x.clone() for x in start] for _ in range(2))
        for grad in (torch.float32, torch.bfloat16):
            g = _wave(n, 0.9).to(grad)
            good &= getattr(native_light, name)(ours[0], g, *ours[1:], write, **own)
            getattr(plain_light, name)(theirs[0], g, *theirs[1:], write, **own)
        for a, b in zip(ours[1 : 1 + count], theirs[1 : 1 + count], strict=True):
            good &= a is not None and b is not None and torch.equal(a, b)
        mine, other = (_exact(x[0], x[-1]) for x in (ours, theirs))
        tolerance = 2**-7 if weight == torch.bfloat16 and not split else 2**-15
        good &= torch.allclose(mine, other, rtol=tolerance, atol=1e-7)
    return good


def _exact(weight: Tensor | None, low: Tensor | None) -> Tensor:
    assert weight is not None
    return weight.float() if low is None else split24.join(weight, low)


def _directions(law: directions.Law, weight: torch.dtype, split: bool = False) -> bool:
    """Two directions added to a weight over a multiple of 2^32, not at the beginning of a group: equal bit for bit."""
    n, good = 1333, True
    how: dict[str, Any] = {"law": law, "decay": 0.999, "alpha": 0.3, "start": (1 << 32) - 700}
    for key, sieved in ((None, False), (5, False), (None, True)):
        ours = _wave(n, 1.3).to(weight)
        low = torch.zeros(n, dtype=torch.int8, device="cpu") if split else None
        theirs, rest = ours.clone(), None if low is None else low.clone()
        mine, other = (x if sieved else None for x in (ours, theirs))
        good &= native_directions.write_(ours, (3, 1 << 63), (0.7, -1e-3), **how, low=low, key=key, of=mine, limit=0.4)
        directions.write_(theirs, (3, 1 << 63), (0.7, -1e-3), **how, low=rest, key=key, of=other, limit=0.4)
        good &= torch.equal(ours, theirs) and (low is None or rest is None or torch.equal(low, rest))
    return good


def objection() -> str | None:
    """None when the library on trial agrees with the plain twins; else one line that names what does not."""
    with _disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
        for name, good in (
            ("signed codes", lambda: _codec(True)),
            ("unsigned codes", lambda: _codec(False)),
            ("fp32 steps", lambda: _steps(torch.float32, None)),
            ("bf16 steps", lambda: _steps(torch.bfloat16, 3)),
            ("stochastic rounding", _rounding),
            ("split weights", lambda: _split(None)),
            ("split rounding", lambda: _split(5)),
            ("split steps", lambda: _steps16(torch.bfloat16, torch.float32, split=True)),
            ("16-bit steps", lambda: _steps16(torch.bfloat16, torch.bfloat16)),
            ("16-bit moments", lambda: _steps16(torch.float32, torch.bfloat16)),
            ("light steps", lambda: _light(torch.float32, torch.float32)),
            ("light 16-bit steps", lambda: _light(torch.bfloat16, torch.bfloat16)),
            ("light split steps", lambda: _light(torch.bfloat16, torch.float32, split=True)),
            ("normal directions", lambda: _directions("gaussian", torch.float32)),
            ("16-bit directions", lambda: _directions("gaussian", torch.bfloat16)),
            ("split directions", lambda: _directions("gaussian", torch.bfloat16, split=True)),
            ("fp64 directions", lambda: _directions("gaussian", torch.float64)),
            ("signs", lambda: _directions("signs", torch.float32)),
            ("signed 4-bit codes", lambda: _codec4(True)),
            ("unsigned 4-bit codes", lambda: _codec4(False)),
            ("4-bit fp32 steps", lambda: _steps4(torch.float32, None)),
            ("4-bit bf16 steps", lambda: _steps4(torch.bfloat16, 3)),
            ("groups", lambda: selftest_passes.groups("symmetric", 3)),
            ("groups with a zero", lambda: selftest_passes.groups("affine", 3)),
            ("published groups", lambda: selftest_passes.groups("clamped", None)),
            ("8-bit groups decoded", lambda: selftest_passes.groups_decoded(8)),
            ("4-bit groups decoded", lambda: selftest_passes.groups_decoded(4)),
            ("passes over a matrix", selftest_passes.norms),
        ):
            if not good():
                return f"self-test failed: {name} differ from the plain twin"
    return None
