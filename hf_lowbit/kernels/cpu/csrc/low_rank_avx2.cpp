// AVX2 with FMA and F16C, on every x86 processor since 2013 or so.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "low_rank.h"

// Vectors must stay in registers from one function to the next, so the compiler is left no choice.
#define HFLB_INLINE inline __attribute__((always_inline))

namespace {

struct Floats { __m256 a, b; };
const int AT_ONCE = 2;  // of 16 registers, 4 tokens fill all

HFLB_INLINE Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
HFLB_INLINE Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
HFLB_INLINE float sum(Floats value) {
    const __m256 eight = _mm256_add_ps(value.a, value.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
HFLB_INLINE Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
HFLB_INLINE void fetch(const char* at) { _mm_prefetch(at, _MM_HINT_T0); }
HFLB_INLINE __m256 widened(__m128i halves, int64_t dtype) {
    if (dtype == HFLB_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
template <int DTYPE>
HFLB_INLINE Floats from(const char* row, int64_t column) {
    if (DTYPE == HFLB_F32) return load((const float*)row + column);
    const __m128i* at = (const __m128i*)((const uint16_t*)row + column);
    return {widened(_mm_loadu_si128(at), DTYPE), widened(_mm_loadu_si128(at + 1), DTYPE)};
}
template <int DTYPE>
HFLB_INLINE Floats some(const char* row, int64_t column, int64_t count) {
    const int64_t size = DTYPE == HFLB_F32 ? 4 : 2;
    char buffer[64] = {0};
    memcpy(buffer, row + column * size, (size_t)(count * size));
    return from<DTYPE>(buffer, 0);
}

}  // namespace

#include "low_rank_tile.h"

extern "C" hflb_lr_kernel* const hflb_lr_avx2 = any_rows;
#else
#include "low_rank.h"
extern "C" hflb_lr_kernel* const hflb_lr_avx2 = 0;
#endif
