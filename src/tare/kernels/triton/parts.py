"""Device functions that the kernels share: reading and writing weights in their forms, the counter hash, the 8-bit codec.

bf16 tensors come as 16-bit patterns and are rounded by integer operations, so that a GPU and the interpreter give the same bits.
"""

from tare.kernels.triton.language import tl, triton


@triton.jit
def hash32(x):
    """The hash of `rounding.mix32` on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def pattern(x):
    """fp32 as its uint32 pattern."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def widened(half):
    """16-bit patterns (int16) of bf16 as fp32."""
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def read(base, at, mask, IS_BF16: tl.constexpr):
    """fp32 from fp32, or from patterns of bf16; 0 outside the mask."""
    if IS_BF16:
        return widened(tl.load(base + at, mask=mask, other=0))
    else:
        return tl.load(base + at, mask=mask, other=0.0)


@triton.jit
def cut(u, add):
    """The upper halves of fp32 patterns after `add`; infinities stay, and a NaN stays one whatever its payload."""
    special = (u & 0x7F800000) == 0x7F800000
    quiet = tl.where((u & 0x7FFFFF) != 0, u | 0x400000, u)
    return (tl.where(special, quiet, u + add) >> 16).to(tl.int32)


@triton.jit
def nearest_bf16(x):
    """fp32 to the pattern of the nearest bf16, ties to even; int32 from 0 to 65535."""
    u = pattern(x)
    return cut(u, ((u >> 16) & 1) + 0x7FFF)


@triton.jit
def stochastic_bf16(x, at, seed):
    """fp32 to a neighbouring bf16 by the noise of element number `at`, as `rounding.round_stochastic_` does."""
    noise = hash32(at.to(tl.uint32) + seed.to(tl.uint32, bitcast=True)) >> 16
    return cut(pattern(x), noise)


@triton.jit
def joined(high, low):
    """fp32 from the parts of a split weight (patterns int16, int8), as `split24.join`: a foreign correction does no harm."""
    upper = high.to(tl.int32) << 16
    magnitude = upper & 0x7FFFFFFF
    correction = low.to(tl.int32) * 256
    foreign = ((magnitude == 0) & (correction < 0)) | (magnitude >= 0x7F800000)
    return (upper + tl.where(foreign, 0, correction)).to(tl.float32, bitcast=True)


@triton.jit
def parted(x, add):
    """fp32 to the parts of a split weight, int32 each, as `split24.split`: `add` rounds to 24 bits; then the nearest bf16 of those."""
    u = pattern(x)
    special = (u & 0x7F800000) == 0x7F800000
    kept = (u + add) & 0xFFFFFF00
    upper = (kept + 0x8000) & 0xFFFF0000
    low = kept.to(tl.int32, bitcast=True) - upper.to(tl.int32, bitcast=True)
    overflow = special | ((upper & 0x7F800000) == 0x7F800000)
    quiet = tl.where((u & 0x7FFFFF) != 0, u | 0x400000, u)
    return (tl.where(special, quiet, upper) >> 16).to(tl.int32), tl.where(overflow, 0, low >> 8)


@triton.jit
def load_weight(w, low, at, mask, FORM: tl.constexpr):
    """The weight as fp32, from its form (see `dispatch`)."""
    if FORM == 0:
        return tl.load(w + at, mask=mask, other=0.0)
    elif FORM >= 3:
        return joined(tl.load(w + at, mask=mask, other=0), tl.load(low + at, mask=mask, other=0))
    else:
        return widened(tl.load(w + at, mask=mask, other=0))


@triton.jit
def store_weight(w, low, at, x, mask, seed, FORM: tl.constexpr):
    """Write fp32 in the weight's form (see `dispatch`). `at` is also the index that the noise is drawn for."""
    if FORM == 0:
        tl.store(w + at, x, mask=mask)
    elif FORM == 1:
        tl.store(w + at, nearest_bf16(x).to(tl.int16), mask=mask)
    elif FORM == 2:
        tl.store(w + at, stochastic_bf16(x, at, seed).to(tl.int16), mask=mask)
    else:
        if FORM == 3:
            add = ((pattern(x) >> 8) & 1) + 0x7F
        else:
            add = hash32(at.to(tl.uint32) + seed.to(tl.uint32, bitcast=True)) >> 24
        high, rest = parted(x, add)
        tl.store(w + at, high.to(tl.int16), mask=mask)
        tl.store(low + at, rest.to(tl.int8), mask=mask)


