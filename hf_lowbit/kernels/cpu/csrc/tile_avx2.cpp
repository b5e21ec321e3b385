// AVX2, on every x86 processor since 2013 or so.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "binary.h"

// Vectors must stay in registers from one function to the next, so the compiler is left no choice.
#define HFLB_INLINE inline __attribute__((always_inline))

namespace {

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };
typedef __m256i Four;
const int AT_ONCE = 2;
struct Sums { __m256i a, b; };  // pairs of 16 bits: weights are at most 2, so 32 sums of two products stay far below 2^15

HFLB_INLINE Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
HFLB_INLINE void store(float* to, Floats value) { _mm256_storeu_ps(to, value.a), _mm256_storeu_ps(to + 8, value.b); }
HFLB_INLINE Floats spread(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
HFLB_INLINE Floats times(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
HFLB_INLINE Floats plus(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
HFLB_INLINE Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
HFLB_INLINE Floats negated(Floats value) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(value.a, sign), _mm256_xor_ps(value.b, sign)};
}
HFLB_INLINE Floats magnitude(Floats value) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, value.a), _mm256_andnot_ps(sign, value.b)};
}
HFLB_INLINE Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
HFLB_INLINE Floats from_halves(const uint16_t* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
HFLB_INLINE __m256 eight_brains(const uint16_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
HFLB_INLINE Floats from_brains(const uint16_t* from) { return {eight_brains(from), eight_brains(from + 8)}; }
HFLB_INLINE __m256i brains_of(__m256 value) {  // in the low halves of 32 bits
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}
// Rounds to nearest, ties to even; finite values.
template <int DTYPE>
HFLB_INLINE void store_as(void* to, int64_t at, Floats value) {
    uint16_t* halves = (uint16_t*)to + at;
    if (DTYPE == HFLB_F32) {
        store((float*)to + at, value);
    } else if (DTYPE == HFLB_F16) {
        _mm_storeu_si128((__m128i*)halves, _mm256_cvtps_ph(value.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128((__m128i*)(halves + 8), _mm256_cvtps_ph(value.b, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m256i both = _mm256_packus_epi32(brains_of(value.a), brains_of(value.b));
        _mm256_storeu_si256((__m256i*)halves, _mm256_permute4x64_epi64(both, 0xd8));
    }
}
// Sixteen columns: the first where bit `bit` of the bytes is 1, else the second.
typedef __m128i Bits;
HFLB_INLINE Bits bits_of(const uint8_t* bytes) { return _mm_loadu_si128((const __m128i*)bytes); }
HFLB_INLINE Floats choose(Bits bytes, int bit, Floats yes, Floats no) {
    const __m128i one = _mm_set1_epi8((char)(1 << bit)), is = _mm_cmpeq_epi8(_mm_and_si128(bytes, one), one);
    const __m256 a = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(is));
    const __m256 b = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(is, 8)));
    return {_mm256_blendv_ps(no.a, yes.a, a), _mm256_blendv_ps(no.b, yes.b, b)};
}
HFLB_INLINE Floats times_where(Bits bytes, int bit, Floats a, Floats b, Floats no) {
    return choose(bytes, bit, times(a, b), no);
}
HFLB_INLINE Floats negated_unless(Bits bytes, int bit, Floats value) { return choose(bytes, bit, value, negated(value)); }

HFLB_INLINE Ints spread(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
HFLB_INLINE Ints plus(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
HFLB_INLINE Ints shift_up(Ints value) { return {_mm256_slli_epi32(value.a, 8), _mm256_slli_epi32(value.b, 8)}; }
HFLB_INLINE Floats to_floats(Ints value) { return {_mm256_cvtepi32_ps(value.a), _mm256_cvtepi32_ps(value.b)}; }
HFLB_INLINE Ints to_ints(Floats value) { return {_mm256_cvtps_epi32(value.a), _mm256_cvtps_epi32(value.b)}; }
HFLB_INLINE int32_t sum_of(Ints value) {
    int32_t all[8], sum = 0;
    _mm256_storeu_si256((__m256i*)all, _mm256_add_epi32(value.a, value.b));
    for (int i = 0; i < 8; ++i) sum += all[i];
    return sum;
}
// Sixteen lowest bytes: whole words saturate when packed, so only the bytes may be left of them.
HFLB_INLINE void store_digit(int8_t* to, Ints value) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(value.a, byte), _mm256_and_si256(value.b, byte));
    const __m256i bytes = _mm256_packus_epi16(words, words);  // of 0-3, 8-11, ... | of 4-7, 12-15, ...
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi32(low, high));
}
HFLB_INLINE Ints next_digit(Ints value) {  // what is left above the lowest signed byte: (value - byte) / 256
    const __m256i half = _mm256_set1_epi32(128);
    return {_mm256_srai_epi32(_mm256_add_epi32(value.a, half), 8), _mm256_srai_epi32(_mm256_add_epi32(value.b, half), 8)};
}

HFLB_INLINE Bytes no_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HFLB_INLINE Bytes both(Bytes x, Bytes y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
HFLB_INLINE Bytes inverse(Bytes value) {
    const __m256i ones = _mm256_set1_epi8(-1);
    return {_mm256_xor_si256(value.a, ones), _mm256_xor_si256(value.b, ones)};
}
// Pairs of bits, of the high and the low array: bits 0, 2, 4 and 6, or 1, 3, 5 and 7.
HFLB_INLINE __m256i even_bits(__m256i high, __m256i low) {
    const __m256i even = _mm256_set1_epi8(0x55);
    return _mm256_or_si256(_mm256_and_si256(low, even), _mm256_andnot_si256(even, _mm256_slli_epi16(high, 1)));
}
HFLB_INLINE Bytes evens(Bytes high, Bytes low) { return {even_bits(high.a, low.a), even_bits(high.b, low.b)}; }
HFLB_INLINE __m256i odd_bits(__m256i high, __m256i low) {
    const __m256i even = _mm256_set1_epi8(0x55);
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 1), even), _mm256_andnot_si256(even, high));
}
HFLB_INLINE Bytes odds(Bytes high, Bytes low) { return {odd_bits(high.a, low.a), odd_bits(high.b, low.b)}; }
HFLB_INLINE Bytes weights(Bytes pairs, int pair) {  // one pair of bits as the bytes' value
    const __m256i two = _mm256_set1_epi8(3);
    return {
        _mm256_and_si256(_mm256_srli_epi16(pairs.a, 2 * pair), two), _mm256_and_si256(_mm256_srli_epi16(pairs.b, 2 * pair), two)
    };
}

