// Element-wise rules other than Adam in one pass, on moments in fp32 or bf16: Lion and its maps, Adan, diffGrad, momentum. A piece of the
// leaf at a time is widened to fp32 where it is not that already, stepped, and written, within the first cache: so a rule is compiled
// once, and not for every form of weight, gradient and moment. Included at the end of native.cpp after sixteen.hpp, whose weights it uses.

namespace light {
constexpr int PIECE = 512, MOST = 4;  // elements of a piece; moments of a rule

// factor: of the gradient. width: of Lion's maps. mix: of Adan's difference in its numerator. alpha: all that multiplies U.
struct Rates { float beta1, rest1, beta2, rest2, beta3, rest3, eps, mix, width, factor, decay, alpha; Noise weight, moments[MOST]; };
// g, m, to: fp32, n elements, a multiple of L. Moments are stepped in place. Rates by value: see sixteen.hpp.
typedef void (*Rule)(const float* g, float* const* m, float* to, int n, const Rates r);
// What is done with a direction: kept, for whatever writes the weight; or an fp32 weight, that stands in `to`, is stepped at once.
struct Kept { static void set(float* to, F u, const Rates&) { store(to, u); } };
struct Stepped { static void set(float* w, F u, const Rates& r) { store(w, read(w) * r.decay - u * r.alpha); } };

static inline F fused(F a, F b, float c) {  // a b + c, rounded once or twice
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, _mm512_set1_ps(c));
#elif defined(__AVX2__) && defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, _mm256_set1_ps(c));
#else
    return a * b + c;
#endif
}
static inline F absolute(F x) { return bits<F>(magnitude(x)); }
// exp(-x) for x from 0 on (NaN stays NaN): 2^-k e^r with |r| <= log(2)/2. The polynomial is minimax, 3e-9 relative; with the roundings of
// fp32 it is 2e-7. Above 80 the result is that of 80, beside which nobody sees a difference from 0.
static inline F exp_minus(F x) {
    const F no{};
    x = x > 80.0f ? no + 80.0f : x;
    F shifted = x * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest whole number
    F k = shifted - 12582912.0f;
    F r = (-x - k * 0.693359375f) - k * -2.12194440e-4f;  // log(2) in two parts, of which the first times k is exact
    F p = fused(no + 1.38145988e-3f, r, 8.36871751e-3f);
    p = fused(fused(fused(p, r, 4.16683890e-2f), r, 1.66665211e-1f), r, 4.99999940e-1f);
    p = p * r * r + r + 1.0f;
    return bits<F>(bits<U>(p) + (bits<U>(shifted) << 23));
}

// ---- the rules
enum Map { RAW, SIGN, DEAD_ZONE, HUBER };
template <int MAP> static inline F mapped(F x, float width) {
    const F one = F{} + 1.0f;
    if (MAP == RAW) return x;
    if (MAP == HUBER) {
        x = x / width;
        x = x > 1.0f ? one : x;
        return x < -1.0f ? -one : x;
    }
    I sign = (I)(x < 0.0f) - (I)(x > 0.0f);
    if (MAP == DEAD_ZONE) sign &= (I)(absolute(x) > width);
    return __builtin_convertvector(sign, F) + x * 0.0f;  // as in native.cpp: a NaN must not freeze its weight unseen
}
template <int MAP, class Out> static void lion(const float* g, float* const* m_, float* to, int n, const Rates r) {
    for (int i = 0; i < n; i += L) {
        F gi = read(g + i) * r.factor, m = read(m_[0] + i);
        store(m_[0] + i, m * r.beta2 + gi * r.rest2);
        Out::set(to + i, mapped<MAP>(m * r.beta1 + gi * r.rest1, r.width), r);
    }
}
template <bool FIRST, class Out> static void adan(const float* g, float* const* m_, float* to, int n, const Rates r) {
    for (int i = 0; i < n; i += L) {
        F gi = read(g + i) * r.factor, z = gi, v = read(m_[1] + i) * r.beta2;
        if (!FIRST) {
            F d = gi - read(m_[3] + i);
            v = v + d * r.rest2;
            z = d * r.beta2 + gi;
        }
        F m = read(m_[0] + i) * r.beta1 + gi * r.rest1;
        F s = read(m_[2] + i) * r.beta3 + z * r.rest3 * z;
        store(m_[0] + i, m), store(m_[1] + i, v), store(m_[2] + i, s), store(m_[3] + i, gi);
        Out::set(to + i, (m + v * r.mix) / (sqrt(s) + r.eps), r);
    }
}
template <bool FRICTION, class Out> static void diffgrad(const float* g, float* const* m_, float* to, int n, const Rates r) {
    for (int i = 0; i < n; i += L) {
        F gi = read(g + i) * r.factor;
        F m = read(m_[0] + i) * r.beta1 + gi * r.rest1;
        F v = read(m_[1] + i) * r.beta2 + gi * r.rest2 * gi;
        F below = sqrt(v) + r.eps;
        if (FRICTION) {  // m sigmoid(x) / below with one division
            below = (exp_minus(absolute(read(m_[2] + i) - gi)) + 1.0f) * below;
            store(m_[2] + i, gi);
        }
        store(m_[0] + i, m), store(m_[1] + i, v);
        Out::set(to + i, m / below, r);
    }
}
template <bool NESTEROV, class Out> static void momentum(const float* g, float* const* m_, float* to, int n, const Rates r) {
    for (int i = 0; i < n; i += L) {
        F gi = read(g + i) * r.factor;
        F b = read(m_[0] + i) * r.beta1 + gi * r.rest1;
        store(m_[0] + i, b);
        Out::set(to + i, NESTEROV ? gi + b * r.beta1 : b, r);
    }
}
template <int MAP, class Out> static void gradient(const float* g, float* const*, float* to, int n, const Rates r) {
    for (int i = 0; i < n; i += L) Out::set(to + i, mapped<MAP>(read(g + i) * r.factor, r.width), r);
}
template <class Out> static Rule rule(int number) {  // numbered as in native_light.py
    static const Rule all[] = {
        lion<RAW, Out>, lion<SIGN, Out>, lion<DEAD_ZONE, Out>, lion<HUBER, Out>, adan<true, Out>, adan<false, Out>,
        diffgrad<true, Out>, diffgrad<false, Out>, momentum<false, Out>, momentum<true, Out>,
        gradient<RAW, Out>, gradient<SIGN, Out>, gradient<DEAD_ZONE, Out>, gradient<HUBER, Out>};
    return all[number];
}

