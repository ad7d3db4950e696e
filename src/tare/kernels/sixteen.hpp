// 16-bit weights: AdamW in one pass on bf16 weights (rounded stochastically, or split in 24 bits) with fp32 or bf16 moments, and the
// write of a split weight alone. Included at the end of native.cpp, whose lanes, memory formats and stochastic rounding it uses.

namespace sixteen {
constexpr int PIECE = 4096;  // elements of a thread's unit of work

// A weight in 24 bits, joined by one integer addition. A correction beside zero, NaN or infinity that never came from `write` counts nothing.
static inline F join(const bf16* high, const uint8_t* low) {
    I pattern = (I)(widen((const uint16_t*)high) << 16), magnitude = pattern & 0x7FFFFFFF;
    I correction = (widen(low) << 24) >> 16;  // the sign bit travels along
    I foreign = ((magnitude == 0) & (correction < 0)) | (magnitude >= 0x7F800000);
    return bits<F>(pattern + (foreign ? I{} : correction));
}
static inline U drawn(const Noise& noise, uint32_t at) {
    U lane;
    for (int l = 0; l < L; ++l) lane[l] = (uint32_t)l;
    return mix(lane + (noise.base + noise.index + at));
}
// 24 bits, to nearest or at random, then the nearest bf16 of these; the difference, in units of 256, is the correction.
template <bool NOISE> static inline void split(bf16* high, uint8_t* low, F x, const Noise& noise, uint32_t at) {
    U u = bits<U>(x), add = NOISE ? drawn(noise, at) >> 24 : 0x7F + ((u >> 8) & 1);
    U kept = (u + add) & 0xFFFFFF00u, pattern = (kept + 0x8000) & 0xFFFF0000u;
    U special = (U)((u & 0x7F800000) == 0x7F800000), nan = (U)((u & 0x7FFFFF) != 0);
    U none = special | (U)((pattern & 0x7F800000) == 0x7F800000);
    narrow(low, (I)(~none & ((kept - pattern) >> 8) & 255));
    narrow((uint16_t*)high, (special ? (u | (nan & 0x400000)) : pattern) >> 16);
}
template <bool NOISE> static inline void put(float* w, F x, const Noise&, uint32_t) { store(w, x); }
template <bool NOISE> static inline void put(bf16* w, F x, const Noise& noise, uint32_t at) {
    U u = bits<U>(x), add = NOISE ? drawn(noise, at) >> 16 : 0x7FFF + ((u >> 16) & 1);
    U special = (U)((u & 0x7F800000) == 0x7F800000), nan = (U)((u & 0x7FFFFF) != 0);
    narrow((uint16_t*)w, (special ? (u | (nan & 0x400000)) : (u + add)) >> 16);
}

// ---- how a weight is read and written; `at`: element number for the noise
template <class T, bool NOISE> struct Alone {
    T* w;
    Alone from(int64_t i) const { return {w + i}; }
    F get() const { return read(w); }
    void set(F x, const Noise& noise, uint32_t at) const { put<NOISE>(w, x, noise, at); }
};
template <bool NOISE> struct Pair {
    bf16* w;
    uint8_t* low;
    Pair from(int64_t i) const { return {w + i, low + i}; }
    F get() const { return join(w, low); }
    void set(F x, const Noise& noise, uint32_t at) const { split<NOISE>(w, low, x, noise, at); }
};

struct Rates { Step s; Noise first, second; };

// NOISE: of the moments
template <bool NOISE, class W, class G, class M> static inline void adam(W w, const G* g, M* m_, M* v_, uint32_t at, const Rates& r) {
    const Step& s = r.s;
    F gi = read(g);
    F m = read(m_) * s.beta1 + gi * s.rest1;
    F v = read(v_) * s.beta2 + gi * s.rest2 * gi;
    put<NOISE>(m_, m, r.first, at);
    put<NOISE>(v_, v, r.second, at);
    w.set(w.get() * s.decay - m / (sqrt(v) + s.eps) * s.alpha, s.noise, at);
}

// The last, partial vector goes through zero-padded copies.
template <class T> static inline void part(T* to, const T* from, int n) { memset(to, 0, L * sizeof(T)), memcpy(to, from, n * sizeof(T)); }

template <class W> struct Tail;
template <class T, bool NOISE> struct Tail<Alone<T, NOISE>> {
    T w_[L];
    Alone<T, NOISE> in(Alone<T, NOISE> w, int n) { part(w_, (const T*)w.w, n); return {w_}; }
    void out(Alone<T, NOISE> w, int n) { memcpy(w.w, w_, n * sizeof(T)); }
};
template <bool NOISE> struct Tail<Pair<NOISE>> {
    bf16 w_[L];
    uint8_t low_[L];
    Pair<NOISE> in(Pair<NOISE> w, int n) { part(w_, (const bf16*)w.w, n), part(low_, (const uint8_t*)w.low, n); return {w_, low_}; }
    void out(Pair<NOISE> w, int n) { memcpy(w.w, w_, n * sizeof(bf16)), memcpy(w.low, low_, n); }
};

// Rates by value: a store of bytes could alias anything that has an address, and all of them would be read again for each vector.
template <bool NOISE, class W, class G, class M>
static void piece(W w, const G* g, M* m, M* v, int64_t start, int64_t stop, const Rates r) {
    for (int64_t i = start; i < stop; i += L) adam<NOISE>(w.from(i), g + i, m + i, v + i, (uint32_t)i, r);
}
template <bool NOISE, class W, class G, class M> static void run(W w, const G* g, M* m, M* v, int64_t n, int threads, const Rates& r) {
    const int64_t full = n / L * L;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t p = 0; p < full; p += PIECE) piece<NOISE>(w, g, m, v, p, p + PIECE < full ? p + PIECE : full, r);
    const int rest = (int)(n - full);
    if (rest == 0) return;
    Tail<W> tail;
    G g_[L];
    M m_[L], v_[L];
    part(g_, g + full, rest), part(m_, (const M*)m + full, rest), part(v_, (const M*)v + full, rest);
    adam<NOISE>(tail.in(w.from(full), rest), (const G*)g_, m_, v_, (uint32_t)full, r);
    tail.out(w.from(full), rest);
    memcpy(m + full, m_, rest * sizeof(M)), memcpy(v + full, v_, rest * sizeof(M));
}
template <class W, class G> static void with_moments(W w, const G* g, void* m, void* v, int m_bf16, int64_t n, int threads, const Rates& r) {
    if (!m_bf16) run<false>(w, g, (float*)m, (float*)v, n, threads, r);
    else if (r.first.on) run<true>(w, g, (bf16*)m, (bf16*)v, n, threads, r);
    else run<false>(w, g, (bf16*)m, (bf16*)v, n, threads, r);
}
template <class W> static void with(W w, const void* g, int g_bf16, void* m, void* v, int m_bf16, int64_t n, int threads, const Rates& r) {
    if (g_bf16) with_moments(w, (const bf16*)g, m, v, m_bf16, n, threads, r);
    else with_moments(w, (const float*)g, m, v, m_bf16, n, threads, r);
}

