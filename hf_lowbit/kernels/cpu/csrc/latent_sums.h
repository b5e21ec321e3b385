// Scores become weights, latents of values are summed by them and expanded. The including file brings `multiply`.
#pragma once
#include <math.h>

#include "latent_rows.h"

namespace {

// Weights -------------------------------------------------------------------------------------------------------------

// NaN stays NaN, minus infinity becomes 0. Relative error below 3e-7 (a polynomial of degree 6 on half an octave around 0).
HFLB_INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(spread(-200.0f), x);  // the second where one is NaN
    const __m512 n = _mm512_roundscale_ps(times(x, spread(1.44269504f)), 0);
    __m512 f = _mm512_fnmadd_ps(n, spread(0.693145752f), x);
    f = _mm512_fnmadd_ps(n, spread(1.42860677e-6f), f);
    __m512 y = spread(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, f, spread(c));
    return _mm512_scalef_ps(y, n);
}

inline float exponential(float x) { return _mm512_cvtss_f32(exponential(spread(x))); }

// Multiply the sums of one query.
void rescale(const Group& group, int64_t row, float factor, float* sums) {
    const int64_t blocks = group.rows / 16;
    float* own = sums + group.sums + row / 16 * 512 + row % 16 * 16;
    for (int64_t strip = 0; strip < group.width / 32; ++strip)
        for (int half = 0; half < 2; ++half) {
            float* at = own + strip * blocks * 512 + half * 256;
            store(at, times(load(at), spread(factor)));
        }
}

// Scores of a query become weights, which are rounded to bfloat16 for the sums and not for their total.
void weigh(const Plan& p, const Group& group, int64_t b, int64_t h, int64_t token, int64_t count, Part* part, Scratch* s) {
    const hflb_attention* a = p.a;
    float* scores = s->scores + h * CHUNK;
    uint16_t* weights = s->weights + p.value_row[(size_t)h] * CHUNK;
    const float* mask = a->mask ? a->mask + b * a->mask_batch + h * a->mask_head + token : nullptr;
    const __m512 none = spread(-INFINITY);
    __m512 top = none;
    __mmask16 broken = 0;
    for (int64_t i = 0; i < up_to(count, 32); i += 16) {
        const __mmask16 some = (__mmask16)(count - i >= 16 ? 0xffff : count > i ? (1 << (count - i)) - 1 : 0);
        __m512 own = load(scores + i);
        if (mask) own = plus(own, _mm512_maskz_loadu_ps(some, mask + i));
        own = _mm512_mask_blend_ps(some, none, own);
        store(scores + i, own);
        top = _mm512_max_ps(own, top);  // the second where one is NaN
        broken |= _mm512_cmp_ps_mask(own, own, _CMP_UNORD_Q);
    }
    const float before = part->largest[h], found = _mm512_reduce_max_ps(top), now = found > before ? found : before;
    if (broken) part->total[h] = NAN;
    if (now == -INFINITY || broken) {
        memset(weights, 0, (size_t)up_to(count, 32) * 2);
        return;
    }
    if (now > before) {
        const float factor = exponential(before - now);
        part->total[h] *= factor;
        if (before != -INFINITY) rescale(group, p.value_row[(size_t)h] - group.row, factor, part->sums);
        part->largest[h] = now;
    }
    __m512 total = spread(0.0f);
    for (int64_t i = 0; i < up_to(count, 32); i += 16) {
        const __m512 weight = exponential(_mm512_sub_ps(load(scores + i), spread(now)));
        total = plus(total, weight);
        store_as<HFLB_BF16>(weights, i, weight);
    }
    part->total[h] += _mm512_reduce_add_ps(total);
}

// Values --------------------------------------------------------------------------------------------------------------

