// Block-wise 8-bit states, fused steps and stochastic rounding in one pass over memory. Plain C interface, no dependency.
//
// One block at a time: decode both moments, update, write the weight, keep the new moments in a stack buffer, find their largest
// magnitude, encode. Vectors are the compiler's extension types, because the auto-vectoriser is three to ten times slower on this.
// Compile with -ffp-contract=off: products and sums are rounded one by one, as in the plain torch twin, so that codes are equal.
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
constexpr int MAX_BLOCK = 4096;

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef uint16_t H __attribute__((vector_size(2 * L)));
typedef uint8_t B __attribute__((vector_size(L)));

template <class V, class T> static inline V load(const T* p) { V x; memcpy(&x, p, sizeof x); return x; }
template <class V, class T> static inline void store(T* p, V x) { memcpy(p, &x, sizeof x); }
template <class To, class From> static inline To bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
static inline I max(I a, I b) { return a > b ? a : b; }
static inline F min(F a, F b) { return a < b ? a : b; }

// ---- what the vector types lack, or what compilers do lane by lane in scalar code (conversion between widths)
static inline I widen(const uint8_t* p) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepu8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return __builtin_convertvector(load<B>(p), I);
#endif
}
static inline U widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return (U)_mm512_cvtepu16_epi32(load<__m256i>(p));
#elif defined(__AVX2__)
    return (U)_mm256_cvtepu16_epi32(load<__m128i>(p));
#else
    return __builtin_convertvector(load<H>(p), U);
#endif
}
static inline void narrow(uint8_t* p, I x) {  // 0..255
#if defined(__AVX512F__)
    store(p, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
    __m128i half = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
#else
    store(p, __builtin_convertvector(x, B));
#endif
}
static inline void narrow(uint16_t* p, U x) {  // 0..65535
#if defined(__AVX512F__)
    store(p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
    store(p, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)));
#else
    store(p, __builtin_convertvector(x, H));
#endif
}
static inline F gather(const float* table, I at) {
#if defined(__AVX512F__)
    return (F)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(__AVX2__)
    return (F)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
    F x;
    for (int l = 0; l < L; ++l) x[l] = table[at[l]];
    return x;
#endif
}
static inline F sqrt(F x) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)x);
#else
    for (int l = 0; l < L; ++l) x[l] = __builtin_sqrtf(x[l]);
    return x;
#endif
}
// a * b + c, rounded once or twice: only for the estimate of a code, which a comparison corrects
static inline F about(F a, float b, float c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), _mm512_set1_ps(c));
#elif defined(__AVX2__) && defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), _mm256_set1_ps(c));
#else
    return a * b + c;
#endif
}
static inline int32_t largest(I x) {
    int32_t top = x[0];
    for (int l = 1; l < L; ++l) top = x[l] > top ? x[l] : top;
    return top;
}

// ---- memory formats
struct bf16 { uint16_t pattern; };
static inline F read(const float* p) { return load<F>(p); }
static inline F read(const bf16* p) { return bits<F>(widen((const uint16_t*)p) << 16); }
static inline U mix(U x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}
struct Noise { uint32_t base; int on; uint32_t index; };  // hashed key; 0: round to nearest; low word of the first element's index
static inline void write(float* p, F x, const Noise&, uint32_t) { store(p, x); }
static inline void write(bf16* p, F x, const Noise& noise, uint32_t at) {
    U u = bits<U>(x), add = 0x7FFF + ((u >> 16) & 1);  // to nearest, ties to even
    if (noise.on) {
        U lane;
        for (int l = 0; l < L; ++l) lane[l] = (uint32_t)l;
        add = mix(lane + (noise.base + noise.index + at)) >> 16;
    }
    U nan = (U)((u & 0x7FFFFF) != 0), special = (U)((u & 0x7F800000) == 0x7F800000);
    u = special ? (u | (nan & 0x400000)) : (u + add);
    narrow((uint16_t*)p, u >> 16);
}

// ---- the codec. Tables come from the plain twin, so there is one definition of the map.
static float values_[2][256], thresholds_[2][256];  // [signed]

// Code estimate: with k cells in decade i, the coordinate (10^(6-i)/0.9) k x + (8/9) k counts cells, is continuous over the decades and
// concave, hence the least of the seven lines. A quarter less, its floor is the code or one below it (edges between decades lie 0.2
// above an integer), and one comparison with the exact threshold decides.
template <bool SIGNED> static inline I nearest(F y) {
    constexpr float k = SIGNED ? 1.0f : 2.0f, a = k / 0.9f, b = k * 8.0f / 9.0f, q = 0.25f;
    F x = SIGNED ? bits<F>(bits<I>(y) & 0x7FFFFFFF) : y;
    F f = min(min(min(about(x, 1e6f * a, b - q), about(x, 2e5f * a, 2 * b - q)), min(about(x, 4e4f * a, 4 * b - q), about(x, 8e3f * a, 8 * b - q))),
              min(min(about(x, 1.6e3f * a, 16 * b - q), about(x, 3.2e2f * a, 32 * b - q)), about(x, 64.0f * a, 64 * b - q)));
    I u = __builtin_convertvector(f, I);
    // signed: 127 + u above zero, 126 - u = 127 + ~u below; unsigned: u - 1
    I code = max(SIGNED ? (u ^ (bits<I>(y) >> 31)) + 127 : u - 1, I{});
    return code - (I)(y > gather(thresholds_[SIGNED], code));
}
template <bool SIGNED> static inline F value(const uint8_t* codes, float absmax) { return gather(values_[SIGNED], widen(codes)) * absmax; }

