// AVX-512 with VNNI and GFNI: Ice Lake, Zen 4 and later.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in the compiler's own headers
#include "binary.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,gfni,f16c,fma,avx2")
#include <immintrin.h>

namespace {

const int WIDTH = 64;
typedef __m512i Bytes;
typedef __m512i Words;
typedef __m512 Floats;

inline Words zero() { return _mm512_setzero_si512(); }
inline Floats no_floats() { return _mm512_setzero_ps(); }
inline Bytes load_bytes(const int8_t* from) { return _mm512_loadu_si512(from); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Words dot(Words sum, Bytes weight, Bytes digits) { return _mm512_dpbusd_epi32(sum, weight, digits); }
inline Words shift_up(Words value) { return _mm512_slli_epi32(value, 8); }
inline Floats to_float(Words value) { return _mm512_cvtepi32_ps(value); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats spread(float value) { return _mm512_set1_ps(value); }
inline float total(Floats value) { return _mm512_reduce_add_ps(value); }

// Of each four floats the one of the given number, four times.
inline Floats one_of_four(Floats value, int which) { return _mm512_permutevar_ps(value, _mm512_set1_epi32(which)); }

typedef __m512 Rows;
inline Rows rows_of_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Rows rows_of_halves(const uint16_t* from) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
}
inline Rows rows_of_brains(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Rows times(Rows rows, float factor) { return _mm512_mul_ps(rows, _mm512_set1_ps(factor)); }
inline Rows add(Rows sum, Rows rows, float factor) { return _mm512_fmadd_ps(rows, _mm512_set1_ps(factor), sum); }
inline void put(float* to, Rows rows) { _mm512_storeu_ps(to, rows); }
// Sixteen columns: the first where bit `bit` of the bytes is 1, else the second.
inline Rows choose(const uint8_t* bytes, int bit, Rows yes, Rows no) {
    const __m128i all = _mm_loadu_si128((const __m128i*)bytes);
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(all, _mm_set1_epi8((char)(1 << bit))), no, yes);
}
inline Rows product(Rows a, Rows b) { return _mm512_mul_ps(a, b); }
inline Rows sum_of(Rows a, Rows b) { return _mm512_add_ps(a, b); }
inline Rows rows_of_one(float value) { return _mm512_set1_ps(value); }
inline void put_quads(float* to, int64_t apart, Rows rows) {
    _mm_storeu_ps(to, _mm512_castps512_ps128(rows));
    _mm_storeu_ps(to + apart, _mm512_extractf32x4_ps(rows, 1));
    _mm_storeu_ps(to + 2 * apart, _mm512_extractf32x4_ps(rows, 2));
    _mm_storeu_ps(to + 3 * apart, _mm512_extractf32x4_ps(rows, 3));
}

// Four arrays of `bytes` bytes: for either code the low and the high four bits of (sign where the code is this one),
// each in the low half of a byte, with those of the code in the high half. Thus one GF(2) product makes a weight.
// A pruned position has neither code.
inline void prepare(const uint8_t* sign, const uint8_t* code, const uint8_t* keep, int64_t bytes, uint8_t* to) {
    const int64_t step = bytes + 64;
    const Bytes low = _mm512_set1_epi8(0x0f);
    for (int64_t at = 0; at < bytes; at += 64) {
        const __mmask64 some = bytes - at >= 64 ? ~0ull : (1ull << (bytes - at)) - 1;
        const Bytes signs = _mm512_maskz_loadu_epi8(some, sign + at);
        const Bytes codes = code ? _mm512_maskz_loadu_epi8(some, code + at) : zero();
        const Bytes kept = keep ? _mm512_maskz_loadu_epi8(some, keep + at) : _mm512_set1_epi8(-1);
        const Bytes not0 = _mm512_ternarylogic_epi64(codes, kept, kept, 0xf3);  // codes or not kept
        const Bytes is1 = _mm512_and_si512(codes, kept);
        const Bytes one = _mm512_and_si512(signs, is1), none = _mm512_andnot_si512(not0, signs);
        // 0xca: take the second where the first has a bit, else the third
        _mm512_storeu_si512(to + at, _mm512_ternarylogic_epi64(low, none, _mm512_slli_epi16(not0, 4), 0xca));
        _mm512_storeu_si512(to + step + at, _mm512_ternarylogic_epi64(low, _mm512_srli_epi16(none, 4), not0, 0xca));
        _mm512_storeu_si512(to + 2 * step + at, _mm512_ternarylogic_epi64(low, one, _mm512_slli_epi16(is1, 4), 0xca));
        _mm512_storeu_si512(to + 3 * step + at, _mm512_ternarylogic_epi64(low, _mm512_srli_epi16(one, 4), is1, 0xca));
    }
}

template <int CODE>
inline Bytes weights(const uint8_t* from, int64_t bytes, int64_t at, int step) {
    const int64_t array = (CODE == 1 || CODE == ITSELF ? 2 : 0) + step;
    const Bytes both = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(from + array * (bytes + 64) + at)));
    // For bit b of the low half: bit 1 of the result is bit b, bit 0 is bit 4 + b. Sixteen bytes for each b.
    const long long sign = CODE == ITSELF ? 0 : 1ll << 48, code = 1ll << 60;
    const long long m0 = sign | code, m1 = m0 << 1, m2 = m0 << 2, m3 = m0 << 3;
    const Bytes matrix = _mm512_setr_epi64(m0, m0, m1, m1, m2, m2, m3, m3);
    return _mm512_gf2p8affine_epi64_epi8(both, matrix, CODE == 1 ? 1 : 0);
}

}  // namespace

#include "tile.h"

extern "C" void hflb_tile_avx512(const hflb_work* work, int64_t row0, float* out) { any_tile(work, row0, out); }
extern "C" void hflb_expand_avx512(const hflb_weight* w, int64_t row, float* out, float* buffer) { expand(w, row, out, buffer); }
#else
extern "C" void hflb_tile_avx512(const hflb_work* work, int64_t row0, float* out) { hflb_tile_portable(work, row0, out); }
extern "C" void hflb_expand_avx512(const hflb_weight* w, int64_t row, float* out, float* buffer) {
    hflb_expand_portable(w, row, out, buffer);
}
#endif
