// Activations divided, rotated and rounded, once for all instruction sets; included after integer_rows.h.
namespace {

// Hadamard matrices of powers of two ------------------------------------------------------------------------------

// Sums and differences of numbers H apart within a vector.
template <int H>
HFLI_INLINE Floats within(Floats value) { return fma(value, pattern<H>(), partner<H>(value)); }

// R vectors that lie one behind the other, with each other and within.
template <int R>
HFLI_INLINE void turn(float* v) {
    Floats part[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        Floats value = within<2>(within<1>(load(v + i * LANES)));
        value = within<4>(value);
        part[i] = LANES > 8 ? within<8 < LANES ? 8 : 4>(value) : value;
    }
#pragma GCC unroll 3
    for (int h = 1; h < R; h *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
            if (!(i & h)) {
                const Floats a = part[i], b = part[i + h];
                part[i] = plus(a, b), part[i + h] = minus(a, b);
            }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) store(v + i * LANES, part[i]);
}

// v times Sylvester's matrix of order n, a power of two.
void butterflies(float* v, int64_t n) {
    int64_t h = 1;
    if (n >= LANES) {
        const int64_t vectors = n / LANES < 8 ? n / LANES : 8;
        for (int64_t i = 0; i < n; i += vectors * LANES) {
            if (vectors == 8) turn<8>(v + i);
            else if (vectors == 4) turn<4>(v + i);
            else if (vectors == 2) turn<2>(v + i);
            else turn<1>(v + i);
        }
        h = vectors * LANES;
        for (; h < n; h *= 2)
            for (int64_t i = 0; i < n; i += 2 * h)
                for (int64_t j = i; j < i + h; j += LANES) {
                    const Floats a = load(v + j), b = load(v + j + h);
                    store(v + j, plus(a, b)), store(v + j + h, minus(a, b));
                }
        return;
    }
    for (; h < n; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h)
            for (int64_t j = i; j < i + h; ++j) {
                const float a = v[j], b = v[j + h];
                v[j] = a + b, v[j + h] = a - b;
            }
}

// A block of core rows of `width` numbers times the core; `to` is another block.
HFLI_INLINE void times_core(const float* matrix, int64_t core, int64_t width, const float* from, float* to) {
    for (int64_t i = 0; i < core; ++i, matrix += core) {
        int64_t j = 0;
        for (; j + 4 * LANES <= width; j += 4 * LANES) {
            Floats sum[4];
            for (int k = 0; k < 4; ++k) sum[k] = spread(0.0f);
            for (int64_t c = 0; c < core; ++c) {
                const Floats factor = spread(matrix[c]);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) sum[k] = fma(factor, load(from + c * width + j + k * LANES), sum[k]);
            }
            for (int k = 0; k < 4; ++k) store(to + i * width + j + k * LANES, sum[k]);
        }
        for (; j < width; ++j) {
            float sum = 0.0f;
            for (int64_t c = 0; c < core; ++c) sum += matrix[c] * from[c * width + j];
            to[i * width + j] = sum;
        }
    }
}

// Codes and scales of one token; `buffer` has room for twice the columns, each filled up to a vector. Returns 0 where
// one is not finite.
int round_token(
    const hfli_transform* how, const void* x, int64_t dtype, int64_t at, float* buffer, int8_t* codes, float* scale
) {
    const int64_t n = how->columns, filled = (n + LANES - 1) / LANES * LANES;
    float *values = buffer, *other = buffer + filled;
    to_floats_of(x, dtype, at, n, values);
    memset(values + n, 0, (size_t)(filled - n) * 4);
    if (how->divisor) {
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES) store(values + j, over(load(values + j), load(how->divisor + j)));
        for (; j < n; ++j) values[j] /= how->divisor[j];
    }
    if (how->order > 1) {
        const int64_t width = how->order / how->core;
        for (int64_t j = 0; j < n; j += width) butterflies(values + j, width);
        if (how->core > 1) {
            for (int64_t j = 0; j < n; j += how->order)
                times_core(how->core_matrix, how->core, width, values + j, other + j);
            memset(other + n, 0, (size_t)(filled - n) * 4);
            values = other;
        }
        const Floats norm = spread(1.0f / sqrtf((float)how->order));
        for (int64_t j = 0; j < filled; j += LANES) store(values + j, times(load(values + j), norm));
    }
    const int most = (1 << (how->bits - 1)) - 1;
    int8_t last[LANES];
    for (int64_t j = 0; j < n; j += how->group_size, ++scale) {
        const int64_t end = j + how->group_size < n ? j + how->group_size : n, whole = j + (end - j) / LANES * LANES;
        int32_t largest = largest_bits(values + j, whole - j);
        for (int64_t i = whole; i < end; ++i) {
            int32_t own;
            memcpy(&own, values + i, 4);
            own &= 0x7fffffff;
            largest = own > largest ? own : largest;
        }
        if (largest >= 0x7f800000) return 0;
        float step;
        memcpy(&step, &largest, 4);
        step /= (float)most;
        if (step == 0.0f) step = 1.0f;
        *scale = step;
        const Floats by = spread(step);
        for (int64_t i = j; i < whole; i += LANES) store_codes(codes + i, clamped(to_ints(over(load(values + i), by)), most));
        if (whole < end) {
            store_codes(last, clamped(to_ints(over(load(values + whole), by)), most));
            memcpy(codes + whole, last, (size_t)(end - whole));
        }
    }
    return 1;
}

}  // namespace
