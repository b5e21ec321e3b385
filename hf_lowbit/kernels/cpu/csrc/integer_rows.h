// The product with packed codes, once for all instruction sets. The including file has defined, for its vectors of
// LANES numbers of 32 bits: Floats, Ints, Bytes and the functions used below; it includes this inside its target.
#include <string.h>

#include "integer.h"

namespace {

const int BYTES = 4 * LANES;
const int PAD = 64;  // zeros behind each table of groups, which vectors may read

template <int BITS>
struct Form {
    static const int V = BITS == 3 ? 1 : 8 / BITS;  // parts of a block
    static const int LANE = 4 * V;                  // columns of a lane
    static const int COLUMNS = LANES * LANE;        // of a block
    static const int PACKED = BITS == 3 ? 12 * LANES / 8 : BYTES;  // bytes of a block
};

// Codes and scales of a row ----------------------------------------------------------------------------------------

// All codes of a row in the order of its columns; up to AT_ONCE_BYTES - 1 more bytes are written.
template <int BITS>
HFLI_INLINE void unpack_row(const uint8_t* from, int64_t columns, uint8_t* to) {
    int64_t j = 0;
    for (; j + AT_ONCE_BYTES <= columns; j += AT_ONCE_BYTES, from += AT_ONCE_BYTES / 8 * BITS) many<BITS>(from, to + j);
    if (j < columns) last_ones<BITS>(from, ((columns - j) * BITS + 7) / 8, to + j);
}

void unpack(int64_t bits, const uint8_t* from, int64_t columns, uint8_t* to) {
    if (bits == 2) unpack_row<2>(from, columns, to);
    else if (bits == 3) unpack_row<3>(from, columns, to);
    else if (bits == 4) unpack_row<4>(from, columns, to);
    else memcpy(to, from, (size_t)columns);
}

// Numbers of a dtype as floats; `filled`: a whole vector may be written at the end.
HFLI_INLINE void to_floats_of(const void* from, int64_t dtype, int64_t at, int64_t count, float* to, bool filled = false) {
    int64_t j = 0;
    if (dtype == HFLB_F32) {
        memcpy(to, (const float*)from + at, (size_t)count * 4);
        return;
    }
    const uint16_t* halves = (const uint16_t*)from + at;
    if (dtype == HFLB_F16 && filled) {
        for (; j + LANES <= count; j += LANES) store(to + j, from_halves(halves + j));
        if (j < count) store(to + j, some_halves(halves + j, count - j));
        return;
    }
    if (dtype == HFLB_F16) for (; j + LANES <= count; j += LANES) store(to + j, from_halves(halves + j));
    else for (; j + LANES <= count; j += LANES) store(to + j, from_brains(halves + j));
    for (; j < count; ++j) to[j] = hflb_value(from, dtype, at + j);
}

// Scales of a row, and what is to be taken from its product for each group's sum of activations, scale times
// (zero - middle of the range); `bytes` holds codes of the zero points.
HFLI_INLINE void load_groups(const hfli_weight* w, int64_t row, float* scale, float* less, uint8_t* bytes) {
    to_floats_of(w->scale, w->scale_dtype, row * w->groups, w->groups, scale, true);
    for (int64_t g = w->groups; g < w->groups + LANES; ++g) scale[g] = 0.0f;
    if (!w->zero) return;
    const Floats middle = spread((float)(1 << (w->bits - 1)));
    unpack(w->bits, w->zero + row * w->zero_bytes, w->groups, bytes);
    for (int64_t g = 0; g < w->groups; g += LANES) store(less + g, times(load(scale + g), minus(from_bytes(bytes + g), middle)));
}

// Dense rows -------------------------------------------------------------------------------------------------------

template <int DTYPE>
HFLI_INLINE void expand_row(const hfli_weight* w, int64_t row, void* out, int64_t at, float* buffer) {
    const int64_t table = w->groups + PAD, n = w->columns;
    float *scale = buffer, *zero = buffer + table;
    uint8_t *zeros = (uint8_t*)(zero + table), *codes = zeros + 4 * table;
    to_floats_of(w->scale, w->scale_dtype, row * w->groups, w->groups, scale);
    if (w->zero) unpack(w->bits, w->zero + row * w->zero_bytes, w->groups, zeros);
    for (int64_t g = 0; g < w->groups; ++g) zero[g] = w->zero ? (float)zeros[g] : (float)(1 << (w->bits - 1));
    unpack(w->bits, w->codes + row * w->row_bytes, n, codes);
    int64_t g = 0, end = w->group_size;  // of the group that the column is in
    for (int64_t j = 0; j < n; j += LANES) {
        Floats s, z;
        if (j >= end) ++g, end += w->group_size;
        if (end >= j + LANES || end >= n) {
            s = spread(scale[g]), z = spread(zero[g]);
        } else {  // a group ends among these columns
            float some[LANES], less[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                if (j + i >= end && j + i < n) ++g, end += w->group_size;
                some[i] = scale[g], less[i] = zero[g];
            }
            s = load(some), z = load(less);
        }
        const Floats value = times(minus(from_bytes(codes + j), z), s);
        if (j + LANES <= n) {
            store_as<DTYPE>(out, at + j, value);
        } else {
            float some[LANES];
            store(some, value);
            hflb_store(out, DTYPE, at + j, some, n - j);
        }
    }
}

#ifdef HFLI_WIDE
// The same for halves of at most 4 bits and groups of 32 columns: the values of a group's codes are looked up.
template <int BITS, int DTYPE>
HFLI_INLINE void look_up_row(const hfli_weight* w, int64_t row, uint16_t* out, float* buffer) {
    const int64_t table = w->groups + PAD, n = w->columns;
    float* scale = buffer;
    uint8_t* zeros = (uint8_t*)(buffer + 2 * table);
    to_floats_of(w->scale, w->scale_dtype, row * w->groups, w->groups, scale);
    if (w->zero) unpack(w->bits, w->zero + row * w->zero_bytes, w->groups, zeros);
    const Floats codes = to_floats(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const uint8_t* from = w->codes + row * w->row_bytes;
    for (int64_t g = 0, j = 0; g < w->groups; ++g) {
        const int64_t end = j + w->group_size < n ? j + w->group_size : n;
        const float zero = w->zero ? (float)zeros[g] : (float)(1 << (BITS - 1));
        uint16_t values[32];
        store_as<DTYPE>(values, 0, times(minus(codes, spread(zero)), spread(scale[g])));
        const __m512i found = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
        for (; j < end; j += 32, from += 4 * BITS) {
            uint8_t last[32] = {0};
            const uint8_t* source = from;
            if (n - j < 64) {  // 64 codes would be read
                memcpy(last, from, (size_t)((n - j < 32 ? (n - j) * BITS + 7 : 32 * BITS) / 8)), source = last;
            }
            const __m512i at = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(many_codes<BITS>(source)));
            const __m512i value = _mm512_permutexvar_epi16(at, found);
            if (end - j >= 32) _mm512_storeu_si512(out + j, value);
            else _mm512_mask_storeu_epi16(out + j, (__mmask32)((1u << (end - j)) - 1), value);
        }
        j = end;
    }
}

// Whether it was done.
template <int DTYPE>
HFLI_INLINE bool looked_up(const hfli_weight* w, int64_t row, uint16_t* out, float* buffer) {
    if (w->groups > 1 && w->group_size % 32) return false;
    if (w->bits == 2) look_up_row<2, DTYPE>(w, row, out, buffer);
    else if (w->bits == 3) look_up_row<3, DTYPE>(w, row, out, buffer);
    else if (w->bits == 4) look_up_row<4, DTYPE>(w, row, out, buffer);
    else return false;
    return true;
}
#else
template <int DTYPE>
inline bool looked_up(const hfli_weight*, int64_t, uint16_t*, float*) { return false; }
#endif

// Rows from `begin` to `end` of the dense weight, [end - begin][columns].
void expand(const hfli_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, float* buffer) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = (row - begin) * w->columns;
        uint16_t* halves = (uint16_t*)out + at;
        if (dtype == HFLB_F16 ? looked_up<HFLB_F16>(w, row, halves, buffer)
                              : dtype == HFLB_BF16 && looked_up<HFLB_BF16>(w, row, halves, buffer))
            continue;
        if (dtype == HFLB_F32) expand_row<HFLB_F32>(w, row, out, at, buffer);
        else if (dtype == HFLB_F16) expand_row<HFLB_F16>(w, row, out, at, buffer);
        else expand_row<HFLB_BF16>(w, row, out, at, buffer);
    }
}

