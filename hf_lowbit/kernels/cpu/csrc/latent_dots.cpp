// With the products of pairs of AVX-512 BF16, in place of tiles: Cooper Lake, Zen 4 and later.
#include "latent.h"
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,gfni,f16c,fma,avx2")
#define HFLB_ROUNDS
#include "avx512.h"

namespace {

inline void begin_products() {}
inline void end_products() {}

// Four rows of a by two tiles of columns.
inline void four_rows(const uint16_t* a, int64_t stride, const uint8_t* b, int64_t steps, bool fresh, float* sums) {
    __m512 found[4][2];
    for (int r = 0; r < 4; ++r)
        for (int half = 0; half < 2; ++half) found[r][half] = fresh ? _mm512_setzero_ps() : load(sums + 16 * r + 256 * half);
    for (int64_t k = 0; k < 16 * steps; ++k) {
        const uint8_t* pairs = b + 2048 * (k / 16) + 64 * (k % 16);
        const __m512bh first = (__m512bh)_mm512_loadu_si512(pairs), second = (__m512bh)_mm512_loadu_si512(pairs + 1024);
        for (int r = 0; r < 4; ++r) {
            int32_t pair;
            memcpy(&pair, a + r * stride + 2 * k, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            found[r][0] = _mm512_dpbf16_ps(found[r][0], both, first);
            found[r][1] = _mm512_dpbf16_ps(found[r][1], both, second);
        }
    }
    for (int r = 0; r < 4; ++r)
        for (int half = 0; half < 2; ++half) store(sums + 16 * r + 256 * half, found[r][half]);
}

// Sixteen rows of a, or twice sixteen, by two tiles of columns: sums [2][2][16][16]. `b` is [steps][2][16][16] pairs.
template <bool TWO>
inline void multiply(const uint16_t* a, const uint16_t* more, int64_t stride, const uint8_t* b, int64_t steps, bool fresh, float* sums) {
    for (int r = 0; r < 16; r += 4) {
        four_rows(a + r * stride, stride, b, steps, fresh, sums + 16 * r);
        if (TWO) four_rows(more + r * stride, stride, b, steps, fresh, sums + 512 + 16 * r);
    }
}

}  // namespace

#define HFLB_ATTEND hflb_attend_dots
#include "latent_core.h"
#else
extern "C" int hflb_attend_dots(const hflb_attention*, int64_t) { return 2; }
#endif
