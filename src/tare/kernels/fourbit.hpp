// Block-wise 4-bit states: fused AdamW and Lion steps and the codec alone, in one pass. Included at the end of native.cpp, whose
// lanes, memory formats and stochastic rounding it uses. Two codes a byte: of a block of n elements, byte i holds element i in its low
// half and element i + n / 2 in its high half, so that bytes become lanes by one mask and one shift. Li, Chen & Zhu, arXiv:2309.01507.

namespace fourbit {
alignas(64) static float values_[2][16], thresholds_[2][16];  // [signed]; from the plain twin

// 16-entry table, index 0..15
static inline F lookup(const float* table, I at) {
#if defined(__AVX512F__)
    return (F)_mm512_permutexvar_ps((__m512i)at, _mm512_load_ps(table));
#elif defined(__AVX2__)
    __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)at), high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)at);
    return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)at, 28)));  // bit 3 becomes the sign
#else
    return gather(table, at);
#endif
}
// how many thresholds lie below y: the nearest code, the lower one on a tie
template <bool SIGNED> static inline I nearest(F y) {
    const float* t = thresholds_[SIGNED];
    I code = (I)(y > t[7]) & 8;
    code += (I)(y > lookup(t, code + 3)) & 4;
    code += (I)(y > lookup(t, code + 1)) & 2;
    code += (I)(y > lookup(t, code)) & 1;
    return code;
}
template <bool SIGNED> static inline F value(I code, float absmax) { return lookup(values_[SIGNED], code) * absmax; }
constexpr uint8_t ZERO[2] = {0x00, 0x77};

// x: n elements, low half then high half
template <bool SIGNED> static inline void encode(const float* x, int n, I tops, uint8_t* codes, float* absmax) {
    const int32_t top = largest(tops);
    const float peak = bits<float>(top);
    const int half = n / 2;
    const bool small = top < 0x00800000;  // zero or subnormal: the reciprocal would overflow
    *absmax = small ? 0.0f : peak;
    if (small || top >= 0x7F800000) return (void)memset(codes, ZERO[SIGNED], (size_t)half);
    const float factor = 1.0f / peak;
    for (int i = 0; i < half; i += L) {
        I low = nearest<SIGNED>(load<F>(x + i) * factor), high = nearest<SIGNED>(load<F>(x + half + i) * factor);
        narrow(codes + i, low | (high << 4));
    }
}
static inline I low(I byte) { return byte & 15; }
static inline I high(I byte) { return byte >> 4; }