// Some tokens of a group as tiles [strip of 32 columns][step][2][pair of tokens][column]; columns 8q to 8q + 3 of a strip
// go to its first tile. Rows are read one after the other, as they lie.
void tile_values(const uint8_t* rows, int64_t stride, int64_t rank, int64_t count, uint8_t* to) {
    const int64_t steps = up_to(count, 32) / 32;
    for (int64_t t = 0; t < 32 * steps; t += 2) {
        const uint8_t* first = rows + (t < count ? t : count - 1) * stride;
        const uint8_t* second = rows + (t + 1 < count ? t + 1 : count - 1) * stride;
        uint8_t* at = to + t / 32 * STEP_BYTES + t % 32 / 2 * 64;
        for (int64_t column = 0; column < rank; column += 32, at += steps * STEP_BYTES) {
            const __mmask32 some = rank - column < 32 ? (__mmask32)((1u << (rank - column)) - 1) : 0xffffffffu;
            const __m512i a = _mm512_maskz_loadu_epi16(some, first + 2 * column), b = _mm512_maskz_loadu_epi16(some, second + 2 * column);
            _mm512_storeu_si512(at, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(at + 1024, _mm512_unpackhi_epi16(a, b));
        }
    }
}

void mix(const Plan& p, int64_t b, int64_t token, int64_t count, Part* part, Scratch* s) {
    const hflb_attention* a = p.a;
    const uint8_t* rows = (const uint8_t*)a->values.rows + b * a->values.batch_stride + token * a->values.token_stride;
    for (const Group& group : p.values) {
        const uint8_t* own = rows + 2 * group.start;
        int64_t stride = a->values.token_stride;
        if (a->bits) {
            stage(p.values, group, rows, stride, count, a->bits, s->staged);
            own = (const uint8_t*)s->staged, stride = 2 * group.width;
        }
        const int64_t blocks = group.rows / 16, at_once = tokens_at_once(group.width);
        for (int64_t i = 0; i < count; i += at_once) {
            const int64_t some = count - i < at_once ? count - i : at_once, steps = up_to(some, 32) / 32;
            tile_values(own + i * stride, stride, group.rank, some, s->tiles);
            const uint16_t* weights = s->weights + group.row * CHUNK + i;
            for (int64_t strip = 0; strip < group.width / 32; ++strip) {
                float* sums = part->sums + group.sums + strip * blocks * 512;
                const uint8_t* tiles = s->tiles + strip * steps * STEP_BYTES;
                int64_t r = 0;
                for (; r + 1 < blocks; r += 2)
                    multiply<true>(weights + 16 * r * CHUNK, weights + 16 * (r + 1) * CHUNK, CHUNK, tiles, steps, false, sums + r * 512);
                if (r < blocks) multiply<false>(weights + 16 * r * CHUNK, nullptr, CHUNK, tiles, steps, false, sums + r * 512);
            }
        }
    }
}

// Results -------------------------------------------------------------------------------------------------------------

// The parts of one row and query become one latent [group.width], and the logarithm of the sum.
void merge(const Plan& p, const Group& group, int64_t h, const Part* parts, int64_t count, float* to, float* lse) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (parts[i].largest[h] > largest) largest = parts[i].largest[h];
    const int64_t blocks = group.rows / 16, row = p.value_row[(size_t)h] - group.row;
    memset(to, 0, (size_t)group.width * 4);
    for (int64_t i = 0; i < count; ++i) {
        if (isnan(parts[i].total[h])) total = NAN;
        if (parts[i].largest[h] == -INFINITY) continue;
        const float share = exponential(parts[i].largest[h] - largest);
        total += share * parts[i].total[h];
        const float* own = parts[i].sums + group.sums + row / 16 * 512 + row % 16 * 16;
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int64_t strip = 0; strip < group.width / 32; ++strip) {
            const __m512 a = load(own + strip * blocks * 512), b = load(own + strip * blocks * 512 + 256);
            float* at = to + 32 * strip;
            store(at, fma(_mm512_permutex2var_ps(a, low, b), spread(share), load(at)));
            store(at + 16, fma(_mm512_permutex2var_ps(a, high, b), spread(share), load(at + 16)));
        }
    }
    *lse = largest + logf(total);
    const __m512 inverse = spread(total == 0 ? 0 : 1 / total);
    for (int64_t j = 0; j < group.width; j += 16) store(to + j, times(load(to + j), inverse));
}

// R rows of the values' factor, bfloat16, by Y latents.
template <int R, int Y>
void expand_some(const uint16_t* up, int64_t row, const float* const* latents, int64_t rank, float* to) {
    __m512 sums[R][Y];
    for (int r = 0; r < R; ++r)
        for (int y = 0; y < Y; ++y) sums[r][y] = spread(0.0f);
    for (int64_t j = 0; j < rank; j += 16) {
        const __mmask16 some = (__mmask16)(rank - j < 16 ? (1 << (rank - j)) - 1 : 0xffff);
        __m512 own[Y];
        for (int y = 0; y < Y; ++y) own[y] = load(latents[y] + j);
        for (int r = 0; r < R; ++r) {
            const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, up + r * row + j));
            const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
            for (int y = 0; y < Y; ++y) sums[r][y] = fma(wide, own[y], sums[r][y]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int y = 0; y < Y; ++y) to[r * Y + y] = _mm512_reduce_add_ps(sums[r][y]);
}

// Rows of the values' factor for one key head meet the latents of its queries in all rows of the batch.
void expand(const Plan& p, const Group& group, int64_t head, const float* latents, int64_t stride) {
    const hflb_attention* a = p.a;
    const int64_t count = a->batch * p.rep;
    for (int64_t i = 0; i < a->head_dim;) {
        const int64_t rows = a->head_dim - i >= 4 ? 4 : 1;
        const uint16_t* up = a->values.up + head * a->values.up_head + i * a->values.up_row;
        for (int64_t n = 0; n < count;) {
            const int64_t some = count - n >= 4 ? 4 : 1;
            const float* own[4];
            float found[16];
            for (int64_t k = 0; k < some; ++k) own[k] = latents + ((n + k) / p.rep * a->heads + head * p.rep + (n + k) % p.rep) * stride;
            const auto by = rows == 4 ? some == 4 ? expand_some<4, 4> : expand_some<4, 1> : some == 4 ? expand_some<1, 4> : expand_some<1, 1>;
            by(up, a->values.up_row, own, group.rank, found);
            for (int64_t k = 0; k < some; ++k)
                for (int64_t r = 0; r < rows; ++r) {
                    const int64_t h = (n + k) / p.rep * a->heads + head * p.rep + (n + k) % p.rep;
                    const float bias = a->values.bias ? a->values.bias[head * a->head_dim + i + r] : 0;
                    a->out[h * a->head_dim + i + r] = hflb_float_to_brain(found[r * some + k] + bias);
                }
            n += some;
        }
        i += rows;
    }
}

}  // namespace
