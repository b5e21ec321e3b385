// Codes in the order of their columns, some at a time, on x86 processors. The including file sets the target, and
// HFLI_WIDE where it has AVX-512.
#include <immintrin.h>
#include <string.h>

#include "integer.h"

namespace {

HFLI_INLINE __m128i each_byte(__m128i value, int mask) { return _mm_and_si128(value, _mm_set1_epi8((char)mask)); }

// Reads 2 * BITS bytes, writes 16.
template <int BITS>
HFLI_INLINE __m128i sixteen_codes(const uint8_t* from) {
    if (BITS == 2) {
        int32_t four;
        memcpy(&four, from, 4);
        const __m128i wide = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
        const __m128i pairs = _mm_or_si128(wide, _mm_slli_epi32(wide, 12));  // codes 0 and 2 at the bottom of 16 bits
        return each_byte(_mm_or_si128(pairs, _mm_slli_epi32(pairs, 6)), 3);
    }
    if (BITS == 3) {
        uint64_t low = 0, high = 0;
        memcpy(&low, from, 3), memcpy(&high, from + 3, 3);
        const unsigned long long each = 0x0707070707070707ull;
        return _mm_set_epi64x((long long)_pdep_u64(high, each), (long long)_pdep_u64(low, each));
    }
    if (BITS == 4) {
        const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)from));
        return each_byte(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), 15);
    }
    return _mm_loadu_si128((const __m128i*)from);
}

#ifdef HFLI_WIDE  // AVX-512 with BW and VBMI
const int AT_ONCE_BYTES = 64;

// Codes of three bits in the first 24 bytes: three bytes go to each of eight words, of which eight codes are taken.
HFLI_INLINE __m512i threes(__m512i packed) {
    const __m512i at = _mm512_setr_epi32(
        0x00020100, 0, 0x00050403, 0, 0x00080706, 0, 0x000b0a09, 0, 0x000e0d0c, 0, 0x0011100f, 0, 0x00141312, 0, 0x00171615, 0
    );
    const __m512i shifts = _mm512_set1_epi64(0x15120f0c09060300);
    const __m512i codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(at, packed));
    return _mm512_and_si512(codes, _mm512_set1_epi8(7));
}

// The codes in the first 8 * BITS bytes.
template <int BITS>
HFLI_INLINE __m512i codes_in(__m512i packed) {
    if (BITS == 2) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(packed));
        const __m512i pairs = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12));  // codes 0 and 2 at the bottom of 16 bits
        return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6)), _mm512_set1_epi8(3));
    }
    if (BITS == 3) return threes(packed);
    if (BITS == 4) {
        const __m512i wide = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed));
        return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    }
    return packed;
}

// Reads 8 * BITS bytes.
template <int BITS>
HFLI_INLINE __m512i many_codes(const uint8_t* from) {
    if (BITS == 2) return codes_in<2>(_mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from)));
    if (BITS == 3) return codes_in<3>(_mm512_maskz_loadu_epi8(0xffffff, from));
    if (BITS == 4) return codes_in<4>(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from)));
    return _mm512_loadu_si512(from);
}

// Reads so many bytes.
template <int BITS>
HFLI_INLINE void last_ones(const uint8_t* from, int64_t bytes, uint8_t* to) {
    _mm512_storeu_si512(to, codes_in<BITS>(_mm512_maskz_loadu_epi8(bytes < 64 ? (1ull << bytes) - 1 : ~0ull, from)));
}

template <int BITS>
HFLI_INLINE void many(const uint8_t* from, uint8_t* to) { _mm512_storeu_si512(to, many_codes<BITS>(from)); }
#else
const int AT_ONCE_BYTES = 16;

template <int BITS>
HFLI_INLINE void many(const uint8_t* from, uint8_t* to) { _mm_storeu_si128((__m128i*)to, sixteen_codes<BITS>(from)); }

template <int BITS>
HFLI_INLINE void last_ones(const uint8_t* from, int64_t bytes, uint8_t* to) {
    uint8_t some[AT_ONCE_BYTES] = {0};
    memcpy(some, from, (size_t)bytes);
    many<BITS>(some, to);
}
#endif

}  // namespace