template <class W> static void write_piece(W w, const float* u, int64_t start, int64_t stop, const Step s) {
    for (int64_t i = start; i < stop; i += L) {
        const W at = w.from(i);
        at.set(at.get() * s.decay - read(u + i) * s.alpha, s.noise, (uint32_t)i);
    }
}
template <class W> static void write_all(W w, const float* u, int64_t n, int threads, const Step& s) {
    const int64_t full = n / L * L;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
    for (int64_t p = 0; p < full; p += PIECE) write_piece(w, u, p, p + PIECE < full ? p + PIECE : full, s);
    const int rest = (int)(n - full);
    if (rest == 0) return;
    Tail<W> tail;
    float u_[L];
    part(u_, u + full, rest);
    const W at = tail.in(w.from(full), rest);
    at.set(at.get() * s.decay - read((const float*)u_) * s.alpha, s.noise, (uint32_t)full);
    tail.out(w.from(full), rest);
}
}  // namespace sixteen

extern "C" {
// low: the corrections of a split weight, or null
void tare_adamw16(void* w, int w_bf16, uint8_t* low, const void* g, int g_bf16, void* m, void* v, int m_bf16, int64_t n, int threads,
                  const sixteen::Rates* r) {
    using namespace sixteen;
    const bool noise = r->s.noise.on;
    if (low && noise) with(Pair<true>{(bf16*)w, low}, g, g_bf16, m, v, m_bf16, n, threads, *r);
    else if (low) with(Pair<false>{(bf16*)w, low}, g, g_bf16, m, v, m_bf16, n, threads, *r);
    else if (!w_bf16) with(Alone<float, false>{(float*)w}, g, g_bf16, m, v, m_bf16, n, threads, *r);
    else if (noise) with(Alone<bf16, true>{(bf16*)w}, g, g_bf16, m, v, m_bf16, n, threads, *r);
    else with(Alone<bf16, false>{(bf16*)w}, g, g_bf16, m, v, m_bf16, n, threads, *r);
}
void tare_write_split(void* w, uint8_t* low, const float* u, int64_t n, int threads, const Step* s) {
    using namespace sixteen;
    if (s->noise.on) write_all(Pair<true>{(bf16*)w, low}, u, n, threads, *s);
    else write_all(Pair<false>{(bf16*)w, low}, u, n, threads, *s);
}
}
