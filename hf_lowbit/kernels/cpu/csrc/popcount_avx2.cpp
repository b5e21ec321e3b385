// AVX2, on every x86 processor since 2013 or so: bits are counted by tables of half bytes.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,popcnt")
#include <immintrin.h>
#define HFLB_INLINE inline __attribute__((always_inline))
#include "popcount.h"

namespace {
const int PIXELS_AT_ONCE = 4;  // eight would not stay in registers
struct Lanes { __m256i a, b; };
typedef Lanes Count;
HFLB_INLINE Lanes load(const uint64_t* from) {
    return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 4))};
}
HFLB_INLINE Count none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HFLB_INLINE __m256i ones(__m256i word) {
    const __m256i table = _mm256_setr_epi8(
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4
    );
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(word, low));
    const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(word, 4), low));
    return _mm256_sad_epu8(_mm256_add_epi8(first, second), _mm256_setzero_si256());
}
HFLB_INLINE Count differing(Count count, Lanes lanes, uint64_t word) {
    const __m256i all = _mm256_set1_epi64x((long long)word);
    return {
        _mm256_add_epi64(count.a, ones(_mm256_xor_si256(lanes.a, all))),
        _mm256_add_epi64(count.b, ones(_mm256_xor_si256(lanes.b, all)))
    };
}
HFLB_INLINE void dots(Count count, int32_t valid, int32_t* to) {
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256i a = _mm256_permutevar8x32_epi32(count.a, even), b = _mm256_permutevar8x32_epi32(count.b, even);
    const __m256i twice = _mm256_slli_epi32(_mm256_blend_epi32(a, b, 0xf0), 1);
    _mm256_storeu_si256((__m256i*)to, _mm256_sub_epi32(_mm256_set1_epi32(valid), twice));
}
}  // namespace

#include "popcount_finish.h"
#include "popcount_rows.h"

namespace {

HFLB_INLINE __m256 values(const void* x, int64_t dtype, int64_t at) {
    if (dtype == HFLB_F32) return _mm256_loadu_ps((const float*)x + at);
    const __m128i halves = _mm_loadu_si128((const __m128i*)((const uint16_t*)x + at));
    if (dtype == HFLB_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// Eight pixels of one image.
void pack_eight(const hflb_pop_signs* job, int64_t n, int64_t pixel) {
    const int64_t each = job->channels / job->groups, stride = job->groups * job->words;
    uint64_t* out = job->out + (n * job->pixels + pixel) * stride;
    for (int64_t i = 0; i < stride; ++i) {
        const int64_t g = i / job->words, begin = g * each + i % job->words * 64;
        const int64_t end = begin + 64 < (g + 1) * each ? begin + 64 : (g + 1) * each;
        __m256i low = _mm256_setzero_si256(), high = low;
        for (int64_t c = begin; c < end; ++c) {
            __m256 value = values(job->x, job->dtype, (n * job->channels + c) * job->pixels + pixel);
            if (job->gain) {
                value = _mm256_mul_ps(value, _mm256_set1_ps(job->gain[c]));
                __asm__("" : "+x"(value));  // rounded here, as torch does: no fused multiplication and addition
            }
            if (job->bias) value = _mm256_add_ps(value, _mm256_set1_ps(job->bias[c]));
            const __m256i sign = _mm256_castps_si256(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GE_OQ));
            const __m256i bit = _mm256_set1_epi64x((long long)((uint64_t)1 << (c - begin)));
            low = _mm256_or_si256(low, _mm256_and_si256(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(sign)), bit));
            high = _mm256_or_si256(high, _mm256_and_si256(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(sign, 1)), bit));
        }
        uint64_t found[8];
        _mm256_storeu_si256((__m256i*)found, low);
        _mm256_storeu_si256((__m256i*)(found + 4), high);
        for (int64_t p = 0; p < 8; ++p) out[p * stride + i] = found[p];
    }
}

void pack_pixels(const hflb_pop_signs* job, int64_t from, int64_t to) {
    while (from < to) {
        const int64_t n = from / job->pixels, pixel = from % job->pixels, left = job->pixels - pixel;
        if (left >= 8 && to - from >= 8) {
            pack_eight(job, n, pixel);
            from += 8;
        } else {
            pack_one(job, n, pixel);
            ++from;
        }
    }
}

}  // namespace

extern "C" const hflb_pop_kernels hflb_pop_avx2 = {pack_pixels, conv_rows};
#else
#include "popcount.h"
extern "C" const hflb_pop_kernels hflb_pop_avx2 = {0, 0};
#endif
