// Eight dots of eight pixels become results of eight outputs, with the vectors of AVX2. The including file sets the target.
#pragma once
#include "popcount.h"

namespace {

void finish(const Results*, const int32_t*, int64_t, int64_t, int64_t);

HFLB_INLINE void transpose(const int32_t* tile, __m256* out) {
    __m256 row[8], half[8], pair[8];
    for (int i = 0; i < 8; ++i) row[i] = _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)(tile + 8 * i)));
    for (int i = 0; i < 4; ++i) {
        half[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        half[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        pair[4 * i] = _mm256_shuffle_ps(half[4 * i], half[4 * i + 2], 0x44);
        pair[4 * i + 1] = _mm256_shuffle_ps(half[4 * i], half[4 * i + 2], 0xee);
        pair[4 * i + 2] = _mm256_shuffle_ps(half[4 * i + 1], half[4 * i + 3], 0x44);
        pair[4 * i + 3] = _mm256_shuffle_ps(half[4 * i + 1], half[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm256_permute2f128_ps(pair[i], pair[i + 4], 0x20);
        out[i + 4] = _mm256_permute2f128_ps(pair[i], pair[i + 4], 0x31);
    }
}

}  // namespace

#include "popcount_rows.h"

namespace {

void finish(const Results* to, const int32_t* tile, int64_t place, int64_t apart, int64_t pixels) {
    if (apart != 1 || pixels != 8) return finish_slowly(to, tile, place, apart, pixels);
    __m256 dot[8];
    transpose(tile, dot);
    const hflb_pop_conv* job = to->job;
    const int64_t all = job->outs;
    for (int64_t l = 0; l < to->outs; ++l) {
        float* own = (float*)job->y + to->first + l * to->area + place;
        if (!job->affine) {
            _mm256_storeu_ps(own, dot[l]);  // the bits of int32
            continue;
        }
        const float *scale = job->affine + to->channel + l, *act = job->act + to->channel + l;
        __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(dot[l])), _mm256_broadcast_ss(scale));
        __asm__("" : "+x"(value));  // rounded here, as torch does
        value = _mm256_add_ps(value, _mm256_broadcast_ss(scale + all));
        if (job->act) {
            value = _mm256_add_ps(value, _mm256_broadcast_ss(act + all));
            const __m256 sloped = _mm256_mul_ps(value, _mm256_broadcast_ss(act));
            value = _mm256_blendv_ps(value, sloped, _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_LT_OQ));
            value = _mm256_add_ps(value, _mm256_broadcast_ss(act + 2 * all));
        }
        _mm256_storeu_ps(own, value);
    }
}

}  // namespace
