// Passes over one matrix [m, n] of which torch needs several: squared norms of lines, the projection on one vector or another matrix together
// with them, Sinkhorn's scaling, and the upper half of a symmetric matrix from its lower one. Included at the end of native.cpp.
//
// Sums down a column are gathered in PANELS parts of the rows and then added, whatever the number of threads: so their bits never depend
// on it.
#include <vector>

namespace norms {
constexpr int PANELS = 16;
constexpr int64_t LARGE = 1 << 15;  // elements from which on threads pay

static inline float one(const float* p) { return *p; }
static inline float one(const bf16* p) { return bits<float>((uint32_t)p->pattern << 16); }
static inline float sum(F x) {
    float all = 0.0f;
    for (int l = 0; l < L; ++l) all += x[l];
    return all;
}
// sum of x_j w_j and of x_j^2 over a row, each in two vectors of partial sums
template <class X> static inline void dots(const X* x, const float* w, int64_t n, float* product, float* square) {
    F a{}, b{}, c{}, d{};
    int64_t j = 0;
    for (; j + 2 * L <= n; j += 2 * L) {
        F p = read(x + j), q = read(x + j + L);
        a += p * read(w + j), b += q * read(w + j + L);
        c += p * p, d += q * q;
    }
    float first = sum(a + b), second = sum(c + d);
    for (; j < n; ++j) first += one(x + j) * w[j], second += one(x + j) * one(x + j);
    *product = first, *square = second;
}
template <class X> static inline float squared(const X* x, int64_t n) {
    F a{}, b{};
    int64_t j = 0;
    for (; j + 2 * L <= n; j += 2 * L) {
        F p = read(x + j), q = read(x + j + L);
        a += p * p, b += q * q;
    }
    float all = sum(a + b);
    for (; j < n; ++j) all += one(x + j) * one(x + j);
    return all;
}

// ---- parts of the rows, and what was gathered in them
struct Panels {
    int64_t m, n, height;
    std::vector<float> rows;
    Panels(int64_t m, int64_t n, int lines) : m(m), n(n), height((m + PANELS - 1) / PANELS), rows(PANELS * lines * n) {}
    float* part(int panel, int line = 0) { return rows.data() + ((int64_t)line * PANELS + panel) * n; }
    int64_t begin(int panel) const { return panel * height < m ? panel * height : m; }
    void add_up(float* out, int line = 0) {
        for (int64_t j = 0; j < n; ++j) out[j] = *(part(0, line) + j);
        for (int panel = 1; panel < PANELS; ++panel) {
            const float* p = part(panel, line);
            for (int64_t j = 0; j < n; ++j) out[j] += p[j];
        }
    }
};
template <class X> static void squares(const X* x, int64_t m, int64_t n, int of_columns, float* out, int threads) {
    if (!of_columns) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
        for (int64_t i = 0; i < m; ++i) out[i] = squared(x + i * n, n);
        return;
    }
    Panels parts(m, n, 1);
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
    for (int panel = 0; panel < PANELS; ++panel) {
        float* to = parts.part(panel);
        for (int64_t i = parts.begin(panel); i < parts.begin(panel + 1); ++i) {
            const X* row = x + i * n;
            int64_t j = 0;
            for (; j + L <= n; j += L) { F p = read(row + j); store(to + j, read(to + j) + p * p); }
            for (; j < n; ++j) to[j] += one(row + j) * one(row + j);
        }
    }
    parts.add_up(out);
}
// R = p^T G [n] (left, p [m]) or G p [m], and the squared norms of G's columns (left) or rows, in one reading of G
template <class X>
static void project(const X* x, const float* p, int64_t m, int64_t n, int left, float* r, float* square, int threads) {
    if (!left) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
        for (int64_t i = 0; i < m; ++i) dots(x + i * n, p, n, r + i, square + i);
        return;
    }
    Panels parts(m, n, 2);
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
    for (int panel = 0; panel < PANELS; ++panel) {
        float *to = parts.part(panel), *other = parts.part(panel, 1);
        for (int64_t i = parts.begin(panel); i < parts.begin(panel + 1); ++i) {
            const X* row = x + i * n;
            const float w = p[i];
            int64_t j = 0;
            for (; j + L <= n; j += L) {
                F q = read(row + j);
                store(to + j, read(to + j) + q * w);
                store(other + j, read(other + j) + q * q);
            }
            for (; j < n; ++j) to[j] += one(row + j) * w, other[j] += one(row + j) * one(row + j);
        }
    }
    parts.add_up(r), parts.add_up(square, 1);
}

// sums of a b and of a^2 along the rows (out [m]) or down the columns (out [n]), in one reading of both
static void inner(const float* a, const float* b, int64_t m, int64_t n, int of_columns, float* product, float* square, int threads) {
    if (!of_columns) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
        for (int64_t i = 0; i < m; ++i) dots(a + i * n, b + i * n, n, product + i, square + i);
        return;
    }
    Panels parts(m, n, 2);
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
    for (int panel = 0; panel < PANELS; ++panel) {
        float *to = parts.part(panel), *other = parts.part(panel, 1);
        for (int64_t i = parts.begin(panel); i < parts.begin(panel + 1); ++i) {
            const float *x = a + i * n, *y = b + i * n;
            int64_t j = 0;
            for (; j + L <= n; j += L) {
                F q = read(x + j);
                store(to + j, read(to + j) + q * read(y + j));
                store(other + j, read(other + j) + q * q);
            }
            for (; j < n; ++j) to[j] += x[j] * y[j], other[j] += x[j] * x[j];
        }
    }
    parts.add_up(product), parts.add_up(square, 1);
}