// Activations ------------------------------------------------------------------------------------------------------

// Integers of `digits` bytes with a scale for HFLI_SHARED columns; `values` is filled up with zeros to a multiple of it.
// Returns 0 where one is not finite.
int integers(const void* x, int64_t dtype, int64_t at, int64_t columns, int64_t digits, int32_t* values, float* scale) {
    // 127 in every digit is 32639 and 8355711; a little less, since what follows is rounded
    const float largest_value = digits == 1 ? 127.0f : digits == 2 ? 32639.0f : 8355000.0f;
    float some[HFLI_SHARED];
    for (int64_t j = 0; j < columns; j += HFLI_SHARED) {
        const int64_t count = columns - j < HFLI_SHARED ? columns - j : HFLI_SHARED;
        to_floats_of(x, dtype, at + j, count, some);
        memset(some + count, 0, (size_t)(HFLI_SHARED - count) * 4);
        const int32_t most = largest_bits(some, HFLI_SHARED);
        if (most >= 0x7f800000) return 0;
        float amount;
        memcpy(&amount, &most, 4);
        const int tiny = amount < 1e-30f;  // what it is multiplied by would not be finite
        scale[j / HFLI_SHARED] = tiny ? 0.0f : amount / largest_value;
        const Floats times_this = spread(tiny ? 0.0f : largest_value / amount);
        for (int64_t i = 0; i < HFLI_SHARED; i += LANES) store(values + j + i, to_ints(times(load(some + i), times_this)));
    }
    return 1;
}

