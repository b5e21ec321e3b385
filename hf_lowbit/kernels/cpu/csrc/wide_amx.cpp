// Many tokens with AMX: some rows are unpacked into the cache and multiplied there, tile by tile. Sapphire Rapids and later.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,gfni,f16c,fma,avx2")
#define HFLB_ROUNDS  // the macros of the compiler do not follow the line above
#include <cpuid.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"
#include "expand.h"

namespace {

const int STEP = 32;               // columns of a product of tiles
const int PANEL = 128;             // rows that are unpacked together: with the tokens of some columns they fill a cache
const int PART = 2 * HFLB_TILE;    // rows and tokens of a product of tiles
const int STEPS = 16;              // of columns before the next rows and tokens: what they read stays in the first cache
const int TILE_BYTES = 1024;
const int SUMS = PART * PART;      // of a product

// Columns of an unpacked row: plain ones, filled up to a multiple of STEP, and the slots of the runs.
inline int64_t plain_width(const hflb_weight* w) { return (w->columns + STEP - 1) / STEP * STEP; }
inline int64_t width_of(const hflb_weight* w) { return plain_width(w) + w->runs * HFLB_RUN; }
// Rows lie one line of the cache further apart than they are long, lest all fall onto the same places of it.
inline int64_t stride_of(const hflb_weight* w) { return width_of(w) + 32; }

struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

void configure() {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));  // the compiler's own form claims to read eight bytes only
}

// One token as the unpacked rows have their columns: 0 where a salient column stood, and salient ones in their slots.
void arrange(const hflb_weight* w, const uint16_t* x, uint16_t* to) {
    const int64_t plain = plain_width(w);
    memcpy(to, x, (size_t)w->columns * 2);
    memset(to + w->columns, 0, (size_t)(plain - w->columns) * 2);
    for (int64_t i = 0; i < w->runs * HFLB_RUN; ++i) {
        const int32_t column = w->run_column[i];
        to[plain + i] = column >= 0 ? x[column] : 0;
        if (column >= 0) to[column] = 0;
    }
}

// Sixteen tokens as tiles [step][pair of columns][token]; tokens beyond the last are 0.
void pack_tokens(const hflb_weight* w, const uint16_t* x, int64_t count, uint16_t* rows, uint8_t* to) {
    const int64_t width = width_of(w);
    int64_t at[HFLB_TILE];
    for (int64_t t = 0; t < HFLB_TILE; ++t) {
        at[t] = t * width * 2;
        if (t < count) arrange(w, x + t * w->columns, rows + t * width);
        else memset(rows + t * width, 0, (size_t)width * 2);
    }
    for (int64_t k = 0; k < width; k += STEP, to += TILE_BYTES) {
        Bytes words[16];
        load_rows((const uint8_t*)(rows + k), at, 4, words);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 64 * i, words[i]);
    }
}

// Rows from `row0` on, [PANEL][stride]; 0 beyond the last row and where nothing is.
void unpack_panel(const hflb_weight* w, int64_t row0, uint16_t* to, float* scales) {
    const int64_t stride = stride_of(w), plain = plain_width(w);
    Scales table = {0, 0};
    for (int64_t i = 0; i < PANEL; ++i) {
        uint16_t* own = to + i * stride;
        if (row0 + i >= w->rows) {
            memset(own, 0, (size_t)stride * 2);
            continue;
        }
        const int64_t r = i % HFLB_TILE;
        if (!r) table = gather_scales(w, row0 + i, scales);
        if (w->row_shift || w->keep) expand_row<HFLB_BF16, 1>(w, table, row0 + i, r, own);
        else expand_row<HFLB_BF16, 0>(w, table, row0 + i, r, own);
        memset(own + w->columns, 0, (size_t)(plain - w->columns) * 2);
        if (w->salient_groups > 1) expand_runs<HFLB_BF16, 1>(w, table, row0 + i, r, own + plain, 1);
        else expand_runs<HFLB_BF16, 0>(w, table, row0 + i, r, own + plain, 1);
    }
}

