// Vectors of AVX-512 with VNNI and GFNI: Ice Lake, Zen 4 and later. The including file sets the target.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in the compiler's own headers
#include <immintrin.h>

#include "binary.h"

// Vectors must stay in registers from one function to the next, so the compiler is left no choice.
#define HFLB_INLINE inline __attribute__((always_inline))

namespace {

typedef __m512 Floats;
typedef __m512i Ints;
typedef __m512i Bytes;
typedef __m512i Four;
typedef __m512i Sums;
const int AT_ONCE = 4;

HFLB_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
HFLB_INLINE void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
HFLB_INLINE Floats spread(float value) { return _mm512_set1_ps(value); }
HFLB_INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
HFLB_INLINE Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
HFLB_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
HFLB_INLINE Floats negated(Floats value) { return _mm512_xor_ps(value, _mm512_set1_ps(-0.0f)); }
HFLB_INLINE Floats magnitude(Floats value) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), value); }
HFLB_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
HFLB_INLINE Floats from_halves(const uint16_t* from) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
}
HFLB_INLINE Floats from_brains(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Rounds to nearest, ties to even; finite values.
template <int DTYPE>
HFLB_INLINE void store_as(void* to, int64_t at, Floats value) {
    if (DTYPE == HFLB_F32) {
        store((float*)to + at, value);
    } else if (DTYPE == HFLB_F16) {
        _mm256_storeu_si256((__m256i*)((uint16_t*)to + at), _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
    } else {
#ifdef HFLB_ROUNDS
        _mm256_storeu_si256((__m256i*)((uint16_t*)to + at), (__m256i)_mm512_cvtneps_pbh(value));
#else
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        _mm256_storeu_si256((__m256i*)((uint16_t*)to + at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
#endif
    }
}
// Sixteen columns: the first where bit `bit` of the bytes is 1, else the second.
typedef __m128i Bits;
HFLB_INLINE Bits bits_of(const uint8_t* bytes) { return _mm_loadu_si128((const __m128i*)bytes); }
HFLB_INLINE __mmask16 ones(Bits bytes, int bit) { return _mm_test_epi8_mask(bytes, _mm_set1_epi8((char)(1 << bit))); }
HFLB_INLINE Floats choose(Bits bytes, int bit, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(ones(bytes, bit), no, yes);
}
HFLB_INLINE Floats times_where(Bits bytes, int bit, Floats a, Floats b, Floats no) {
    return _mm512_mask_mul_ps(no, ones(bytes, bit), a, b);
}
HFLB_INLINE Floats negated_unless(Bits bytes, int bit, Floats value) {
    const __mmask16 zeros = _mm_testn_epi8_mask(bytes, _mm_set1_epi8((char)(1 << bit)));
    return _mm512_mask_xor_ps(value, zeros, value, _mm512_set1_ps(-0.0f));
}

HFLB_INLINE Ints spread(int32_t value) { return _mm512_set1_epi32(value); }
HFLB_INLINE Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
HFLB_INLINE Ints shift_up(Ints value) { return _mm512_slli_epi32(value, 8); }
HFLB_INLINE Floats to_floats(Ints value) { return _mm512_cvtepi32_ps(value); }
HFLB_INLINE Ints to_ints(Floats value) { return _mm512_cvtps_epi32(value); }
HFLB_INLINE int32_t sum_of(Ints value) { return _mm512_reduce_add_epi32(value); }
HFLB_INLINE void store_digit(int8_t* to, Ints value) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(value)); }
// What is left above the lowest signed byte: (value - byte) / 256.
HFLB_INLINE Ints next_digit(Ints value) { return _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8); }

HFLB_INLINE Bytes no_bytes() { return _mm512_setzero_si512(); }
HFLB_INLINE Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
HFLB_INLINE Bytes inverse(Bytes value) { return _mm512_ternarylogic_epi64(value, value, value, 0x55); }
// Pairs of bits, of the high and the low array: bits 0, 2, 4 and 6, or 1, 3, 5 and 7.
HFLB_INLINE Bytes evens(Bytes high, Bytes low) {  // 0xca: the second where the first has a bit, else the third
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x55), low, _mm512_slli_epi16(high, 1), 0xca);
}
HFLB_INLINE Bytes odds(Bytes high, Bytes low) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x55), _mm512_srli_epi16(low, 1), high, 0xca);
}
// One pair of bits as the bytes' value: a GF(2) product whose matrix takes bits 2 * pair and 2 * pair + 1.
HFLB_INLINE Bytes weights(Bytes pairs, int pair) {
    if (pair == 0) return _mm512_and_si512(pairs, _mm512_set1_epi8(3));
    const unsigned long long low = 1ull << (56 + 2 * pair), high = 1ull << (48 + 2 * pair + 1);
    return _mm512_gf2p8affine_epi64_epi8(pairs, _mm512_set1_epi64((long long)(low | high)), 0);
}

// `groups` times 16 bytes of each row, at most 64: word k of all rows goes to the k-th vector.
HFLB_INLINE void load_rows(const uint8_t* from, const int64_t* at, int64_t groups, Bytes* to) {
    const __mmask16 some = (__mmask16)(groups < 4 ? (1 << 4 * groups) - 1 : 0xffff);
    __m512i quads[16];
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {  // four rows: quads[r + k] holds words k, 4 + k, 8 + k and 12 + k, four rows each
        const __m512i a = _mm512_maskz_loadu_epi32(some, from + at[r]), b = _mm512_maskz_loadu_epi32(some, from + at[r + 1]);
        const __m512i c = _mm512_maskz_loadu_epi32(some, from + at[r + 2]), d = _mm512_maskz_loadu_epi32(some, from + at[r + 3]);
        const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const __m512i more_ab = _mm512_unpackhi_epi32(a, b), more_cd = _mm512_unpackhi_epi32(c, d);
        quads[r] = _mm512_unpacklo_epi64(ab, cd), quads[r + 1] = _mm512_unpackhi_epi64(ab, cd);
        quads[r + 2] = _mm512_unpacklo_epi64(more_ab, more_cd), quads[r + 3] = _mm512_unpackhi_epi64(more_ab, more_cd);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {  // lane q of a quad belongs to group q
        const __m512i low = _mm512_shuffle_i32x4(quads[k], quads[4 + k], 0x44), high = _mm512_shuffle_i32x4(quads[k], quads[4 + k], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(quads[8 + k], quads[12 + k], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(quads[8 + k], quads[12 + k], 0xee);
        to[k] = _mm512_shuffle_i32x4(low, low2, 0x88), to[4 + k] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        to[8 + k] = _mm512_shuffle_i32x4(high, high2, 0x88), to[12 + k] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

const bool STARTS = true;
HFLB_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
HFLB_INLINE Sums sums_from(int32_t start) { return _mm512_set1_epi32(start); }
HFLB_INLINE Four four_of(const int8_t* digits) {
    int32_t four;
    memcpy(&four, digits, 4);
    return _mm512_set1_epi32(four);
}
HFLB_INLINE Sums dot(Sums sum, Bytes weight, Four x) { return _mm512_dpbusd_epi32(sum, weight, x); }
HFLB_INLINE Ints total(Sums sum) { return sum; }

}  // namespace
