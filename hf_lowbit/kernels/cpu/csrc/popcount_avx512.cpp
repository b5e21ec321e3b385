// AVX-512 with VPOPCNTDQ: Ice Lake, Zen 4 and later.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,f16c,popcnt")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in the compiler's own headers
#include <immintrin.h>
#define HFLB_INLINE inline __attribute__((always_inline))
#include "popcount.h"

namespace {
const int PIXELS_AT_ONCE = 8;
typedef __m512i Lanes;
typedef __m512i Count;
HFLB_INLINE Lanes load(const uint64_t* from) { return _mm512_loadu_si512(from); }
HFLB_INLINE Count none() { return _mm512_setzero_si512(); }
HFLB_INLINE Count differing(Count count, Lanes lanes, uint64_t word) {
    return _mm512_add_epi64(count, _mm512_popcnt_epi64(_mm512_xor_si512(lanes, _mm512_set1_epi64((long long)word))));
}
HFLB_INLINE void dots(Count count, int32_t valid, int32_t* to) {
    const __m256i twice = _mm256_slli_epi32(_mm512_cvtepi64_epi32(count), 1);
    _mm256_storeu_si256((__m256i*)to, _mm256_sub_epi32(_mm256_set1_epi32(valid), twice));
}
}  // namespace

#include "popcount_finish.h"
#include "popcount_rows.h"

namespace {

const int64_t AT_ONCE = 32;

// Sixteen values as float32; those that are not asked for are 0.
HFLB_INLINE __m512 values(const void* x, int64_t dtype, int64_t at, __mmask16 wanted) {
    if (dtype == HFLB_F32) return _mm512_maskz_loadu_ps(wanted, (const float*)x + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(wanted, (const uint16_t*)x + at);
    if (dtype == HFLB_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Signs of one channel at sixteen pixels.
HFLB_INLINE __mmask16 signs(const hflb_pop_signs* job, int64_t at, __mmask16 wanted, int64_t c) {
    __m512 value = values(job->x, job->dtype, at, wanted);
    if (job->gain) {
        value = _mm512_mul_ps(value, _mm512_set1_ps(job->gain[c]));
        __asm__("" : "+v"(value));  // rounded here, as torch does: no fused multiplication and addition
    }
    if (job->bias) value = _mm512_add_ps(value, _mm512_set1_ps(job->bias[c]));
    return _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GE_OQ);
}

// Up to 32 pixels of one image.
void pack_some(const hflb_pop_signs* job, int64_t n, int64_t pixel, int64_t count) {
    const int64_t each = job->channels / job->groups, stride = job->groups * job->words;
    const __mmask16 first = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
    const __mmask16 second = count >= 32 ? 0xffff : count > 16 ? (__mmask16)((1u << (count - 16)) - 1) : 0;
    uint64_t* out = job->out + (n * job->pixels + pixel) * stride;
    for (int64_t i = 0; i < stride; ++i) {
        const int64_t g = i / job->words, begin = g * each + i % job->words * 64;
        const int64_t end = begin + 64 < (g + 1) * each ? begin + 64 : (g + 1) * each;
        __m512i word[4] = {none(), none(), none(), none()};
        for (int64_t c = begin; c < end; ++c) {
            const int64_t at = (n * job->channels + c) * job->pixels + pixel;
            const __m512i bit = _mm512_set1_epi64((long long)((uint64_t)1 << (c - begin)));
            const __mmask16 low = signs(job, at, first, c);
            word[0] = _mm512_mask_or_epi64(word[0], (__mmask8)low, word[0], bit);
            word[1] = _mm512_mask_or_epi64(word[1], (__mmask8)(low >> 8), word[1], bit);
            if (second) {
                const __mmask16 high = signs(job, at + 16, second, c);
                word[2] = _mm512_mask_or_epi64(word[2], (__mmask8)high, word[2], bit);
                word[3] = _mm512_mask_or_epi64(word[3], (__mmask8)(high >> 8), word[3], bit);
            }
        }
        uint64_t found[AT_ONCE];
        for (int v = 0; v < 4; ++v) _mm512_storeu_si512(found + 8 * v, word[v]);
        for (int64_t p = 0; p < count; ++p) out[p * stride + i] = found[p];
    }
}

void pack_pixels(const hflb_pop_signs* job, int64_t from, int64_t to) {
    while (from < to) {
        const int64_t pixel = from % job->pixels, left = job->pixels - pixel;
        int64_t count = left < AT_ONCE ? left : AT_ONCE;
        if (count > to - from) count = to - from;
        pack_some(job, from / job->pixels, pixel, count);
        from += count;
    }
}

}  // namespace

extern "C" const hflb_pop_kernels hflb_pop_avx512 = {pack_pixels, conv_rows};
#else
#include "popcount.h"
extern "C" const hflb_pop_kernels hflb_pop_avx512 = {0, 0};
#endif
