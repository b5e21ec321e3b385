// AVX-512 with VNNI, VBMI and GFNI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,f16c,fma,avx2,bmi2")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms in the compiler's own headers
#define HFLI_WIDE
#include <math.h>

#include "avx512.h"
#include "integer_x86.h"

namespace {

const int LANES = 16;

HFLI_INLINE Ints load(const int32_t* from) { return _mm512_loadu_si512(from); }
HFLI_INLINE void store(int32_t* to, Ints value) { _mm512_storeu_si512(to, value); }
HFLI_INLINE Ints none() { return _mm512_setzero_si512(); }
HFLI_INLINE Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
HFLI_INLINE Bytes load_some(const uint8_t* from, int64_t count) {
    return _mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : ~0ull, from);
}
HFLI_INLINE Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
HFLI_INLINE float total(Floats value) { return _mm512_reduce_add_ps(value); }
HFLI_INLINE Floats some_halves(const uint16_t* from, int64_t count) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from));
}
HFLI_INLINE Floats from_bytes(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
HFLI_INLINE Floats look_up(const float* table, Ints at) { return _mm512_i32gather_ps(at, table, 4); }
HFLI_INLINE Floats permuted(const float* from, Ints at) { return _mm512_permutexvar_ps(at, _mm512_loadu_ps(from)); }

HFLI_INLINE Floats over(Floats a, Floats b) { return _mm512_div_ps(a, b); }
HFLI_INLINE Ints clamped(Ints value, int most) {
    return _mm512_min_epi32(_mm512_max_epi32(value, _mm512_set1_epi32(-most)), _mm512_set1_epi32(most));
}
HFLI_INLINE void store_codes(int8_t* to, Ints value) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(value)); }
// The number H places away in a vector, and the sign with which its own goes into the sum or difference.
template <int H>
HFLI_INLINE Floats partner(Floats value) {
    if (H == 1) return _mm512_permute_ps(value, 0xb1);
    if (H == 2) return _mm512_permute_ps(value, 0x4e);
    if (H == 4) return _mm512_shuffle_f32x4(value, value, 0xb1);
    return _mm512_shuffle_f32x4(value, value, 0x4e);
}
template <int H>
HFLI_INLINE Floats pattern() {
    const __mmask16 minus = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
    return _mm512_mask_blend_ps(minus, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

// The largest magnitude among `count` floats, as its bits: NaN is above all.
HFLI_INLINE int32_t largest_bits(const float* from, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES)
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(from + i), _mm512_set1_epi32(0x7fffffff)));
    return _mm512_reduce_max_epi32(most);
}

HFLI_INLINE float dot_of(const float* a, const float* b, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    const __mmask16 some = (__mmask16)((1u << (count - i)) - 1);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, a + i), _mm512_maskz_loadu_ps(some, b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

template <int BITS>
HFLI_INLINE void take_apart(Bytes packed, Bytes* to) {
    if (BITS == 8) {
        to[0] = packed;
    } else if (BITS == 3) {
        to[0] = threes(packed);
    } else {
        const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
#pragma GCC unroll 4
        for (int k = 0; k < 8 / BITS; ++k) to[k] = _mm512_and_si512(_mm512_srli_epi16(packed, BITS * k), mask);
    }
}

template <int BITS>
HFLI_INLINE Ints add_dot(Ints sum, Bytes codes, Bytes digits) { return _mm512_dpbusd_epi32(sum, codes, digits); }

}  // namespace

#include "integer_rows.h"
#include "integer_transform.h"

extern "C" const hfli_kernels hfli_avx512 = {LANES, integers, arrange, rows, expand, round_token};
#else
#include "integer.h"
extern "C" const hfli_kernels hfli_avx512 = {16, 0, 0, 0, 0, 0};
#endif
