// With AMX: Sapphire Rapids and later.
#include "latent.h"
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,gfni,f16c,fma,avx2")
#define HFLB_ROUNDS
#include "avx512.h"

namespace {

struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

inline void begin_products() {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));  // the compiler's own form claims to read eight bytes only
}

inline void end_products() { _tile_release(); }

// Sixteen rows of a, or twice sixteen, by two tiles of columns: sums [2][2][16][16]. `b` is [steps][2][16][16] pairs.
template <bool TWO>
inline void multiply(const uint16_t* a, const uint16_t* more, int64_t stride, const uint8_t* b, int64_t steps, bool fresh, float* sums) {
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if (TWO) _tile_loadd(2, sums + 512, 64);
        if (TWO) _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, a + 32 * k, stride * 2);
        _tile_loadd(6, b + 2048 * k, 64);
        _tile_loadd(7, b + 2048 * k + 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) _tile_loadd(5, more + 32 * k, stride * 2);
        if (TWO) _tile_dpbf16ps(2, 5, 6);
        if (TWO) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (TWO) _tile_stored(2, sums + 512, 64);
    if (TWO) _tile_stored(3, sums + 768, 64);
}

}  // namespace

#define HFLB_ATTEND hflb_attend_tiles
#include "latent_core.h"
#else
extern "C" int hflb_attend_tiles(const hflb_attention*, int64_t) { return 2; }
#endif