// Integers in the order in which the kernel reads them. `values` has zeros behind the last column, up to the end of its
// block; `scale` is that of `shared` columns. What is no column has scale 0.
template <int BITS>
void arrange_as(
    const hfli_weight* w, const int32_t* values, const float* scale, int64_t shared, int64_t digits, const hfli_token* to
) {
    typedef Form<BITS> F;
    const int64_t blocks = (w->columns + F::COLUMNS - 1) / F::COLUMNS;
    if (w->zero) memset(to->sum, 0, (size_t)w->groups * 4);
    int8_t* out = to->digits;
    for (int64_t b = 0; b < blocks; ++b) {
        const int32_t* from = values + b * F::COLUMNS;
        int8_t plane[3][F::COLUMNS];
        for (int64_t i = 0; i < F::COLUMNS; ++i) {
            int32_t value = from[i];
            for (int d = 2; d >= 0; --d) {
                plane[d][i] = (int8_t)value;
                value = (value - plane[d][i]) >> 8;  // exact
            }
        }
        for (int64_t d = 3 - digits; d < 3; ++d)
            for (int k = 0; k < F::V; ++k, out += BYTES)
                for (int i = 0; i < BYTES; ++i) out[i] = plane[d][F::V * i + k];
        for (int64_t l = 0; l < LANES; ++l) {
            const int64_t column = b * F::COLUMNS + l * F::LANE, at = b * LANES + l;
            int32_t sum = 0, low = 0;
            for (int i = 0; i < F::LANE; ++i) sum += from[l * F::LANE + i], low += plane[2][l * F::LANE + i];
            const int32_t middle = 1 << (BITS - 1);
            if (digits == 3) {
                to->start[2 * b * LANES + l] = -middle * ((sum - low) >> 8);
                to->start[(2 * b + 1) * LANES + l] = -middle * low;
            } else {
                to->start[at] = -middle * sum;
            }
            const int inside = column < w->columns;
            to->scale[at] = inside ? scale[column / shared] : 0.0f;
            if (inside && w->zero) to->sum[column / w->group_size] += to->scale[at] * (float)sum;
        }
    }
}

void arrange(const hfli_weight* w, const int32_t* values, const float* scale, int64_t shared, int64_t digits, const hfli_token* to) {
    if (w->bits == 2) arrange_as<2>(w, values, scale, shared, digits, to);
    else if (w->bits == 3) arrange_as<3>(w, values, scale, shared, digits, to);
    else if (w->bits == 4) arrange_as<4>(w, values, scale, shared, digits, to);
    else arrange_as<8>(w, values, scale, shared, digits, to);
}

// Products ---------------------------------------------------------------------------------------------------------

