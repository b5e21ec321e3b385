// AVX2 with FMA and BMI2, on every x86 processor since 2013 or so.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#include <math.h>

#include "integer_x86.h"

namespace {

const int LANES = 8;
typedef __m256 Floats;
typedef __m256i Ints;
typedef __m256i Bytes;

HFLI_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
HFLI_INLINE void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
HFLI_INLINE Floats spread(float value) { return _mm256_set1_ps(value); }
HFLI_INLINE Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
HFLI_INLINE Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
HFLI_INLINE Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
HFLI_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
HFLI_INLINE Floats from_halves(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
HFLI_INLINE Floats from_brains(const uint16_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
}
HFLI_INLINE Floats some_halves(const uint16_t* from, int64_t count) {
    uint16_t all[LANES] = {0};
    memcpy(all, from, (size_t)count * 2);
    return from_halves(all);
}
HFLI_INLINE Floats from_bytes(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
// Rounds to nearest, ties to even; finite values.
template <int DTYPE>
HFLI_INLINE void store_as(void* to, int64_t at, Floats value) {
    __m128i* halves = (__m128i*)((uint16_t*)to + at);
    if (DTYPE == HFLB_F32) {
        store((float*)to + at, value);
    } else if (DTYPE == HFLB_F16) {
        _mm_storeu_si128(halves, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        _mm_storeu_si128(halves, _mm_packus_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1)));
    }
}
HFLI_INLINE float total(Floats value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
HFLI_INLINE Floats look_up(const float* table, Ints at) { return _mm256_i32gather_ps(table, at, 4); }
HFLI_INLINE Floats permuted(const float* from, Ints at) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), at); }

HFLI_INLINE Ints load(const int32_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
HFLI_INLINE void store(int32_t* to, Ints value) { _mm256_storeu_si256((__m256i*)to, value); }
HFLI_INLINE Ints none() { return _mm256_setzero_si256(); }
HFLI_INLINE Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
HFLI_INLINE Ints shift_up(Ints value) { return _mm256_slli_epi32(value, 8); }
HFLI_INLINE Floats to_floats(Ints value) { return _mm256_cvtepi32_ps(value); }
HFLI_INLINE Ints to_ints(Floats value) { return _mm256_cvtps_epi32(value); }

HFLI_INLINE Floats over(Floats a, Floats b) { return _mm256_div_ps(a, b); }
HFLI_INLINE Ints clamped(Ints value, int most) {
    return _mm256_min_epi32(_mm256_max_epi32(value, _mm256_set1_epi32(-most)), _mm256_set1_epi32(most));
}
HFLI_INLINE void store_codes(int8_t* to, Ints value) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(halves, halves));
}
// The number H places away in a vector, and the sign with which its own goes into the sum or difference.
template <int H>
HFLI_INLINE Floats partner(Floats value) {
    if (H == 1) return _mm256_permute_ps(value, 0xb1);
    if (H == 2) return _mm256_permute_ps(value, 0x4e);
    return _mm256_permute2f128_ps(value, value, 1);
}
template <int H>
HFLI_INLINE Floats pattern() {
    const int minus = H == 1 ? 0xaa : H == 2 ? 0xcc : 0xf0;
    return _mm256_blend_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(-1.0f), minus);
}

// The largest magnitude among `count` floats, as its bits: NaN is above all.
HFLI_INLINE int32_t largest_bits(const float* from, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += LANES)
        most = _mm256_max_epi32(most, _mm256_and_si256(load((const int32_t*)from + i), _mm256_set1_epi32(0x7fffffff)));
    int32_t each[LANES], found = 0;
    store(each, most);
    for (int i = 0; i < LANES; ++i) found = each[i] > found ? each[i] : found;
    return found;
}

HFLI_INLINE float dot_of(const float* a, const float* b, int64_t count) {
    __m256 sum = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum = _mm256_fmadd_ps(load(a + i), load(b + i), sum);
    float rest = 0.0f;
    for (; i < count; ++i) rest += a[i] * b[i];
    return total(sum) + rest;
}

HFLI_INLINE Bytes load_bytes(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
HFLI_INLINE Bytes load_some(const uint8_t* from, int64_t count) {
    uint8_t some[32] = {0};
    memcpy(some, from, (size_t)(count < 32 ? count : 32));
    return load_bytes(some);
}

template <int BITS>
HFLI_INLINE void take_apart(Bytes packed, Bytes* to) {
    if (BITS == 8) {
        to[0] = packed;
    } else if (BITS == 3) {
        const unsigned long long each = 0x0707070707070707ull;
        const __m128i low = _mm256_castsi256_si128(packed);
        const uint64_t first = (uint64_t)_mm_cvtsi128_si64(low), second = (uint64_t)_mm_extract_epi64(low, 1);
        to[0] = _mm256_set_epi64x(
            (long long)_pdep_u64(second >> 8, each), (long long)_pdep_u64(first >> 48 | second << 16, each),
            (long long)_pdep_u64(first >> 24, each), (long long)_pdep_u64(first, each)
        );
    } else {
        const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
#pragma GCC unroll 4
        for (int k = 0; k < 8 / BITS; ++k) to[k] = _mm256_and_si256(_mm256_srli_epi16(packed, BITS * k), mask);
    }
}

// Products of two bytes are added in 16 bits, which hold two of 128 * 127; codes of 8 bits are taken in two pieces.
template <int BITS>
HFLI_INLINE Ints add_dot(Ints sum, Bytes codes, Bytes digits) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (BITS < 8) return plus(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, digits), ones));
    const __m256i high = _mm256_and_si256(codes, _mm256_set1_epi8((char)128)), low = _mm256_xor_si256(codes, high);
    const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(low, digits), ones);
    // 128 * (-128 - 128) is the smallest number of 16 bits; the largest there is, 128 * 254, fits
    return plus(sum, plus(pairs, _mm256_madd_epi16(_mm256_maddubs_epi16(high, digits), ones)));
}

}  // namespace

#include "integer_rows.h"
#include "integer_transform.h"

extern "C" const hfli_kernels hfli_avx2 = {LANES, integers, arrange, rows, expand, round_token};
#else
#include "integer.h"
extern "C" const hfli_kernels hfli_avx2 = {8, 0, 0, 0, 0, 0};
#endif
