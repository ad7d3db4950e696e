// Directions written where they are used: W <- decay W - alpha scale sum_k c_k z_k in one pass, every z_k drawn from (key, element) and never
// stored. The twin, which says what the numbers are, is directions.py. Included at the end of native.cpp after sixteen.hpp, whose weights
// it writes.

namespace directions {
constexpr int GROUP = 32, HALF = GROUP / 2, PIECE = 512, PAIRS = PIECE / 2;  // a piece and its sums stay in the first cache

struct Member { uint32_t base, first, second; };  // where the counter starts, and the keys of its two words
struct Rates { double decay, alpha, scale; Noise noise; };

static inline U counted(uint32_t from) {
    U lane;
    for (int l = 0; l < L; ++l) lane[l] = (uint32_t)l;
    return lane + from;
}
static inline U scramble(U x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}
static inline F real(I x) { return __builtin_convertvector(x, F); }

// sqrt(-2 log u), u the odd 31-bit number (2 (w >> 2) + 1) / 2^31
static inline F radius(U w) {
    I shifted = bits<I>(real((I)((w >> 1) | 1))) - (0x3F3504F3 + (31 << 23));  // the significand from sqrt(1/2) to sqrt(2)
    F t = bits<F>((shifted & 0x7FFFFF) + 0x3F3504F3) - 1.0f, t2 = t * t;
    F low = (t * 1.000022292137146f + -2.000001907348633f) + (t * 0.4981948733329773f + -0.6662901639938354f) * t2;
    F high = (t * 0.3733571767807007f + -0.4099265933036804f) + t2 * -0.23792220652103424f;
    return sqrt(real(shifted >> 23) * -1.3862943649291992f + (low + high * (t2 * t2)) * t);
}
// cos and sin of pi/2 x for x in [-1, 1]; y = x^2
static inline F cosine(F y) {
    F y2 = y * y;
    return (y * -1.2336982488632202f + 0.9999999403953552f) + ((y * -0.020810628309845924f + 0.2536507546901703f) + y2 * 0.0008581910515204072f) * y2;
}
static inline F sine(F x, F y) {
    return ((y * -0.645920991897583f + 1.5707948207855225f) + (y * -0.004362472798675299f + 0.07948765903711319f) * (y * y)) * x;
}

// sum (+)= c z over PIECE elements from `group` on. In three loops: in one, the chain of dependent operations is longer than the
// processor looks ahead, and a third slower.
template <bool FRESH> static void normals(float* sum, uint32_t group, const Member k, float c) {
    alignas(64) uint32_t angle_[PAIRS];
    alignas(64) float radius_[PAIRS];
    for (int i = 0; i < PAIRS; i += L) {
        U s = mix(counted(group * HALF + (uint32_t)i) + k.base);
        store((uint32_t*)radius_ + i, mix(s + k.first));
        store(angle_ + i, scramble(s + k.second));
    }
    for (int i = 0; i < PAIRS; i += L) store(radius_ + i, radius(load<U>((const uint32_t*)radius_ + i)));
    for (int i = 0; i < PAIRS; i += L) {
        U w = load<U>(angle_ + i);
        F r = bits<F>(load<U>((const uint32_t*)radius_ + i) ^ (w & 0x80000000u));  // the first bit: to the opposite point
        F x = real((I)(w << 1)) * 4.656612873077393e-10f, y = x * x;
        float* at = sum + i / HALF * GROUP + i % HALF;
        const F none{};
        store(at, r * cosine(y) * c + (FRESH ? none : load<F>(at)));
        store(at + HALF, r * sine(x, y) * c + (FRESH ? none : load<F>(at + HALF)));
    }
}
// One word of signs for a group: bit number e is that of element e.
template <bool FRESH> static void signs(float* sum, uint32_t group, const Member k, float c) {
    alignas(64) uint32_t words[L > PIECE / GROUP ? L : PIECE / GROUP];
    for (int g = 0; g < PIECE / GROUP; g += L) store(words + g, scramble(mix(mix(counted(group + (uint32_t)g) + k.base) + k.first) + k.second));
    const U place = 31 - counted(0);
    const F none{}, value = none + c;
    for (int g = 0; g < PIECE / GROUP; ++g)
        for (int e = 0; e < GROUP; e += L) {
            U sign = (words[g] << (place - (uint32_t)e)) & 0x80000000u;
            float* at = sum + g * GROUP + e;
            store(at, bits<F>(bits<U>(value) ^ sign) + (FRESH ? none : load<F>(at)));
        }
}

enum Law { NORMALS, SIGNS };
struct Job {
    Law law;
    const Member* members;
    const double* coefficients;
    int count;
    uint32_t group, head;  // of the first element: its group, and its place there
    int64_t n;
    const void* of;  // numbers of the weight's form, or null: the sum counts only where |of| <= limit
    int form;
    double limit, nothing;  // nothing: the zero that takes its place elsewhere
};
static inline F kept(F x, F of, F limit, F nothing) {
    const I in = (I)(bits<F>(bits<U>(of) & 0x7FFFFFFFu) <= limit);  // of a NaN not
    return bits<F>((bits<I>(x) & in) | (bits<I>(nothing) & ~in));
}
template <class T> static void sieve(float* sum, const T* of, int n, double limit, double nothing) {
    const F zero{}, most = zero + (float)limit, none = bits<F>(bits<U>(zero) | (__builtin_signbit(nothing) ? 0x80000000u : 0u));
    const int full = n / L * L;
    for (int i = 0; i < full; i += L) store(sum + i, kept(load<F>(sum + i), read(of + i), most, none));
    if (n == full) return;
    T of_[L];
    float sum_[L];
    sixteen::part(of_, of + full, n - full), sixteen::part(sum_, (const float*)sum + full, n - full);
    store(sum_, kept(load<F>(sum_), read((const T*)of_), most, none));
    memcpy(sum + full, sum_, (n - full) * sizeof(float));
}
static void sieve(const Job& j, float* sum, int64_t start, int n) {
    if (j.form == 0) sieve(sum, (const float*)j.of + start, n, j.limit, j.nothing);
    else sieve(sum, (const bf16*)j.of + start, n, j.limit, j.nothing);
}
static void sieve(const Job& j, double* sum, int64_t start, int n) {
    const double* of = (const double*)j.of + start;
    for (int i = 0; i < n; ++i) sum[i] = __builtin_fabs(of[i]) <= j.limit ? sum[i] : j.nothing;
}
template <bool FRESH> static inline void draw(const Job& j, float* sum, uint32_t group, int k, float c) {
    if (j.law == NORMALS) normals<FRESH>(sum, group, j.members[k], c);
    else signs<FRESH>(sum, group, j.members[k], c);
}
static void total(const Job& j, float* sum, uint32_t group) {
    if (j.count == 0) memset(sum, 0, PIECE * sizeof(float));
    for (int k = 0; k < j.count; ++k)
        k ? draw<false>(j, sum, group, k, (float)j.coefficients[k]) : draw<true>(j, sum, group, k, (float)j.coefficients[k]);
}
static void total(const Job& j, double* sum, uint32_t group) {
    alignas(64) float z[PIECE];
    for (int i = 0; i < PIECE; ++i) sum[i] = 0;
    for (int k = 0; k < j.count; ++k) {
        draw<true>(j, z, group, k, 1.0f);
        for (int i = 0; i < PIECE; ++i) sum[i] += (double)z[i] * j.coefficients[k];
    }
}

// With a decay of 0 the old weight is not read.
template <class W> static inline void set(W w, W from, F u, float decay, float alpha, float scale, const Noise& noise, uint32_t at) {
    F step = u * scale * alpha;
    w.set(decay == 0.0f ? -step : from.get() * decay - step, noise, at);
}
template <class W> static void put(W w, W from, const float* u, int64_t start, int n, float decay, float alpha, float scale, const Noise noise) {
    const int full = n / L * L;
    for (int i = 0; i < full; i += L)
        set(w.from(start + i), from.from(start + i), read(u + i), decay, alpha, scale, noise, (uint32_t)(start + i));
    if (n == full) return;
    sixteen::Tail<W> tail;
    float u_[L];
    sixteen::part(u_, u + full, n - full);
    const W last = tail.in(from.from(start + full), n - full);
    set(last, last, read((const float*)u_), decay, alpha, scale, noise, (uint32_t)(start + full));
    tail.out(w.from(start + full), n - full);
}
template <class W> struct Target {
    W w, from;
    typedef float Sum;
    void write(const float* u, int64_t start, int n, const Rates& r) const {
        put(w, from, u, start, n, (float)r.decay, (float)r.alpha, (float)r.scale, r.noise);
    }
};
struct Wide {
    double* w;
    const double* from;
    typedef double Sum;
    void write(const double* u, int64_t start, int n, const Rates& r) const {
        for (int i = 0; i < n; ++i) {
            const double step = u[i] * r.scale * r.alpha;
            w[start + i] = r.decay == 0.0 ? -step : from[start + i] * r.decay - step;
        }
    }
};
template <class T> static void run(const T target, const Job j, int threads, const Rates r) {
    const int64_t padded = j.n + j.head;
#pragma omp parallel for num_threads(threads) schedule(static) if (j.n > 4096)
    for (int64_t p = 0; p < padded; p += PIECE) {
        alignas(64) typename T::Sum sum[PIECE];
        total(j, sum, j.group + (uint32_t)(p / GROUP));
        const int64_t begin = p < j.head ? j.head : p, end = p + PIECE < padded ? p + PIECE : padded;
        if (j.of) sieve(j, sum + (begin - p), begin - j.head, (int)(end - begin));
        target.write(sum + (begin - p), begin - j.head, (int)(end - begin), r);
    }
}
}  // namespace directions