@triton.jit
def code_of(x, thresholds, SIGNED: tl.constexpr):
    """The nearest code of numbers in [-1, 1], the lower one on a tie: equal to `blockwise.encode_into`.

    With k cells in decade i the coordinate (10^(6-i) / 0.9) k x + (8/9) k counts cells, is continuous and concave, hence the least of seven
    lines. A quarter less, its floor is the code or one below it, and one comparison with the exact threshold decides;
    so the estimate may be fused, while everything that becomes state is rounded operation by operation.
    """
    k: tl.constexpr = 1.0 if SIGNED else 2.0
    a: tl.constexpr = k / 0.9
    b: tl.constexpr = k * 8.0 / 9.0
    q: tl.constexpr = 0.25
    y = tl.abs(x) if SIGNED else x
    f = tl.minimum(tl.fma(y, 1e6 * a, b - q), tl.fma(y, 2e5 * a, 2 * b - q))
    f = tl.minimum(f, tl.fma(y, 4e4 * a, 4 * b - q))
    f = tl.minimum(f, tl.fma(y, 8e3 * a, 8 * b - q))
    f = tl.minimum(f, tl.fma(y, 1.6e3 * a, 16 * b - q))
    f = tl.minimum(f, tl.fma(y, 3.2e2 * a, 32 * b - q))
    f = tl.minimum(f, tl.fma(y, 64.0 * a, 64 * b - q))
    u = f.to(tl.int32)  # towards zero
    if SIGNED:
        code = tl.where(x < 0.0, 126 - u, 127 + u)
    else:
        code = u - 1
    code = tl.maximum(code, 0)
    return code + tl.where(x > tl.load(thresholds + code), 1, 0)


@triton.jit
def magnitude(x):
    """Integer patterns of |x|: the same order, with infinities and NaN on top, which a float maximum would lose."""
    return (pattern(x) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def scales_of(top):
    """Of the largest magnitude of each block (patterns): the scale to keep, the factor that brings the block to [-1, 1], and its use.

    A block that is zero, subnormal (the reciprocal would overflow), infinite or NaN has none, and all its codes are those of zero.
    """
    top = tl.where(top < 0x00800000, 0, top)
    usable = (top > 0) & (top < 0x7F800000)
    peak = top.to(tl.float32, bitcast=True)
    one = tl.full(top.shape, 1.0, tl.float32)
    return peak, tl.div_rn(one, tl.where(usable, peak, one)), usable


@triton.jit
def encode(x, thresholds, SIGNED: tl.constexpr):
    """8-bit codes of a tile [blocks, block] and the scale of each block, as `blockwise.encode_into` defines them."""
    peak, factor, usable = scales_of(tl.max(magnitude(x), axis=1))
    return code_of(tl.where(usable[:, None], x * factor[:, None], 0.0), thresholds, SIGNED), peak


@triton.jit
def decode(codes, absmax, values):
    """map[code] * scale of the block; codes [blocks, block], absmax [blocks]."""
    return tl.load(values + codes.to(tl.int32)) * absmax[:, None]


@triton.jit
def adam_direction(m, v, eps):
    """m / (sqrt(v) + eps), by the fast root and quotient (two units of the last place): it goes into the weight only.

    The correctly rounded ones are a dozen instructions each, and these kernels are bound by instructions before bytes.
    """
    return m / (tl.sqrt(v) + eps)


@triton.jit
def sign(u):
    """-1, 0 or 1. u * 0 hands a NaN on, which neither comparison would: it must not freeze its weight unseen."""
    return tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0) + u * 0.0