// ---- Sinkhorn: out = diag(r) X diag(c) with rows, then columns, of unit root mean square, `iterations` times
static inline float inverse(float size, float total) { return total == 0.0f ? total : size / total; }
// The power of two that brings the largest magnitude near 1, so that squares keep their digits and no product rounds; NaN if there is one
// or an infinity: nothing is left of the matrix then.
static float power_of_two(const float* x, int64_t count, int threads) {
    int32_t top = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : top) if (count > LARGE)
    for (int64_t b = 0; b < count; b += 4096) {
        const int64_t end = b + 4096 < count ? b + 4096 : count;
        I found{};
        int64_t i = b;
        for (; i + L <= end; i += L) found = max(found, magnitude(read(x + i)));
        int32_t most = largest(found);
        for (; i < end; ++i) { int32_t a = bits<int32_t>(x[i]) & 0x7FFFFFFF; most = a > most ? a : most; }
        top = most > top ? most : top;
    }
    if (top >= 0x7F800000) return __builtin_nanf("");
    const int32_t exponent = 254 - (top >> 23);
    return bits<float>((exponent > 252 ? 252 : exponent) << 23);
}
static void sinkhorn(const float* x, int64_t m, int64_t n, int iterations, float* out, int threads) {
    const float f = power_of_two(x, m * n, threads);
    std::vector<float> r(m), c(n, 1.0f);
    Panels parts(m, n, 1);
    for (int number = 0; number < iterations; ++number) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
        for (int panel = 0; panel < PANELS; ++panel) {
            float* to = parts.part(panel);
            for (int64_t j = 0; j < n; ++j) to[j] = 0.0f;
            for (int64_t i = parts.begin(panel); i < parts.begin(panel + 1); ++i) {
                const float* row = x + i * n;
                F a{}, b{};
                int64_t j = 0;
                for (; j + 2 * L <= n; j += 2 * L) {
                    F p = read(row + j) * f, q = read(row + j + L) * f;
                    a += p * p * read(c.data() + j), b += q * q * read(c.data() + j + L);
                }
                float total = sum(a + b);
                for (; j < n; ++j) total += row[j] * f * (row[j] * f) * c[j];
                const float s = inverse((float)n, total);
                r[i] = s;
                for (j = 0; j + L <= n; j += L) {
                    F p = read(row + j) * f;
                    store(to + j, read(to + j) + p * p * s);
                }
                for (; j < n; ++j) to[j] += row[j] * f * (row[j] * f) * s;
            }
        }
        parts.add_up(c.data());
        for (int64_t j = 0; j < n; ++j) c[j] = inverse((float)m, c[j]);
    }
    for (int64_t j = 0; j < n; ++j) c[j] = __builtin_sqrtf(c[j]);
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > LARGE)
    for (int64_t i = 0; i < m; ++i) {
        const float s = __builtin_sqrtf(r[i]);
        int64_t j = 0;
        for (; j + L <= n; j += L) store(out + i * n + j, read(x + i * n + j) * f * s * read(c.data() + j));
        for (; j < n; ++j) out[i * n + j] = x[i * n + j] * f * s * c[j];
    }
}

// ---- a[i, j] = a[j, i] for i < j, by tiles through a buffer: lines a power of two apart fall on the same few places of a cache
static void mirror(float* a, int64_t n, int threads) {
    constexpr int64_t T = 16;
    const int64_t full = n / T;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (n * n > LARGE)
    for (int64_t row = 0; row < full; ++row)
        for (int64_t column = 0; column <= row; ++column) {
            float tile[T][T], turned[T][T];
            for (int64_t i = 0; i < T; ++i) memcpy(tile[i], a + (row * T + i) * n + column * T, sizeof tile[i]);
            if (row == column) {
                for (int64_t i = 0; i < T; ++i)
                    for (int64_t j = 0; j < i; ++j) a[(row * T + j) * n + row * T + i] = tile[i][j];
                continue;
            }
            for (int64_t j = 0; j < T; ++j)
                for (int64_t i = 0; i < T; ++i) turned[j][i] = tile[i][j];
            for (int64_t j = 0; j < T; ++j) memcpy(a + (column * T + j) * n + row * T, turned[j], sizeof turned[j]);
        }
    for (int64_t i = full * T; i < n; ++i)
        for (int64_t j = 0; j < i; ++j) a[j * n + i] = a[i * n + j];
}
}  // namespace norms

extern "C" {
void tare_squares(const void* x, int x_bf16, int64_t m, int64_t n, int of_columns, float* out, int threads) {
    if (x_bf16) norms::squares((const bf16*)x, m, n, of_columns, out, threads);
    else norms::squares((const float*)x, m, n, of_columns, out, threads);
}
void tare_project(const void* x, int x_bf16, const float* p, int64_t m, int64_t n, int left, float* r, float* square, int threads) {
    if (x_bf16) norms::project((const bf16*)x, p, m, n, left, r, square, threads);
    else norms::project((const float*)x, p, m, n, left, r, square, threads);
}
void tare_inner(const float* a, const float* b, int64_t m, int64_t n, int of_columns, float* product, float* square, int threads) {
    norms::inner(a, b, m, n, of_columns, product, square, threads);
}
void tare_sinkhorn(const float* x, int64_t m, int64_t n, int iterations, float* out, int threads) {
    norms::sinkhorn(x, m, n, iterations, out, threads);
}
void tare_mirror(float* a, int64_t n, int threads) { norms::mirror(a, n, threads); }
}