extern "C" {
// w: fp32, bf16 or fp64 (`form` 0, 1, 2); from: of the same dtype, what is stepped, w itself or another. low: the corrections of a split
// weight, or null. start: number of the first element, whose n must not pass 2^32. of, limit: see Job; of may be w.
void tare_directions(int law, void* w, const void* from, int form, uint8_t* low, const directions::Member* members, const double* coefficients,
                     int count, int64_t n, uint32_t start, int threads, const directions::Rates* r, const void* of, double limit) {
    using namespace directions;
    using namespace sixteen;
    const double factor = r->alpha * r->scale, nothing = __builtin_copysign(0.0, r->decay == 0.0 ? -factor : factor);
    const Job j{(Law)law, members, coefficients, count, start / GROUP, start % GROUP, n, of, form, limit, nothing};
    bf16 *half = (bf16*)w, *source = (bf16*)from;
    if (form == 2) directions::run(Wide{(double*)w, (const double*)from}, j, threads, *r);
    else if (low && r->noise.on) directions::run(Target<Pair<true>>{{half, low}, {half, low}}, j, threads, *r);
    else if (low) directions::run(Target<Pair<false>>{{half, low}, {half, low}}, j, threads, *r);
    else if (form == 0) directions::run(Target<Alone<float, false>>{{(float*)w}, {(float*)from}}, j, threads, *r);
    else if (r->noise.on) directions::run(Target<Alone<bf16, true>>{{half}, {source}}, j, threads, *r);
    else directions::run(Target<Alone<bf16, false>>{{half}, {source}}, j, threads, *r);
}
}
