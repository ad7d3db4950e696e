"""Random directions from a counter, in plain torch operations; the twin of directions.hpp and of the Triton kernel, bit for bit.

Element number i of a direction is a pure function of (key, i). Normals come by Box and Muller's transform (1958), two elements sharing a
radius and an angle. Logarithm, sine and cosine are polynomials (errors of 1e-6) of products and sums in a fixed order, because those of
libraries differ from device to device; the square root is the correctly rounded one. Numbers end at 6.56.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tare.kernels import rounding, split24
from tare.kernels.blockwise import chunk_elements
from tare.kernels.paper import few
from tare.kernels.rounding import MASK, mix32

Law = Literal["gaussian", "signs"]
GROUP = 32  # elements that are drawn together: 16 cosines, then the 16 sines of the same angles; or one word of signs

_SCRAMBLE = (0x85EBCA6B, 0xC2B2AE35)  # the finaliser of MurmurHash3 (Appleby 2011)


@functools.lru_cache(maxsize=4096)
def words(key: int, high: int = 0) -> tuple[int, int, int]:
    """A direction's three 32-bit numbers: where its counter starts, and the keys of the two words that a count gives.

    Counters of different directions overlap, shifted, in the 2^32 values that there are. The keys make different words of equal counts.

    Args:
        key: any integer from 0 below 2^64; it is hashed here.
        high: element number divided by 2^32.
    """
    base = rounding.base(key, high)
    first = mix32(mix32((key >> 32) + 0x632BE59B) + base)
    return base, first, mix32(mix32((key & MASK) + 0x85157AF5) + first)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _mixed(x: Tensor) -> Tensor:
    """`mix32` in place on int32: multiplication wraps, and >> copies the sign, hence the masks."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _scrambled(x: Tensor) -> Tensor:
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(_SCRAMBLE[0]))
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(_SCRAMBLE[1]))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _counted(start: int, count: int, base: int, device: torch.device) -> Tensor:
    """mix(base + i) for i from `start` on, int32 patterns."""
    x = torch.arange(count, dtype=torch.int32, device=device)
    return _mixed(x.add_(_signed((start + base) & MASK)))


def _radius(w: Tensor) -> Tensor:
    """sqrt(-2 log u) with u = (2 floor(w / 4) + 1) / 2^31."""
    u = (w >> 1).bitwise_and_(0x7FFFFFFF).bitwise_or_(1).to(torch.float32)
    shifted = u.view(torch.int32) - (0x3F3504F3 + (31 << 23))  # the significand from sqrt(1/2) to sqrt(2)
    t = (shifted & 0x7FFFFF).add_(0x3F3504F3).view(torch.float32).sub_(1.0)
    t2 = t * t
    low = (t * 0.4981948733329773).add_(-0.6662901639938354).mul_(t2)
    low.add_((t * 1.000022292137146).add_(-2.000001907348633))
    high = (t * 0.3733571767807007).add_(-0.4099265933036804).add_(t2 * -0.23792220652103424)
    minus = low.add_(high.mul_(t2 * t2)).mul_(t).add_((shifted >> 23).to(torch.float32).mul_(-1.3862943649291992))
    return minus.to(torch.float64).sqrt_().to(torch.float32)  # torch's root of fp32 is not correctly rounded on the CPU


def _pairs(w: Tensor, r: Tensor) -> Tensor:
    """r cos and r sin of the angles w [n], side by side: [n / 16, 2, 16]."""
    x = (w << 1).to(torch.float32).mul_(4.656612873077393e-10)  # from -1 to 1: the right half of the circle
    y = x * x
    y2 = y * y
    cos = (y * -0.020810628309845924).add_(0.2536507546901703).add_(y2 * 0.0008581910515204072).mul_(y2)
    cos.add_((y * -1.2336982488632202).add_(0.9999999403953552))
    sin = (y * -0.004362472798675299).add_(0.07948765903711319).mul_(y2)
    sin.add_((y * -0.645920991897583).add_(1.5707948207855225)).mul_(x)
    r = r.view(torch.int32).bitwise_xor_(w & -(1 << 31)).view(torch.float32)  # the first bit: to the opposite point
    return torch.stack([cos.mul_(r).view(-1, 16), sin.mul_(r).view(-1, 16)], dim=1)


def _normals(member: tuple[int, int, int], group: int, groups: int, device: torch.device) -> Tensor:
    base, first, second = member
    s = _counted(group * 16, groups * 16, base, device)
    radius = _radius(_mixed(s + _signed(first)))
    return _pairs(_scrambled(s.add_(_signed(second))), radius).view(-1)