// ---- blocks of n elements, n a multiple of 2 L. `low` and `high` elements have the numbers at + i and beyond + i for the noise.
template <class W, class G> struct Adam {
    static constexpr bool WRITES_CODES = true;
    static inline void lanes(W* w, const G* g, I code1, I code2, float a1, float a2, float* m_, float* v_, I& top1, I& top2, uint32_t at, const Step& s) {
        F gi = read(g);
        F m = value<true>(code1, a1) * s.beta1 + gi * s.rest1;
        F v = value<false>(code2, a2) * s.beta2 + gi * s.rest2 * gi;
        top1 = max(top1, magnitude(m));
        top2 = max(top2, magnitude(v));
        store(m_, m), store(v_, v);
        write(w, read(w) * s.decay - m / (sqrt(v) + s.eps) * s.alpha, s.noise, at);
    }
    static void block(W* w, const G* g, uint8_t* c1, float* a1, uint8_t* c2, float* a2, int n, uint32_t at, uint32_t beyond, const Step& s) {
        alignas(64) float m_[MAX_BLOCK], v_[MAX_BLOCK];
        const int half = n / 2;
        I top1{}, top2{};
        for (int i = 0; i < half; i += L) {
            const I b1 = widen(c1 + i), b2 = widen(c2 + i);
            lanes(w + i, g + i, low(b1), low(b2), *a1, *a2, m_ + i, v_ + i, top1, top2, at + i, s);
            const int j = half + i;
            lanes(w + j, g + j, high(b1), high(b2), *a1, *a2, m_ + j, v_ + j, top1, top2, beyond + i, s);
        }
        encode<true>(m_, n, top1, c1, a1);
        encode<false>(v_, n, top2, c2, a2);
    }
};
template <class W, class G> struct Lion {
    static constexpr bool WRITES_CODES = true;
    static inline void lanes(W* w, const G* g, I code, float a, float* m_, I& top, uint32_t at, const Step& s) {
        F gi = read(g), m = value<true>(code, a), u = m * s.beta1 + gi * s.rest1;
        F sign = __builtin_convertvector((I)(u < 0.0f) - (I)(u > 0.0f), F) + u * 0.0f;  // u * 0 hands a NaN on
        m = m * s.beta2 + gi * s.rest2;
        top = max(top, magnitude(m));
        store(m_, m);
        write(w, read(w) * s.decay - sign * s.alpha, s.noise, at);
    }
    static void block(W* w, const G* g, uint8_t* c1, float* a1, uint8_t*, float*, int n, uint32_t at, uint32_t beyond, const Step& s) {
        alignas(64) float m_[MAX_BLOCK];
        const int half = n / 2;
        I top{};
        for (int i = 0; i < half; i += L) {
            const I b = widen(c1 + i);
            lanes(w + i, g + i, low(b), *a1, m_ + i, top, at + i, s);
            lanes(w + half + i, g + half + i, high(b), *a1, m_ + half + i, top, beyond + i, s);
        }
        encode<true>(m_, n, top, c1, a1);
    }
};
template <class X, bool SIGNED> struct Encode {  // x is in the place of the gradient
    static constexpr bool WRITES_CODES = true;
    static void block(float*, const X* x, uint8_t* c, float* a, uint8_t*, float*, int n, uint32_t, uint32_t, const Step&) {
        alignas(64) float x_[MAX_BLOCK];
        I top{};
        for (int i = 0; i < n; i += L) {
            F xi = read(x + i);
            top = max(top, magnitude(xi));
            store(x_ + i, xi);
        }
        encode<SIGNED>(x_, n, top, c, a);
    }
};
template <bool SIGNED> struct Decode {
    static constexpr bool WRITES_CODES = false;
    static void block(float* x, const float*, uint8_t* c, float* a, uint8_t*, float*, int n, uint32_t, uint32_t, const Step&) {
        const int half = n / 2;
        for (int i = 0; i < half; i += L) {
            const I b = widen(c + i);
            store(x + i, value<SIGNED>(low(b), *a));
            store(x + half + i, value<SIGNED>(high(b), *a));
        }
    }
};

// ---- the loop over blocks. The partial last block, halved at ceil(rest / 2), goes through copies in which each half is padded with
// zeros to whole vectors; the padding's codes are those of zero.
template <class T> static inline void spread(T* to, const T* from, int rest, int middle, int half) {
    if (!from) return;
    memcpy(to, from, middle * sizeof(T)), memcpy(to + half, from + middle, (rest - middle) * sizeof(T));
}
template <class T> static inline void gathered(T* to, const T* from, int rest, int middle, int half) {
    if (!to) return;
    memcpy(to, from, middle * sizeof(T)), memcpy(to + middle, from + half, (rest - middle) * sizeof(T));
}
// the byte of an odd block's last element keeps a zero in its high half
static inline void returned(uint8_t* to, const uint8_t* from, int rest, int middle) {
    if (!to) return;
    memcpy(to, from, middle);
    if (rest % 2) to[middle - 1] &= 15;
}