HFLB_INLINE __m256i two_rows(const uint8_t* from, const int64_t* at) {
    const __m128i first = _mm_loadu_si128((const __m128i*)(from + at[0]));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_loadu_si128((const __m128i*)(from + at[4])), 1);
}
HFLB_INLINE void eight_rows(const uint8_t* from, const int64_t* at, __m256i* to) {
    const __m256i a = two_rows(from, at), b = two_rows(from, at + 1), c = two_rows(from, at + 2), d = two_rows(from, at + 3);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const __m256i more_ab = _mm256_unpackhi_epi32(a, b), more_cd = _mm256_unpackhi_epi32(c, d);
    to[0] = _mm256_unpacklo_epi64(ab, cd), to[1] = _mm256_unpackhi_epi64(ab, cd);
    to[2] = _mm256_unpacklo_epi64(more_ab, more_cd), to[3] = _mm256_unpackhi_epi64(more_ab, more_cd);
}
// `groups` times 16 bytes of each row: word k of all rows goes to the k-th vector.
HFLB_INLINE void load_rows(const uint8_t* from, const int64_t* at, int64_t groups, Bytes* to) {
    for (int64_t g = 0; g < groups; ++g, from += 16, to += 4) {
        __m256i first[4], last[4];
        eight_rows(from, at, first), eight_rows(from, at + 8, last);
        for (int k = 0; k < 4; ++k) to[k] = {first[k], last[k]};
    }
}

const bool STARTS = false;  // sums of 16 bits
HFLB_INLINE Sums sums_from(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HFLB_INLINE Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HFLB_INLINE Four four_of(const int8_t* digits) {
    int32_t four;
    memcpy(&four, digits, 4);
    return _mm256_set1_epi32(four);
}
HFLB_INLINE Sums dot(Sums sum, Bytes weight, Four x) {
    return {
        _mm256_add_epi16(sum.a, _mm256_maddubs_epi16(weight.a, x)), _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(weight.b, x))
    };
}
HFLB_INLINE Ints total(Sums sum) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(sum.a, one), _mm256_madd_epi16(sum.b, one)};
}

}  // namespace

#include "expand.h"
#include "tile.h"

extern "C" const hflb_kernels hflb_avx2 = {make_token, any_rows, expand_rows};
#else
#include "binary.h"
extern "C" const hflb_kernels hflb_avx2 = {0, 0, 0};
#endif