def _signs(member: tuple[int, int, int], group: int, groups: int, device: torch.device) -> Tensor:
    base, first, second = member
    word = _mixed(_counted(group, groups, base, device).add_(_signed(first))).add_(_signed(second))
    place = torch.arange(GROUP, dtype=torch.int32, device=device)
    bit = (_scrambled(word).unsqueeze(1) >> place).bitwise_and_(1)  # bit number e is that of element e
    return (1 - 2 * bit).to(torch.float32).view(-1)


def segments(start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(high word, low word of the first element, count) of runs of element numbers that share their high word."""
    if start < 0 or count < 0:
        raise ValueError(f"start and count must not be negative, got {start} and {count}")
    return rounding._segments(start, count)


@torch.no_grad()
def draw(law: Law, key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements `start` .. `start + count - 1` of a direction, fp32 [count].

    Args:
        law: `gaussian`, normals; `signs`, -1 or 1.
        key: from 0 below 2^64; one for each leaf, step and member.
        start: number of the first element, not negative.
        count: how many.
        device: where to compute.

    >>> bool((draw("gaussian", 7, 5, 3) == draw("gaussian", 7, 0, 8)[5:]).all())
    True
    """
    device, made = torch.device(device), _normals if law == "gaussian" else _signs
    parts = []
    for high, low, length in segments(start, count):
        head = low % GROUP
        z = made(words(key, high), low // GROUP, -(-(head + length) // GROUP), device)
        parts.append(z[head : head + length])
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def nothing(decay: float, factor: float) -> float:
    """The zero that, times `factor` and subtracted, leaves every bit of what it is subtracted from; with a decay of 0 it ends as +0."""
    return math.copysign(0.0, -factor if decay == 0.0 else factor)


def sieve_(total: Tensor, of: Tensor, limit: float | Tensor, zero: float) -> None:
    """total <- `zero` where not |of| <= limit, compared in the dtype of a limit that is a tensor, else in fp32, or fp64 for fp64."""
    if not isinstance(limit, Tensor):
        limit = torch.tensor(
            limit, dtype=torch.float64 if of.dtype == torch.float64 else torch.float32, device=of.device
        )
    total.masked_fill_((of.to(limit.dtype).abs() <= limit).logical_not_(), zero)


@torch.no_grad()
def write_(
    weight: Tensor, keys: Sequence[int], coefficients: Sequence[float], *, law: Law = "gaussian", decay: float = 1.0,
    alpha: float = -1.0, scale: float = 1.0, start: int = 0, source: Tensor | None = None, low: Tensor | None = None,
    key: int | None = None, of: Tensor | None = None, limit: float | Tensor = math.inf,
) -> None:  # fmt: skip
    """W <- decay W - alpha scale sum_k c_k z_k, rounded once into the weight's own form. The sum is formed first, in the order of `keys`.

    As it stands: W <- W + sum_k c_k z_k. With decay 0 the old weight is not read, and alpha -1 leaves the sum.

    Args:
        weight: floating, contiguous. Overwritten. The arithmetic is fp64 for fp64, else fp32, each operation rounded.
        keys: one for each direction.
        coefficients: c_k, as many.
        law: `gaussian` or `signs`.
        decay, alpha, scale: numbers.
        start: number of the first element, when `weight` is a piece of a larger tensor.
        source: what is stepped, if it is not the weight itself; of its dtype and size, contiguous.
        low: int8, the corrections of a bf16 weight in 24 bits (see `split24`).
        key: stochastic rounding of a bf16 weight (see `rounding`), of a split one at its 24th bit; None: to nearest.
        of: as many numbers, the weight itself or others: the sum counts only where |of| <= limit. Elsewhere the old weight is decayed and
            no more: with a decay of 1 it keeps its bits.
    """
    flat, stepped = weight.view(-1), (weight if source is None else source).view(-1)
    size = chunk_elements(weight.device)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for begin in few(range(0, flat.numel(), size)):
        at = slice(begin, min(begin + size, flat.numel()))
        first, count = start + begin, at.stop - begin
        total = torch.zeros(count, dtype=dtype, device=weight.device)
        for k, c in zip(keys, coefficients, strict=True):
            total.add_(draw(law, k, first, count, weight.device).to(dtype).mul_(c))
        if of is not None:
            sieve_(total, of.view(-1)[at], limit, nothing(decay, alpha * scale))
        total.mul_(scale)
        if low is not None:
            split24.write_split_(flat[at], low.view(-1)[at], total, decay=decay, alpha=alpha, key=key, start=first)
            continue
        total.mul_(alpha)
        exact = total.neg_() if decay == 0.0 else stepped[at].to(dtype, copy=True).mul_(decay).sub_(total)
        if key is None or weight.dtype != torch.bfloat16:
            flat[at] = exact
        else:
            rounding.round_stochastic_(flat[at], exact, key, first)
