// AVX2, on every x86 processor since 2013 or so.
#include "binary.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace {

const int WIDTH = 32;
typedef __m256i Bytes;
typedef __m256i Words;
typedef __m256 Floats;

inline Words zero() { return _mm256_setzero_si256(); }
inline Floats no_floats() { return _mm256_setzero_ps(); }
inline Bytes load_bytes(const int8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline Words shift_up(Words value) { return _mm256_slli_epi32(value, 8); }
inline Floats to_float(Words value) { return _mm256_cvtepi32_ps(value); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats spread(float value) { return _mm256_set1_ps(value); }
inline Floats one_of_four(Floats value, int which) { return _mm256_permutevar_ps(value, _mm256_set1_epi32(which)); }

// Weights are at most 2, so a sum of two products is far from the limits of 16 bits.
inline Words dot(Words sum, Bytes weight, Bytes digits) {
    const Words pairs = _mm256_maddubs_epi16(weight, digits);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline float total(Floats value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

struct Rows {
    __m256 low, high;
};
inline Rows rows_of_floats(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Rows rows_of_halves(const uint16_t* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
inline __m256 eight_brains(const uint16_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Rows rows_of_brains(const uint16_t* from) { return {eight_brains(from), eight_brains(from + 8)}; }
inline Rows times(Rows rows, float factor) {
    return {_mm256_mul_ps(rows.low, _mm256_set1_ps(factor)), _mm256_mul_ps(rows.high, _mm256_set1_ps(factor))};
}
inline Rows add(Rows sum, Rows rows, float factor) {
    const __m256 all = _mm256_set1_ps(factor);
    return {_mm256_fmadd_ps(rows.low, all, sum.low), _mm256_fmadd_ps(rows.high, all, sum.high)};
}
inline void put(float* to, Rows rows) {
    _mm256_storeu_ps(to, rows.low);
    _mm256_storeu_ps(to + 8, rows.high);
}
// Sixteen columns: the first where bit `bit` of the bytes is 1, else the second.
inline Rows choose(const uint8_t* bytes, int bit, Rows yes, Rows no) {
    const __m128i one = _mm_set1_epi8((char)(1 << bit));
    const __m128i is = _mm_cmpeq_epi8(_mm_and_si128(_mm_loadu_si128((const __m128i*)bytes), one), one);
    const __m256 low = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(is));
    const __m256 high = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(is, 8)));
    return {_mm256_blendv_ps(no.low, yes.low, low), _mm256_blendv_ps(no.high, yes.high, high)};
}
inline Rows product(Rows a, Rows b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Rows sum_of(Rows a, Rows b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Rows rows_of_one(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline void put_quads(float* to, int64_t apart, Rows rows) {
    _mm_storeu_ps(to, _mm256_castps256_ps128(rows.low));
    _mm_storeu_ps(to + apart, _mm256_extractf128_ps(rows.low, 1));
    _mm_storeu_ps(to + 2 * apart, _mm256_castps256_ps128(rows.high));
    _mm_storeu_ps(to + 3 * apart, _mm256_extractf128_ps(rows.high, 1));
}

// Four arrays of `bytes` bytes: sign where the code is 0, sign where it is 1, where the code is not 0, where it is 1. A
// pruned position has neither code.
inline void prepare(const uint8_t* sign, const uint8_t* code, const uint8_t* keep, int64_t bytes, uint8_t* to) {
    for (int64_t at = 0; at < bytes; at += 16) {
        const __m128i signs = _mm_loadu_si128((const __m128i*)(sign + at));
        const __m128i codes = code ? _mm_loadu_si128((const __m128i*)(code + at)) : _mm_setzero_si128();
        const __m128i kept = keep ? _mm_loadu_si128((const __m128i*)(keep + at)) : _mm_set1_epi8(-1);
        const __m128i not0 = _mm_or_si128(codes, _mm_andnot_si128(kept, _mm_set1_epi8(-1)));
        const __m128i is1 = _mm_and_si128(codes, kept);
        _mm_storeu_si128((__m128i*)(to + at), _mm_andnot_si128(not0, signs));
        _mm_storeu_si128((__m128i*)(to + bytes + at), _mm_and_si128(signs, is1));
        _mm_storeu_si128((__m128i*)(to + 2 * bytes + at), not0);
        _mm_storeu_si128((__m128i*)(to + 3 * bytes + at), is1);
    }
}

inline Bytes bits_of(const uint8_t* plane, Bytes bit) {
    const Bytes both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)plane));
    return _mm256_cmpeq_epi8(_mm256_and_si256(both, bit), bit);
}

template <int CODE>
inline Bytes weights(const uint8_t* from, int64_t bytes, int64_t at, int step) {
    const char low = (char)(1 << (2 * step)), high = (char)(2 << (2 * step));
    const Bytes bit = _mm256_setr_m128i(_mm_set1_epi8(low), _mm_set1_epi8(high));
    const Bytes one = _mm256_set1_epi8(1), two = _mm256_set1_epi8(2);
    const Bytes codes = _mm256_and_si256(bits_of(from + (CODE == 1 || CODE == ITSELF ? 3 : 2) * bytes + at, bit), one);
    if (CODE == ITSELF) return codes;
    const Bytes signs = _mm256_and_si256(bits_of(from + (CODE == 1 ? bytes : 0) + at, bit), two);
    return _mm256_or_si256(signs, CODE == 1 ? _mm256_xor_si256(codes, one) : codes);
}

}  // namespace

#include "tile.h"

extern "C" void hflb_tile_avx2(const hflb_work* work, int64_t row0, float* out) { any_tile(work, row0, out); }
extern "C" void hflb_expand_avx2(const hflb_weight* w, int64_t row, float* out, float* buffer) { expand(w, row, out, buffer); }
#else
extern "C" void hflb_tile_avx2(const hflb_work* work, int64_t row0, float* out) { hflb_tile_portable(work, row0, out); }
extern "C" void hflb_expand_avx2(const hflb_weight* w, int64_t row, float* out, float* buffer) {
    hflb_expand_portable(w, row, out, buffer);
}
#endif
