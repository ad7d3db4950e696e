// Affine groups of 8 bits in one pass: decode, subtract an update and encode anew, rounded to nearest or stochastically; and decoding of 8
// and 4 bits. Included at the end of native.cpp.

namespace groups {
constexpr int MOST = 4096;  // elements of a group; its fp32 numbers stay on the stack
constexpr float SMALLEST_RANGE = 1e-5f;  // as in groupwise.py
enum Form { SYMMETRIC, AFFINE, CLAMPED };

static inline F nearest_whole(F x) {  // ties to even
    const F no{};
    F c = bits<F>((bits<I>(x) & (int32_t)0x80000000) | 0x4B000000);  // 2^23 with the sign of x
    return bits<F>(magnitude(x)) < (no + 8388608.0f) ? (x + c) - c : x;
}
static inline F floor(F x) {
    F whole = nearest_whole(x);
    return whole > x ? whole - 1.0f : whole;
}
static inline float lane(float x, F (*f)(F)) { return f(F{} + x)[0]; }

// x: n numbers and, up to a whole vector, repetitions of the first. NaN and infinities give NaN as the scale and codes of 0.
static void encode(const float* x, int n, int form, uint32_t at, const Noise& noise, uint8_t* codes, float* scale, float* zero) {
    F low = read(x), high = low;
    I top = magnitude(low);
    for (int i = L; i < n; i += L) {
        F v = read(x + i);
        low = v < low ? v : low, high = v > high ? v : high;
        top = max(top, magnitude(v));
    }
    float least = low[0], greatest = high[0];
    for (int l = 1; l < L; ++l) least = low[l] < least ? low[l] : least, greatest = high[l] > greatest ? high[l] : greatest;
    const int32_t most = largest(top);
    float range = form == SYMMETRIC ? bits<float>(most) : greatest - least;
    range = range < SMALLEST_RANGE ? SMALLEST_RANGE : range;
    // an end of the range may be cut when its zero is rounded: where the mean must be exact there is a step of room
    const float step = range / (form == SYMMETRIC ? 127.0f : form == AFFINE && noise.on ? 254.0f : 255.0f);
    if (most >= 0x7F800000 || !(step < __builtin_inff())) {
        *scale = __builtin_nanf("");
        if (zero) *zero = 0.0f;
        return (void)memset(codes, 0, (size_t)n);
    }
    float middle = 128.0f;
    if (form != SYMMETRIC) {
        middle = -lane(least / step, form == AFFINE && noise.on ? floor : nearest_whole);
        if (form == CLAMPED) middle = middle < 0.0f ? 0.0f : middle > 255.0f ? 255.0f : middle;
    }
    *scale = step;
    if (zero) *zero = middle;
    U number;
    for (int l = 0; l < L; ++l) number[l] = noise.base + noise.index + at + (uint32_t)l;
    const F no{};
    for (int i = 0; i < n; i += L) {
        F steps = read(x + i) / step;
        if (noise.on) {
            F whole = floor(steps);
            F u = __builtin_convertvector((I)(mix(number + (uint32_t)i) >> 8), F) * 5.9604644775390625e-8f;  // 2^-24
            steps = whole + (u < steps - whole ? no + 1.0f : no);
        } else steps = nearest_whole(steps);
        steps = steps + middle;
        steps = steps > 0.0f ? steps : no;
        steps = steps < 255.0f ? steps : no + 255.0f;
        if (i + L <= n) narrow(codes + i, __builtin_convertvector(steps, I));
        else for (int l = 0; i + l < n; ++l) codes[i + l] = (uint8_t)steps[l];
    }
}
// codes to fp32, a whole number of vectors of them; what stands beyond n is repeated from the first
static void decode(const uint8_t* codes, int n, float scale, float zero, float* x) {
    int i = 0;
    for (; i + L <= n; i += L) store(x + i, (__builtin_convertvector(widen(codes + i), F) - zero) * scale);
    const int rest = n - i;
    for (; i < n; ++i) x[i] = ((float)codes[i] - zero) * scale;
    for (; rest && i % L; ++i) x[i] = x[0];
}
static void unpack(const uint8_t* bytes, int n, uint8_t* codes) {  // see nibbles.py
    const int half = (n + 1) / 2;
    for (int i = 0; i < half; ++i) codes[i] = bytes[i] & 15;
    for (int i = half; i < n; ++i) codes[i] = bytes[i - half] >> 4;
}
}  // namespace groups

extern "C" {
// codes <- encode(decay decode(codes) - alpha u). zero: null for the symmetric form. s: decay, alpha and noise.
void tare_groups_step(uint8_t* codes, float* scale, float* zero, const float* u, int64_t n, int group, int form, int threads, const Step* s) {
    using namespace groups;
    const Noise noise = s->noise;
    const float decay = s->decay, alpha = s->alpha;
    const int64_t count = (n + group - 1) / group;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t g = 0; g < count; ++g) {
        alignas(64) float x[MOST + L];
        const int64_t first = g * group;
        const int size = (int)(n - first < group ? n - first : group);
        groups::decode(codes + first, size, scale[g], zero ? zero[g] : 128.0f, x);
        int i = 0;
        for (; i + L <= size; i += L) store(x + i, read(x + i) * decay - read(u + first + i) * alpha);
        const int rest = size - i;
        for (; i < size; ++i) x[i] = x[i] * decay - u[first + i] * alpha;
        for (; rest && i % L; ++i) x[i] = x[0];
        groups::encode(x, size, form, (uint32_t)first, noise, codes + first, scale + g, zero ? zero + g : nullptr);
    }
}
// zero: floats, bytes, or null for 128. packed: two codes a byte, in groups of an even size.
void tare_groups_decode(const uint8_t* codes, int packed, const float* scale, const float* zero, const uint8_t* bytes, void* out, int out_bf16,
                        int64_t n, int group, int threads) {
    using namespace groups;
    const int64_t count = (n + group - 1) / group;
    const Noise nearest{0, 0, 0};
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t g = 0; g < count; ++g) {
        alignas(64) float x[MOST + L];
        uint8_t wide[MOST + L];
        const int64_t first = g * group;
        const int size = (int)(n - first < group ? n - first : group);
        const uint8_t* from = packed ? wide : codes + first;
        if (packed) unpack(codes + first / 2, size, wide);
        const float middle = zero ? zero[g] : bytes ? (float)bytes[g] : 128.0f;
        groups::decode(from, size, scale[g], middle, x);
        if (!out_bf16) { memcpy((float*)out + first, x, size * sizeof(float)); continue; }
        bf16* to = (bf16*)out + first;
        int i = 0;
        for (; i + L <= size; i += L) write(to + i, read(x + i), nearest, 0);
        if (i < size) {
            bf16 last[L];
            write(last, read(x + i), nearest, 0);
            memcpy(to + i, last, (size - i) * sizeof(bf16));
        }
    }
}
}