// R rows with T tokens. The sums of a lane are exact; each is brought into a float sum with the scales of both sides.
template <int BITS, int D, int R, int T>
void some_rows(const hfli_work* work, int64_t row0, int64_t token0, const float* tables) {
    typedef Form<BITS> F;
    const hfli_weight* w = work->weight;
    const hfli_token* tokens = work->tokens + token0;
    const int64_t blocks = (w->columns + F::COLUMNS - 1) / F::COLUMNS, table = 2 * (w->groups + PAD);
    const bool wide = w->groups == 1 || w->group_size % F::COLUMNS == 0, even = F::COLUMNS % w->group_size == 0;
    const int64_t per_block = even ? F::COLUMNS / w->group_size : 0;
    const Ints first = load(work->lane_group);
    Floats sums[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sums[r][t] = spread(0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
        Bytes codes[R][F::V];
        Floats scale[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* from = w->codes + (row0 + r) * w->row_bytes + b * F::PACKED;
            const int64_t left = w->row_bytes - b * F::PACKED;
            if (left >= BYTES) take_apart<BITS>(load_bytes(from), codes[r]);
            else take_apart<BITS>(load_some(from, left < F::PACKED ? left : F::PACKED), codes[r]);
            const float* own = tables + r * table;
            const int32_t* groups = work->lane_group + b * LANES;
            scale[r] = wide ? spread(own[groups[0]]) : even ? permuted(own + b * per_block, first) : look_up(own, load(groups));
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const int8_t* digits = tokens[t].digits + b * D * F::V * BYTES;
            const Floats lane = load(tokens[t].scale + b * LANES);
            Ints part[R][3];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                part[r][0] = D == 1 ? load(tokens[t].start + b * LANES) : none();
                part[r][1] = load(tokens[t].start + (D == 3 ? 2 * b : b) * LANES);
                if (D == 3) part[r][2] = load(tokens[t].start + (2 * b + 1) * LANES);
            }
#pragma GCC unroll 3
            for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
                for (int k = 0; k < F::V; ++k) {
                    const Bytes x = load_bytes(digits + (d * F::V + k) * BYTES);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) part[r][d] = add_dot<BITS>(part[r][d], codes[r][k], x);
                }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                Floats value;
                if (D == 1) value = to_floats(part[r][0]);
                else value = to_floats(plus(shift_up(part[r][0]), part[r][1]));
                if (D == 3) value = fma(value, spread(256.0f), to_floats(part[r][2]));
                sums[r][t] = fma(value, times(scale[r], lane), sums[r][t]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            float value = total(sums[r][t]);
            if (w->zero) value -= dot_of(tables + r * table + w->groups + PAD, tokens[t].sum, w->groups);
            if (work->bias) value += hflb_value(work->bias, work->dtype, row0 + r);
            hflb_store(work->y, work->dtype, (token0 + t) * w->rows + row0 + r, &value, 1);
        }
}

template <int BITS, int D, int R>
HFLI_INLINE void all_tokens(const hfli_work* work, int64_t row, const float* tables) {
    int64_t t = 0;
    for (; t + 4 <= work->count; t += 4) some_rows<BITS, D, R, 4>(work, row, t, tables);
    if (t + 2 <= work->count) some_rows<BITS, D, R, 2>(work, row, t, tables), t += 2;
    if (t < work->count) some_rows<BITS, D, R, 1>(work, row, t, tables);
}

const int MOST_ROWS = 2;  // at once

template <int BITS, int D>
void rows_as(const hfli_work* work, int64_t row0, int64_t end, float* buffer) {
    const hfli_weight* w = work->weight;
    const int64_t table = w->groups + PAD;
    uint8_t* bytes = (uint8_t*)(buffer + 2 * MOST_ROWS * table);
    for (int64_t row = row0; row < end; row += MOST_ROWS) {
        const int64_t rows = end - row < MOST_ROWS ? end - row : MOST_ROWS;
        for (int64_t r = 0; r < rows; ++r) {
            float* scale = buffer + 2 * r * table;
            load_groups(w, row + r, scale, scale + table, bytes);
        }
        if (rows == MOST_ROWS) all_tokens<BITS, D, MOST_ROWS>(work, row, buffer);
        else all_tokens<BITS, D, 1>(work, row, buffer);
    }
}

template <int BITS>
void rows_of(const hfli_work* work, int64_t row0, int64_t end, float* buffer) {
    if (work->digits == 1) rows_as<BITS, 1>(work, row0, end, buffer);
    else if (work->digits == 2) rows_as<BITS, 2>(work, row0, end, buffer);
    else rows_as<BITS, 3>(work, row0, end, buffer);
}

// Rows from `row0` to `end` with all tokens. `buffer` has hfli_row_floats.
void rows(const hfli_work* work, int64_t row0, int64_t end, float* buffer) {
    if (work->weight->bits == 2) rows_of<2>(work, row0, end, buffer);
    else if (work->weight->bits == 3) rows_of<3>(work, row0, end, buffer);
    else if (work->weight->bits == 4) rows_of<4>(work, row0, end, buffer);
    else rows_of<8>(work, row0, end, buffer);
}

}  // namespace