// `top`: integer pattern of the largest magnitude; that order puts NaN and infinities on top, which a float maximum would lose
template <bool SIGNED> static inline void encode(const float* x, int n, I tops, uint8_t* codes, float* absmax) {
    int32_t top = largest(tops);
    const float peak = bits<float>(top);
    const bool small = top < 0x00800000;  // zero or subnormal: the reciprocal would overflow
    *absmax = small ? 0.0f : peak;
    if (small || top >= 0x7F800000) return (void)memset(codes, SIGNED ? 127 : 0, (size_t)n);
    const float factor = 1.0f / peak;
    for (int i = 0; i < n; i += L) narrow(codes + i, nearest<SIGNED>(load<F>(x + i) * factor));
}
static inline I magnitude(F x) { return bits<I>(x) & 0x7FFFFFFF; }

// ---- blocks; n is a multiple of L
struct Step { float beta1, rest1, beta2, rest2, decay, alpha, eps; Noise noise; };

template <class W, class G> struct Adam {
    static constexpr bool WRITES_CODES = true;
    static void block(W* w, const G* g, uint8_t* c1, float* a1, uint8_t* c2, float* a2, int n, uint32_t at, const Step& s) {
        alignas(64) float m_[MAX_BLOCK], v_[MAX_BLOCK];
        I top1{}, top2{};
        for (int i = 0; i < n; i += L) {
            F gi = read(g + i);
            F m = value<true>(c1 + i, *a1) * s.beta1 + gi * s.rest1;
            F v = value<false>(c2 + i, *a2) * s.beta2 + gi * s.rest2 * gi;
            top1 = max(top1, magnitude(m));
            top2 = max(top2, magnitude(v));
            store(m_ + i, m), store(v_ + i, v);
            write(w + i, read(w + i) * s.decay - m / (sqrt(v) + s.eps) * s.alpha, s.noise, at + i);
        }
        encode<true>(m_, n, top1, c1, a1);
        encode<false>(v_, n, top2, c2, a2);
    }
};
template <class W, class G> struct Lion {
    static constexpr bool WRITES_CODES = true;
    static void block(W* w, const G* g, uint8_t* c1, float* a1, uint8_t*, float*, int n, uint32_t at, const Step& s) {
        alignas(64) float m_[MAX_BLOCK];
        I top{};
        for (int i = 0; i < n; i += L) {
            F gi = read(g + i), m = value<true>(c1 + i, *a1), u = m * s.beta1 + gi * s.rest1;
            // u * 0 hands a NaN on, which neither comparison would: it must not freeze its weight unseen
            F sign = __builtin_convertvector((I)(u < 0.0f) - (I)(u > 0.0f), F) + u * 0.0f;
            m = m * s.beta2 + gi * s.rest2;
            top = max(top, magnitude(m));
            store(m_ + i, m);
            write(w + i, read(w + i) * s.decay - sign * s.alpha, s.noise, at + i);
        }
        encode<true>(m_, n, top, c1, a1);
    }
};
struct Write {  // U is in the place of the gradient
    static constexpr bool WRITES_CODES = false;
    static void block(bf16* w, const float* u, uint8_t*, float*, uint8_t*, float*, int n, uint32_t at, const Step& s) {
        for (int i = 0; i < n; i += L) write(w + i, read(w + i) * s.decay - read(u + i) * s.alpha, s.noise, at + i);
    }
};
template <class X, bool SIGNED> struct Encode {  // x is in the place of the gradient
    static constexpr bool WRITES_CODES = true;
    static void block(float*, const X* x, uint8_t* c, float* a, uint8_t*, float*, int n, uint32_t, const Step&) {
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
    static void block(float* x, const float*, uint8_t* c, float* a, uint8_t*, float*, int n, uint32_t, const Step&) {
        for (int i = 0; i < n; i += L) store(x + i, value<SIGNED>(c + i, *a));
    }
};

// ---- the loop over blocks. The partial last block goes through zero-padded copies; pad codes are those of zero. Arguments that a
// kernel does not use are null, and what it only reads is not written back.
template <class T> static inline T* at(T* p, int64_t i) { return p ? p + i : p; }
template <class T> static inline void copy(T* to, const T* from, int n) { if (to && from) memcpy(to, from, n * sizeof(T)); }

template <class K, class W, class G>
static void run(W* w, const G* g, uint8_t* c1, float* a1, uint8_t* c2, float* a2, int64_t n, int block, int threads, const Step& s) {
    const int64_t full = n / block, done = full * block;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t b = 0; b < full; ++b) {
        const int64_t i = b * block;
        K::block(at(w, i), at(g, i), at(c1, i), at(a1, b), at(c2, i), at(a2, b), block, (uint32_t)i, s);
    }
    const int rest = (int)(n - done), padded = (rest + L - 1) / L * L;
    if (rest == 0) return;
    W w_[MAX_BLOCK];
    G g_[MAX_BLOCK];
    uint8_t c1_[MAX_BLOCK], c2_[MAX_BLOCK];
    memset(w_, 0, padded * sizeof(W)), memset(g_, 0, padded * sizeof(G)), memset(c1_, 127, padded), memset(c2_, 0, padded);
    copy(w_, (const W*)at(w, done), rest);
    copy(g_, at(g, done), rest);
    copy(c1_, (const uint8_t*)at(c1, done), rest);
    copy(c2_, (const uint8_t*)at(c2, done), rest);
    K::block(w_, g_, c1_, at(a1, full), c2_, at(a2, full), padded, (uint32_t)done, s);
    copy(at(w, done), (const W*)w_, rest);
    if (K::WRITES_CODES) {
        copy(at(c1, done), (const uint8_t*)c1_, rest);
        copy(at(c2, done), (const uint8_t*)c2_, rest);
    }
}