template <class K, class W, class G>
static void run(W* w, const G* g, uint8_t* c1, float* a1, uint8_t* c2, float* a2, int64_t n, int block, int threads, const Step& s) {
    const int64_t full = n / block, done = full * block;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t b = 0; b < full; ++b) {
        const int64_t i = b * block;
        K::block(at(w, i), at(g, i), at(c1, i / 2), at(a1, b), at(c2, i / 2), at(a2, b), block, (uint32_t)i, (uint32_t)(i + block / 2), s);
    }
    const int rest = (int)(n - done), middle = (rest + 1) / 2, half = (middle + L - 1) / L * L;
    if (rest == 0) return;
    W w_[MAX_BLOCK];
    G g_[MAX_BLOCK];
    uint8_t c1_[MAX_BLOCK], c2_[MAX_BLOCK];
    memset(w_, 0, 2 * half * sizeof(W)), memset(g_, 0, 2 * half * sizeof(G)), memset(c1_, ZERO[1], half), memset(c2_, ZERO[0], half);
    spread(w_, (const W*)at(w, done), rest, middle, half);
    spread(g_, at(g, done), rest, middle, half);
    if (c1) {
        memcpy(c1_, c1 + done / 2, middle);
        if (rest % 2) c1_[middle - 1] = (c1_[middle - 1] & 15) | (ZERO[1] & 0xF0);  // the padding beside it decodes to zero
    }
    if (c2) memcpy(c2_, c2 + done / 2, middle);
    K::block(w_, g_, c1_, at(a1, full), c2_, at(a2, full), 2 * half, (uint32_t)done, (uint32_t)(done + middle), s);
    gathered(at(w, done), (const W*)w_, rest, middle, half);
    if (K::WRITES_CODES) returned(at(c1, done / 2), c1_, rest, middle), returned(at(c2, done / 2), c2_, rest, middle);
}
}  // namespace fourbit

extern "C" {
void tare_tables4(const float* values_unsigned, const float* thresholds_unsigned, const float* values_signed, const float* thresholds_signed) {
    memcpy(fourbit::values_[0], values_unsigned, 64); memcpy(fourbit::thresholds_[0], thresholds_unsigned, 64);
    memcpy(fourbit::values_[1], values_signed, 64); memcpy(fourbit::thresholds_[1], thresholds_signed, 64);
}
#define STEP4(K, w, w_bf16, g, g_bf16, ...)                                                              \
    do {                                                                                                 \
        if (w_bf16 && g_bf16) fourbit::run<fourbit::K<bf16, bf16>>((bf16*)w, (const bf16*)g, __VA_ARGS__);        \
        else if (w_bf16) fourbit::run<fourbit::K<bf16, float>>((bf16*)w, (const float*)g, __VA_ARGS__);           \
        else if (g_bf16) fourbit::run<fourbit::K<float, bf16>>((float*)w, (const bf16*)g, __VA_ARGS__);           \
        else fourbit::run<fourbit::K<float, float>>((float*)w, (const float*)g, __VA_ARGS__);                     \
    } while (0)
void tare_adamw4(void* w, int w_bf16, const void* g, int g_bf16, uint8_t* c1, float* a1, uint8_t* c2, float* a2, int64_t n, int block,
                 int threads, const Step* s) { STEP4(Adam, w, w_bf16, g, g_bf16, c1, a1, c2, a2, n, block, threads, *s); }
void tare_lion4(void* w, int w_bf16, const void* g, int g_bf16, uint8_t* c, float* a, int64_t n, int block, int threads, const Step* s) {
    STEP4(Lion, w, w_bf16, g, g_bf16, c, a, nullptr, nullptr, n, block, threads, *s);
}
void tare_encode4(const void* x, int x_bf16, uint8_t* c, float* a, int64_t n, int block, int is_signed, int threads) {
    const Step s{};
    float* no = nullptr;
    const bf16* half = (const bf16*)x;
    if (x_bf16 && is_signed) fourbit::run<fourbit::Encode<bf16, true>>(no, half, c, a, nullptr, nullptr, n, block, threads, s);
    else if (x_bf16) fourbit::run<fourbit::Encode<bf16, false>>(no, half, c, a, nullptr, nullptr, n, block, threads, s);
    else if (is_signed) fourbit::run<fourbit::Encode<float, true>>(no, (const float*)x, c, a, nullptr, nullptr, n, block, threads, s);
    else fourbit::run<fourbit::Encode<float, false>>(no, (const float*)x, c, a, nullptr, nullptr, n, block, threads, s);
}
void tare_decode4(float* x, uint8_t* c, float* a, int64_t n, int block, int is_signed, int threads) {
    const Step s{};
    const float* no = nullptr;
    if (is_signed) fourbit::run<fourbit::Decode<true>>(x, no, c, a, nullptr, nullptr, n, block, threads, s);
    else fourbit::run<fourbit::Decode<false>>(x, no, c, a, nullptr, nullptr, n, block, threads, s);
}
}
