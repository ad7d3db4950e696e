"""The self-test's part for affine groups and for passes over a matrix: the same numbers through library and twins."""

from typing import Any

import torch
from torch import Tensor

from tare.kernels import groupwise, native_groupwise, native_norms, nibbles, plain_norms


def _wave(*shape: int, step: float = 0.7) -> Tensor:
    """Fixed numbers over three decades, without touching any random generator."""
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return (torch.sin(t * step) * torch.pow(10.0, torch.cos(t * step * 0.37))).to(torch.float32).view(shape)


def groups(form: str, key: int | None) -> bool:
    """A step on 8-bit codes: groups of both signs, of one, constant, with NaN and infinities, with a partial last one: all equal."""
    x = torch.cat([_wave(512), _wave(256).abs().add_(5.0), torch.full((256,), 0.3, device="cpu"), _wave(601, step=0.2)])
    how: dict[str, Any] = {"symmetric": form == "symmetric", "clamp_zero": form == "clamped"}
    codes, scale, zeros = groupwise.encode_affine(x, 8, 256, **how)
    zero = None if form == "symmetric" else zeros
    update, start = _wave(x.numel(), step=1.3), (1 << 32) - 4096
    update[300], update[1100] = torch.nan, torch.inf
    exact = groupwise.decode_affine(codes, scale, zeros, 256).mul_(0.999).sub_(update.mul(0.01))
    wanted = groupwise.encode_affine(exact, 8, 256, **how, key=key, start=start)
    done = native_groupwise.step_(
        codes, scale, zero, update, group=256, form=form, decay=0.999, alpha=0.01, key=key, start=start  # type: ignore[arg-type]
    )  # fmt: skip
    same = torch.equal(codes, wanted[0]) and torch.allclose(scale, wanted[1], rtol=0, atol=0, equal_nan=True)
    return done and same and (zero is None or torch.equal(zero, wanted[2]))


def groups_decoded(bits: int) -> bool:
    """Codes of 8 bits, or of 4 two a byte, with either kind of zero, to fp32 and bf16."""
    x, good = _wave(1241), True
    codes, scale, zero = groupwise.encode_affine(x, bits, 64, span_zero=True)
    kept = nibbles.pack(codes, 64) if bits == 4 else codes
    for dtype in (torch.float32, torch.bfloat16):
        wanted = groupwise.decode_affine(codes, scale, zero, 64, torch.empty_like(x, dtype=dtype))
        for middle in (zero, zero.to(torch.uint8)):
            out = torch.empty_like(wanted)
            good &= native_groupwise.decode_into(kept, scale, middle, out, 64, bits == 4) and torch.equal(out, wanted)
    return good


def _near(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max())))


def norms() -> bool:
    """Squared norms, the projection on a vector, Sinkhorn's scaling, mirroring, on sides that are no whole numbers of vectors."""
    good = True
    for x in (_wave(37, 75), _wave(75, 37).to(torch.bfloat16)):
        m, n = x.shape
        for side, short, long in (("left", m, n), ("right", n, m)):
            p, r, squares, alone = _wave(short, step=0.3), *(torch.empty(long, device="cpu") for _ in range(3))
            good &= native_norms.project_one(x, p, side, r, squares)  # type: ignore[arg-type]
            good &= native_norms.squares(x, "columns" if side == "left" else "rows", alone)
            wanted = plain_norms.project_one(x.double(), p.double(), side)  # type: ignore[arg-type]
            good &= _near(r, wanted[0]) and _near(squares, wanted[1]) and _near(alone, wanted[1])
    a, b = _wave(37, 75), _wave(37, 75, step=0.3)
    for lines, dim in (("rows", -1), ("columns", -2)):
        found = [torch.empty(a.shape[dim + 1], device="cpu") for _ in range(2)]
        good &= native_norms.inner(a, b, lines, *found)  # type: ignore[arg-type]
        wanted = plain_norms.inner(a.double(), b.double(), dim)
        good &= all(_near(x, y.view(-1)) for x, y in zip(found, wanted, strict=True))
    x = _wave(37, 75).mul_(1e-30)
    x[3], x[:, 5] = 0.0, 0.0
    out, wanted_ = torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)
    plain_norms.sinkhorn(x.double(), 3, wanted_)
    good &= native_norms.sinkhorn(x, 3, out) and _near(out, wanted_)
    square = _wave(37, 37)
    wanted_ = square.tril() + square.tril(-1).mT
    return good and native_norms.mirror_(square) and torch.equal(square, wanted_)
