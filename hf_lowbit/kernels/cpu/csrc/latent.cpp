// What the package calls.
#include "latent.h"

#include <math.h>

#include "half.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const float NARROWEST = 1e-5f, FARTHEST_ZERO = 32000;  // kernels/latent_codec.py

// Codes of one group of a token, with its scale and zero point, to what latent_codec.encode_rows finds, bit for bit.
void encode_group(const float* values, int64_t rank, int64_t bits, uint16_t* scale_to, int16_t* zero_to, uint8_t* codes) {
    const int64_t each = bits == 3 ? 8 : bits == 4 ? 2 : 1, bytes = bits == 3 ? 3 : 1, words = (rank + each - 1) / each;
    const float most = (float)((1 << bits) - 1);
    float low = values[0], high = values[0], sum = 0;
    for (int64_t i = 0; i < rank; ++i) {
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
        sum += values[i] - values[i];  // NaN if one is not finite
    }
    memset(codes, 0, (size_t)(words * bytes));
    if (sum != 0) {
        *scale_to = 0x7e00, *zero_to = 0;
        return;
    }
    const float range = (high - low < NARROWEST ? NARROWEST : high - low) / most;
    const float far = (fabsf(low) > fabsf(high) ? fabsf(low) : fabsf(high)) / FARTHEST_ZERO;
    *scale_to = hflb_float_to_half(range > far ? range : far);
    const float scale = hflb_half_to_float(*scale_to), zero = rintf(-low / scale);
    *zero_to = (int16_t)zero;
    for (int64_t i = 0; i < rank; ++i) {
        float code = rintf(values[i] / scale) + zero;
        code = code < 0 ? 0 : code > most ? most : code;
        const uint32_t word = (uint32_t)code << (bits * (i / words));
        for (int64_t byte = 0; byte < bytes; ++byte) codes[byte * words + i % words] |= (uint8_t)(word >> (8 * byte));
    }
}

}  // namespace

extern "C" {

// Rows of latents in a dtype of half.h, `stride` numbers apart, become rows of codes, one after the other. `buffer` holds
// as many floats as the widest group.
void hflb_latent_encode(
    const void* latents, int64_t dtype, int64_t rows, int64_t stride, const int64_t* ranks, int64_t groups, int64_t bits,
    float* buffer, uint8_t* to, int64_t row_bytes
) {
    for (int64_t r = 0; r < rows; ++r, to += row_bytes) {
        int64_t place = r * stride;
        uint8_t* codes = to + 4 * groups;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t rank = ranks[g];
            for (int64_t i = 0; i < rank; ++i) buffer[i] = hflb_value(latents, dtype, place + i);
            uint16_t scale;
            int16_t zero;
            encode_group(buffer, rank, bits, &scale, &zero, codes);
            memcpy(to + 2 * g, &scale, 2);
            memcpy(to + 2 * (groups + g), &zero, 2);
            place += rank;
            codes += bits == 3 ? (rank + 7) / 8 * 3 : bits == 4 ? (rank + 1) / 2 : rank;
        }
    }
}

int hflb_latent_abi(void) { return HFLB_LATENT_ABI; }

}  // extern "C"

namespace {

int looked_up_isa() {
    int found = HFLB_NO_TILES;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
    if (wide && __builtin_cpu_supports("avx512bf16")) found = HFLB_DOTS;
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const int tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    // ARCH_REQ_XCOMP_PERM, XTILEDATA
    if (found == HFLB_DOTS && tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0) found = HFLB_TILES;
#endif
#endif
    return found;
}

}  // namespace

extern "C" {

// How this processor multiplies bfloat16, and whether the system lets us. Threads may ask at the same time: none of
// them sees an answer before it is whole.
int hflb_latent_isa(void) {
    static const int found = looked_up_isa();
    return found;
}

// Returns 0, or 2 without memory or where the processor lacks what `isa` asks for.
int hflb_attend(const hflb_attention* a, int64_t isa, int64_t threads) {
    if (isa > hflb_latent_isa()) return 2;
    return isa == HFLB_TILES ? hflb_attend_tiles(a, threads) : isa == HFLB_DOTS ? hflb_attend_dots(a, threads) : 2;
}

}  // extern "C"
