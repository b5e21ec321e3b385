// Latents as they come, or from codes.
#pragma once
#include "half.h"
#include "latent_plan.h"

namespace {

template <int BITS>
void decode_group(const uint8_t* codes, int64_t rank, float scale, float zero, uint16_t* to) {
    const int64_t each = BITS == 3 ? 8 : BITS == 4 ? 2 : 1, words = (rank + each - 1) / each;
    const __m512 scales = spread(scale), zeros = spread(zero);
    for (int64_t j = 0; j < words; j += 16) {
        const __mmask16 some = (__mmask16)(words - j < 16 ? (1 << (words - j)) - 1 : 0xffff);
        __m512i word = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + j));
        if (BITS == 3) {
            const __m512i second = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + words + j));
            const __m512i third = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + 2 * words + j));
            word = _mm512_or_si512(word, _mm512_or_si512(_mm512_slli_epi32(second, 8), _mm512_slli_epi32(third, 16)));
        }
        for (int64_t place = 0; place < each; ++place) {
            const int64_t at = place * words + j, left = rank - at < words - j ? rank - at : words - j;
            if (left <= 0) break;
            const __m512i code = _mm512_and_si512(_mm512_srli_epi32(word, (unsigned)(BITS * place)), spread((1 << BITS) - 1));
            const __m512 value = times(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zeros), scales);
            const __mmask16 filled = (__mmask16)(left < 16 ? (1 << left) - 1 : 0xffff);
            _mm256_mask_storeu_epi16(to + at, filled, (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}

// Rows of one group, one after the other, each filled up to whole steps with zeros.
void stage(const std::vector<Group>& groups, const Group& group, const uint8_t* rows, int64_t stride, int64_t count, int64_t bits, uint16_t* to) {
    const int64_t all = (int64_t)groups.size(), index = &group - groups.data();
    int64_t codes = 4 * all;
    for (int64_t g = 0; g < index; ++g) {
        const int64_t rank = groups[(size_t)g].rank;
        codes += bits == 8 ? rank : bits == 4 ? (rank + 1) / 2 : (rank + 7) / 8 * 3;
    }
    for (int64_t t = 0; t < count; ++t, rows += stride, to += group.width) {
        memset(to + group.rank, 0, (size_t)(group.width - group.rank) * 2);
        if (!bits) {
            memcpy(to, rows + 2 * group.start, (size_t)group.rank * 2);
            continue;
        }
        uint16_t half;
        int16_t zero;
        memcpy(&half, rows + 2 * index, 2);
        memcpy(&zero, rows + 2 * (all + index), 2);
        const float scale = hflb_half_to_float(half);
        if (bits == 8) decode_group<8>(rows + codes, group.rank, scale, zero, to);
        else if (bits == 4) decode_group<4>(rows + codes, group.rank, scale, zero, to);
        else decode_group<3>(rows + codes, group.rank, scale, zero, to);
    }
}

}  // namespace
