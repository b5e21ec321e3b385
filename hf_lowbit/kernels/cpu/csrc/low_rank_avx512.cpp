// AVX-512: Skylake servers, Zen 4 and later.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in the compiler's own headers
#include <immintrin.h>

#include "low_rank.h"

// Vectors must stay in registers from one function to the next, so the compiler is left no choice.
#define HFLB_INLINE inline __attribute__((always_inline))

namespace {

typedef __m512 Floats;
const int AT_ONCE = 4;

HFLB_INLINE Floats zero() { return _mm512_setzero_ps(); }
HFLB_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
HFLB_INLINE float sum(Floats value) { return _mm512_reduce_add_ps(value); }
HFLB_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
HFLB_INLINE void fetch(const char* at) { _mm_prefetch(at, _MM_HINT_T0); }
HFLB_INLINE Floats widened(__m256i halves, int64_t dtype) {
    if (dtype == HFLB_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
template <int DTYPE>
HFLB_INLINE Floats from(const char* row, int64_t column) {
    if (DTYPE == HFLB_F32) return load((const float*)row + column);
    return widened(_mm256_loadu_si256((const __m256i*)((const uint16_t*)row + column)), DTYPE);
}
template <int DTYPE>
HFLB_INLINE Floats some(const char* row, int64_t column, int64_t count) {
    const __mmask16 mask = (__mmask16)((1 << count) - 1);
    if (DTYPE == HFLB_F32) return _mm512_maskz_loadu_ps(mask, (const float*)row + column);
    return widened(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)row + column), DTYPE);
}

}  // namespace

#include "low_rank_tile.h"

extern "C" hflb_lr_kernel* const hflb_lr_avx512 = any_rows;
#else
#include "low_rank.h"
extern "C" hflb_lr_kernel* const hflb_lr_avx512 = 0;
#endif
