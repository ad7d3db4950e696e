"""Random directions written where they are used, in one launch; the twin, which says what the numbers are, is `kernels.directions`.

Every element is drawn by itself: its partner's logarithm is computed twice, which a GPU does not notice beside the memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tare.kernels.directions import Law, segments, words
from tare.kernels.triton import dispatch, parts
from tare.kernels.triton.dispatch import BF16, FLOATS
from tare.kernels.triton.language import tl, triton


@triton.jit
def _scramble(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _normal(number, base, first, second):
    """Normals of elements by their numbers (uint32)."""
    s = parts.hash32(((number >> 5) * 16 + (number & 15)) + base)
    w = parts.hash32(s + first)
    u = ((w >> 1) | 1).to(tl.int32).to(tl.float32)
    shifted = u.to(tl.int32, bitcast=True) - (0x3F3504F3 + (31 << 23))
    t = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    t2 = t * t
    low = (t * 1.000022292137146 + -2.000001907348633) + (t * 0.4981948733329773 + -0.6662901639938354) * t2
    high = (t * 0.3733571767807007 + -0.4099265933036804) + t2 * -0.23792220652103424
    r = tl.sqrt_rn((shifted >> 23).to(tl.float32) * -1.3862943649291992 + (low + high * (t2 * t2)) * t)
    w = _scramble(s + second)
    r = (r.to(tl.uint32, bitcast=True) ^ (w & 0x80000000)).to(tl.float32, bitcast=True)
    x = (w << 1).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    y = x * x
    y2 = y * y
    cos = (y * -1.2336982488632202 + 0.9999999403953552) + (
        (y * -0.020810628309845924 + 0.2536507546901703) + y2 * 0.0008581910515204072
    ) * y2
    sin = ((y * -0.645920991897583 + 1.5707948207855225) + (y * -0.004362472798675299 + 0.07948765903711319) * y2) * x
    return r * tl.where((number & 16) != 0, sin, cos)


@triton.jit
def _sign(number, base, first, second):
    word = _scramble(parts.hash32(parts.hash32((number >> 5) + base) + first) + second)
    return 1.0 - 2.0 * ((word >> (number & 31)) & 1).to(tl.int32).to(tl.float32)


@triton.jit(do_not_specialize=["n", "start", "seed", "count"])
def _write(
    w, low, source, members, coefficients, count, n, start, seed, decay, alpha, scale,
    SIZE: tl.constexpr, FORM: tl.constexpr, SIGNS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < n
    number = at.to(tl.uint32) + start.to(tl.uint32, bitcast=True)
    total = tl.zeros([SIZE], tl.float32)
    for k in range(count):
        base = tl.load(members + 3 * k).to(tl.uint32, bitcast=True)
        first = tl.load(members + 3 * k + 1).to(tl.uint32, bitcast=True)
        second = tl.load(members + 3 * k + 2).to(tl.uint32, bitcast=True)
        z = _sign(number, base, first, second) if SIGNS else _normal(number, base, first, second)
        total += z * tl.load(coefficients + k)
    step = total * scale * alpha
    exact = parts.load_weight(source, low, at, mask, FORM) * decay - step if READS else -step
    parts.store_weight(w, low, at, exact, mask, seed, FORM)


def write_(
    weight: Tensor, keys: Sequence[int], coefficients: Sequence[float], *, law: Law = "gaussian", decay: float = 1.0,
    alpha: float = -1.0, scale: float = 1.0, start: int = 0, source: Tensor | None = None, low: Tensor | None = None,
    key: int | None = None, of: Tensor | None = None, limit: float | Tensor = math.inf,
) -> bool:  # fmt: skip
    """`kernels.directions.write_`, where the arguments are explained; the same bits.

    Args:
        weight: fp32 or bf16. of: none; with it nothing is done.

    Returns:
        True when done; False when nothing was touched.
    """
    if of is not None:
        return False
    n = weight.numel()
    wanted: list[tuple[Tensor, tuple[torch.dtype, ...], int | None]] = [
        (weight, FLOATS if low is None else (BF16,), None)
    ]
    if source is not None:
        wanted.append((source, (weight.dtype,), None))
    if low is not None:
        wanted.append((low, (torch.int8,), None))
    if not dispatch.takes(n, *wanted) or (low is not None and (source is not None or decay == 0.0)):
        return False
    whole = dispatch.bits(weight).view(-1)
    read = whole if source is None else dispatch.bits(source).view(-1)
    rest = whole if low is None else low.view(-1)
    numbers = torch.tensor(coefficients, dtype=torch.float32, device=weight.device)
    size, done = dispatch.tile_elements(), 0
    for high, first, count in segments(start, n):
        members = [word - (word >> 31 << 32) for k in keys for word in words(k, high)]
        piece = slice(done, done + count)
        rounding = dispatch.rounding_of(weight.view(-1)[piece], key, (high << 32) + first, low)
        assert rounding is not None  # a segment crosses no multiple of 2^32
        with dispatch.on(weight):
            _write[(triton.cdiv(count, size),)](
                whole[piece], rest[piece], read[piece],
                torch.tensor(members, dtype=torch.int32, device=weight.device), numbers, len(keys), count,
                first - (first >> 31 << 32), rounding.seed, decay, alpha, scale,
                SIZE=size, FORM=rounding.form, SIGNS=law == "signs", READS=decay != 0.0,
                enable_fp_fusion=False,
            )  # fmt: skip
        done += count
    dispatch.written(weight, *([] if low is None else [low]))
    return True