// Adds the products of 32 rows and 32 tokens over some columns to sums in four tiles, each [row][token].
void add_product(const uint16_t* panel, int64_t stride, const uint8_t* tokens, const uint8_t* more, int64_t steps, float* sums) {
    const uint16_t* second = panel + HFLB_TILE * stride;
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, panel + k * STEP, stride * 2);
        _tile_loadd(6, tokens + k * TILE_BYTES, 64);
        _tile_loadd(5, second + k * STEP, stride * 2);
        _tile_loadd(7, more + k * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// One tile [row][token] to y [token][rows], with the bias.
void store_tokens(const hflb_weight* w, const float* tile, int64_t row0, int64_t count, const void* bias, uint16_t* y) {
    const int64_t left = w->rows - row0, rows = left < HFLB_TILE ? left : HFLB_TILE;
    if (rows <= 0) return;
    int64_t at[HFLB_TILE];
    for (int i = 0; i < HFLB_TILE; ++i) at[i] = i * 64;
    Bytes words[16];
    load_rows((const uint8_t*)tile, at, 4, words);  // a transposition
    float extra[HFLB_TILE] = {0};
    for (int64_t i = 0; bias && i < rows; ++i) extra[i] = hflb_value(bias, HFLB_BF16, row0 + i);
    for (int64_t t = 0; t < count; ++t) {
        const Floats value = plus(_mm512_castsi512_ps(words[t]), load(extra));
        if (rows == HFLB_TILE) {
            store_as<HFLB_BF16>(y, t * w->rows + row0, value);
        } else {
            float some[HFLB_TILE];
            store(some, value);
            hflb_store(y, HFLB_BF16, t * w->rows + row0, some, rows);
        }
    }
}

// All tokens with the rows of a panel: sums [block of tokens][part of the rows][four tiles].
void multiply_panel(const hflb_weight* w, const uint16_t* panel, const uint8_t* tokens, int64_t blocks, float* sums) {
    const int64_t all = width_of(w) / STEP, stride = stride_of(w), token_bytes = all * TILE_BYTES;
    memset(sums, 0, (size_t)(PANEL / PART * blocks * SUMS) * 4);
    for (int64_t k = 0; k < all; k += STEPS)
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t part = 0; part < PANEL / PART; ++part) {
                const uint8_t* first = tokens + 2 * block * token_bytes + k * TILE_BYTES;
                const uint16_t* rows = panel + part * PART * stride + k * STEP;
                float* to = sums + (block * (PANEL / PART) + part) * SUMS;
                add_product(rows, stride, first, first + token_bytes, all - k < STEPS ? all - k : STEPS, to);
            }
}

void store_panel(const hflb_weight* w, const float* sums, int64_t row0, int64_t count, const void* bias, uint16_t* y) {
    for (int64_t block = 0; block * PART < count; ++block)
        for (int64_t part = 0; part < PANEL / PART; ++part, sums += SUMS)
            for (int half = 0; half < 2; ++half) {
                const int64_t token = block * PART + half * HFLB_TILE, left = count - token, row = row0 + part * PART;
                const int64_t some = left < HFLB_TILE ? left : HFLB_TILE;
                store_tokens(w, sums + half * 512, row, some, bias, y + token * w->rows);
                store_tokens(w, sums + half * 512 + 256, row + HFLB_TILE, some, bias, y + token * w->rows);
            }
}

}  // namespace

extern "C" {

// Whether processor and system let us use it; asks the system once.
int hflb_has_amx(void) {
    static int found = -1;
    if (found < 0) {
        unsigned a = 0, b = 0, c = 0, d = 0;
        const int there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
        found = there && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    }
    return found;
}

// y = x W^T + bias in bfloat16, x [count][columns], y [count][rows]. Returns 0, or 2 without memory.
int hflb_wide_amx(const hflb_weight* w, const void* x, int64_t count, const void* bias, void* y, int64_t threads) {
    const int64_t width = width_of(w), blocks = (count + PART - 1) / PART, token_bytes = width / STEP * TILE_BYTES;
    const int64_t sums = PANEL / PART * blocks * SUMS, scales = hflb_scale_floats(w), panel = PANEL * stride_of(w) * 2;
    const int64_t own = ((sums + scales) * 4 + panel + 63) / 64 * 64, shared = blocks * 2 * token_bytes + HFLB_TILE * width * 2;
    char* memory = (char*)aligned_alloc(64, (size_t)(shared + threads * own + 127) / 64 * 64);
    if (!memory) return 2;
    uint8_t* tokens = (uint8_t*)memory;
    for (int64_t i = 0; i < blocks * 2; ++i) {
        const int64_t left = count - i * HFLB_TILE;
        const uint16_t* from = (const uint16_t*)x + i * HFLB_TILE * w->columns;
        uint16_t* rows = (uint16_t*)(tokens + blocks * 2 * token_bytes);
        pack_tokens(w, from, left < HFLB_TILE ? left : HFLB_TILE, rows, tokens + i * token_bytes);
    }
    const int64_t panels = (w->rows + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        configure();
        float* buffer = (float*)(memory + shared / 64 * 64 + 64 + part * own);
        uint16_t* weights = (uint16_t*)(buffer + sums);
        for (int64_t p = panels * part / threads; p < panels * (part + 1) / threads; ++p) {
            unpack_panel(w, p * PANEL, weights, (float*)((char*)weights + panel));
            multiply_panel(w, weights, tokens, blocks, buffer);
            store_panel(w, buffer, p * PANEL, count, bias, (uint16_t*)y);
        }
        _tile_release();
    }
    free(memory);
    return 0;
}

}  // extern "C"
#else
#include "binary.h"
extern "C" int hflb_has_amx(void) { return 0; }
extern "C" int hflb_wide_amx(const hflb_weight*, const void*, int64_t, const void*, void*, int64_t) { return 2; }
#endif