// ---- one piece. `own` holds n elements, padded to whole vectors with zeros, where they cannot be worked on in their place.
static float* fetch(const void* p, int is_bf16, int64_t at, int n, float* own) {
    const int full = n / L * L;
    float* x = (float*)p + at;
    if (!is_bf16) {
        if (n == full) return x;
        memcpy(own, x, n * sizeof(float)), memset(own + n, 0, (full + L - n) * sizeof(float));
        return own;
    }
    const bf16* half = (const bf16*)p + at;
    for (int i = 0; i < full; i += L) store(own + i, read(half + i));
    if (n == full) return own;
    bf16 last[L];
    sixteen::part(last, half + full, n - full);
    store(own + full, read((const bf16*)last));
    return own;
}
// W <- decay W - alpha U. BLANK: W <- -alpha U, whatever W was.
template <bool BLANK, class W> static inline void set(W w, F u, float decay, float alpha, const Noise& noise, uint32_t at) {
    w.set(BLANK ? -(u * alpha) : w.get() * decay - u * alpha, noise, at);
}
template <bool BLANK, class W> static inline void put(W w, const float* u, int64_t start, int n, float decay, float alpha, const Noise noise) {
    const int full = n / L * L;
    for (int i = 0; i < full; i += L) set<BLANK>(w.from(start + i), read(u + i), decay, alpha, noise, (uint32_t)(start + i));
    if (n == full) return;
    sixteen::Tail<W> tail;
    set<BLANK>(tail.in(w.from(start + full), n - full), read(u + full), decay, alpha, noise, (uint32_t)(start + full));
    tail.out(w.from(start + full), n - full);
}
// `flatten`: the rounding would be called, once for each vector, with its numbers in memory
template <bool BLANK> __attribute__((flatten)) static void
put_any(void* w, int is_bf16, uint8_t* low, const float* u, int64_t start, int n, float decay, float alpha, const Noise& noise) {
    using namespace sixteen;
    if (low && noise.on) light::put<BLANK>(Pair<true>{(bf16*)w, low}, u, start, n, decay, alpha, noise);
    else if (low) light::put<BLANK>(Pair<false>{(bf16*)w, low}, u, start, n, decay, alpha, noise);
    else if (!is_bf16) light::put<BLANK>(Alone<float, false>{(float*)w}, u, start, n, decay, alpha, noise);
    else if (noise.on) light::put<BLANK>(Alone<bf16, true>{(bf16*)w}, u, start, n, decay, alpha, noise);
    else light::put<BLANK>(Alone<bf16, false>{(bf16*)w}, u, start, n, decay, alpha, noise);
}

struct Job {
    Rule keep, step;
    void* w;
    uint8_t* low;
    const void* g;
    void* const* moments;
    int count, w_bf16, g_bf16, m_bf16;
};
static void piece(const Job& j, int64_t at, int n, const Rates& r) {
    alignas(64) float g_[PIECE], u_[PIECE], m_[MOST][PIECE];
    const int padded = (n + L - 1) / L * L;
    const bool direct = !j.w_bf16 && r.decay != 0.0f && n == padded;
    float* m[MOST];
    for (int k = 0; k < j.count; ++k) m[k] = fetch(j.moments[k], j.m_bf16, at, n, m_[k]);
    const float* g = fetch(j.g, j.g_bf16, at, n, g_);
    if (direct) j.step(g, m, (float*)j.w + at, n, r);
    else j.keep(g, m, u_, padded, r);
    for (int k = 0; k < j.count; ++k)
        if (m[k] == m_[k]) put_any<true>(j.moments[k], j.m_bf16, nullptr, m_[k], at, n, 0.0f, -1.0f, r.moments[k]);
    if (!direct) (r.decay == 0.0f ? put_any<true> : put_any<false>)(j.w, j.w_bf16, j.low, u_, at, n, r.decay, r.alpha, r.weight);
}
}  // namespace light

extern "C" {
// One step of a rule. low: the corrections of a split weight, or null. w may be g where the decay is 0: it is read before it is written.
void tare_light(int rule, void* w, int w_bf16, uint8_t* low, const void* g, int g_bf16, void* const* moments, int count, int m_bf16, int64_t n,
                int threads, const light::Rates* r) {
    using namespace light;
    const Job j{light::rule<Kept>(rule), light::rule<Stepped>(rule), w, low, g, moments, count, w_bf16, g_bf16, m_bf16};
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t p = 0; p < n; p += PIECE) piece(j, p, (int)(n - p < PIECE ? n - p : PIECE), *r);
}
}