extern "C" {
int tare_interface() { return 1; }
int tare_lanes() { return L; }
int tare_threaded() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
void tare_tables(const float* values_unsigned, const float* thresholds_unsigned, const float* values_signed, const float* thresholds_signed) {
    memcpy(values_[0], values_unsigned, 1024); memcpy(thresholds_[0], thresholds_unsigned, 1024);
    memcpy(values_[1], values_signed, 1024); memcpy(thresholds_[1], thresholds_signed, 1024);
}
#define STEP(K, w, w_bf16, g, g_bf16, ...)                                                      \
    do {                                                                                        \
        if (w_bf16 && g_bf16) run<K<bf16, bf16>>((bf16*)w, (const bf16*)g, __VA_ARGS__);        \
        else if (w_bf16) run<K<bf16, float>>((bf16*)w, (const float*)g, __VA_ARGS__);           \
        else if (g_bf16) run<K<float, bf16>>((float*)w, (const bf16*)g, __VA_ARGS__);           \
        else run<K<float, float>>((float*)w, (const float*)g, __VA_ARGS__);                     \
    } while (0)
void tare_adamw(void* w, int w_bf16, const void* g, int g_bf16, uint8_t* c1, float* a1, uint8_t* c2, float* a2, int64_t n, int block,
                int threads, const Step* s) { STEP(Adam, w, w_bf16, g, g_bf16, c1, a1, c2, a2, n, block, threads, *s); }
void tare_lion(void* w, int w_bf16, const void* g, int g_bf16, uint8_t* c, float* a, int64_t n, int block, int threads, const Step* s) {
    STEP(Lion, w, w_bf16, g, g_bf16, c, a, nullptr, nullptr, n, block, threads, *s);
}
void tare_write(void* w, const float* u, int64_t n, int threads, const Step* s) {
    run<Write>((bf16*)w, u, nullptr, nullptr, nullptr, nullptr, n, 1024, threads, *s);
}
void tare_encode(const void* x, int x_bf16, uint8_t* c, float* a, int64_t n, int block, int is_signed, int threads) {
    const Step s{};
    float* no = nullptr;
    const bf16* half = (const bf16*)x;
    if (x_bf16 && is_signed) run<Encode<bf16, true>>(no, half, c, a, nullptr, nullptr, n, block, threads, s);
    else if (x_bf16) run<Encode<bf16, false>>(no, half, c, a, nullptr, nullptr, n, block, threads, s);
    else if (is_signed) run<Encode<float, true>>(no, (const float*)x, c, a, nullptr, nullptr, n, block, threads, s);
    else run<Encode<float, false>>(no, (const float*)x, c, a, nullptr, nullptr, n, block, threads, s);
}
void tare_decode(float* x, uint8_t* c, float* a, int64_t n, int block, int is_signed, int threads) {
    const Step s{};
    const float* no = nullptr;
    if (is_signed) run<Decode<true>>(x, no, c, a, nullptr, nullptr, n, block, threads, s);
    else run<Decode<false>>(x, no, c, a, nullptr, nullptr, n, block, threads, s);
}
}

#include "fourbit.hpp"
#include "sixteen.hpp"
#include "directions.hpp"
#include "light.hpp"
#include "norms.hpp"
#include "groupwise.hpp"
