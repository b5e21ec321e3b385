// Many tokens whose activations are integers of one byte, with AMX: tiles of 16 rows by 16 tokens. Sapphire Rapids and
// later. Some rows at a time are unpacked into a cache as signed bytes, zero points taken off.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,f16c,fma,avx2,bmi2")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms in the compiler's own headers
#define HFLI_WIDE
#include <cpuid.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"
#include "integer_x86.h"

namespace {

const int SIDE = 16;       // rows and tokens of a tile
const int PANEL = 128;     // rows that are unpacked together: with the tokens of some columns they fill a cache
const int BATCH = 4;       // blocks of tokens whose sums are kept while the columns pass
const int CHUNK = 512;     // columns that pass at once: what they read of one side stays in the first cache
const int AREA = SIDE * SIDE;

struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// Products of `step` columns: tile 0 sums, 1 rows of the weight, 2 tokens.
void configure(int64_t step) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    config.bytes[0] = 64, config.rows[0] = SIDE;
    config.bytes[1] = (uint16_t)step, config.rows[1] = SIDE;
    config.bytes[2] = 64, config.rows[2] = (uint8_t)(step / 4);
    asm volatile("ldtilecfg %0" ::"m"(config));  // the compiler's own form claims to read eight bytes only
}

// What does not change from panel to panel.
struct Plan {
    const hfli_weight* w;
    int64_t shared, scales;  // columns of an activation's scale, and their number
    int64_t stretch, stretches;  // columns that have one scale on both sides, and their number
    int64_t step, steps;     // columns of a product of tiles, and how many a row has, filled up with zeros
    int64_t width, stride;   // of an unpacked row; one line of the cache more, lest all fall onto the same places of it
    int64_t blocks;          // of 16 tokens
    int8_t* tokens;          // [blocks][steps][step / 4][16][4]
    float* token_scale;      // [blocks][scales][16]
};

// Sixteen tokens from `first` on; those beyond the last are 0.
void pack_tokens(const Plan* p, const int8_t* codes, const float* scale, int64_t first, int64_t count, int8_t* to, float* scales) {
    const int64_t n = p->w->columns;
    memset(to, 0, (size_t)(p->width * SIDE));
    memset(scales, 0, (size_t)(p->scales * SIDE) * 4);
    for (int64_t t = 0; t < SIDE && first + t < count; ++t) {
        const int8_t* from = codes + (first + t) * n;
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) memcpy(to + j * SIDE + 4 * t, from + j, 4);
        for (; j < n; ++j) to[j / 4 * 4 * SIDE + 4 * t + j % 4] = from[j];
        for (int64_t g = 0; g < p->scales; ++g) scales[g * SIDE + t] = scale[(first + t) * p->scales + g];
    }
}

// Codes of a row less the middle of their range; up to 63 more bytes are written.
template <int BITS>
void unpack_signed(const hfli_weight* w, int64_t row, int8_t* to) {
    const uint8_t* from = w->codes + row * w->row_bytes;
    const int64_t n = w->columns;
    const __m512i less = _mm512_set1_epi8((char)(1 << (BITS - 1)));
    for (int64_t j = 0; j < n; j += 64, from += 8 * BITS) {
        uint8_t last[64] = {0};
        const uint8_t* source = from;
        if (n - j < 64) memcpy(last, from, (size_t)((n - j) * BITS + 7) / 8), source = last;
        _mm512_storeu_si512(to + j, _mm512_sub_epi8(many_codes<BITS>(source), less));
    }
}

// Takes off what zero points are above the middle of the range, at most 4 bits. Groups are multiples of 16 columns or one.
void take_zeros_off(const hfli_weight* w, int64_t row, int8_t* to) {
    const int middle = 1 << (w->bits - 1), mask = (1 << w->bits) - 1;
    for (int64_t g = 0; g < w->groups; ++g) {
        const uint8_t* from = w->zero + row * w->zero_bytes + g * w->bits / 8;
        const int shift = (int)(g * w->bits % 8);
        const int code = (shift + w->bits > 8 ? from[0] | from[1] << 8 : from[0]) >> shift & mask;
        const int64_t start = g * w->group_size, end = start + w->group_size < w->columns ? start + w->group_size : w->columns;
        const __m128i less = _mm_set1_epi8((char)(code - middle));
        for (int64_t j = start; j < end; j += 16) {
            __m128i* at = (__m128i*)(to + j);
            _mm_storeu_si128(at, _mm_sub_epi8(_mm_loadu_si128(at), less));
        }
    }
}

// Rows from `row0` on, [PANEL][stride], and their scales, [PANEL][groups]; 0 beyond the last row and column.
void unpack_panel(const hfli_weight* w, const Plan* p, int64_t row0, int8_t* to, float* scales) {
    for (int64_t i = 0; i < PANEL; ++i) {
        int8_t* own = to + i * p->stride;
        const int64_t row = row0 + i;
        if (row >= w->rows) {
            memset(own, 0, (size_t)p->stride);
            memset(scales + i * w->groups, 0, (size_t)w->groups * 4);
            continue;
        }
        if (w->bits == 2) unpack_signed<2>(w, row, own);
        else if (w->bits == 3) unpack_signed<3>(w, row, own);
        else if (w->bits == 4) unpack_signed<4>(w, row, own);
        else unpack_signed<8>(w, row, own);
        for (int64_t g = 0; g < w->groups; ++g) scales[i * w->groups + g] = hflb_value(w->scale, w->scale_dtype, row * w->groups + g);
        if (w->zero) take_zeros_off(w, row, own);
        memset(own + w->columns, 0, (size_t)(p->stride - w->columns));
    }
}

// Adds the products of 16 rows and 16 tokens over some stretches to sums [row][token], which stay in registers.
void add_product(
    const Plan* p, const int8_t* rows, const float* row_scale, const int8_t* tokens, const float* token_scale, int64_t first,
    int64_t last, float* sums
) {
    const hfli_weight* w = p->w;
    alignas(64) int32_t tile[AREA];
    __m512 sum[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; ++i) sum[i] = load(sums + i * SIDE);
    for (int64_t s = first; s < last; ++s) {
        const int64_t column = s * p->stretch, end = column + p->stretch < p->width ? column + p->stretch : p->width;
        _tile_zero(0);
        for (int64_t j = column; j < end; j += p->step) {
            _tile_loadd(1, rows + j, p->stride);
            _tile_loadd(2, tokens + j * SIDE, 64);
            _tile_dpbssd(0, 1, 2);
        }
        _tile_stored(0, tile, 64);
        const __m512 own = load(token_scale + column / p->shared * SIDE);
        const float* group = row_scale + column / w->group_size;
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; ++i) {
            const __m512 factor = _mm512_mul_ps(own, _mm512_set1_ps(group[i * w->groups]));
            sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(tile + i * SIDE)), factor, sum[i]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; ++i) store(sums + i * SIDE, sum[i]);
}

// Sums [row][token] to y [token][rows], with the bias.
void store_tokens(const hfli_weight* w, const float* sums, int64_t row0, int64_t token0, int64_t count, const void* bias, void* y, int64_t dtype) {
    const int64_t rows = w->rows - row0 < SIDE ? w->rows - row0 : SIDE, tokens = count - token0 < SIDE ? count - token0 : SIDE;
    float extra[SIDE] = {0};
    for (int64_t i = 0; bias && i < rows; ++i) extra[i] = hflb_value(bias, dtype, row0 + i);
    int64_t at[SIDE];
    Bytes turned[SIDE];
    for (int i = 0; i < SIDE; ++i) at[i] = i * 64;
    load_rows((const uint8_t*)sums, at, 4, turned);  // a transposition
    for (int64_t t = 0; t < tokens; ++t) {
        float some[SIDE];
        store(some, plus(_mm512_castsi512_ps(turned[t]), load(extra)));
        hflb_store(y, dtype, (token0 + t) * w->rows + row0, some, rows);
    }
}

void multiply_panel(const Plan* p, const int8_t* panel, const float* scales, int64_t row0, int64_t count, const void* bias, void* y, int64_t dtype, float* sums) {
    const hfli_weight* w = p->w;
    const int64_t left = w->rows - row0, parts = ((left < PANEL ? left : PANEL) + SIDE - 1) / SIDE;
    const int64_t pass = CHUNK > p->stretch ? CHUNK / p->stretch : 1;  // stretches at once
    for (int64_t b0 = 0; b0 < p->blocks; b0 += BATCH) {
        const int64_t some = p->blocks - b0 < BATCH ? p->blocks - b0 : BATCH;
        memset(sums, 0, (size_t)(some * parts * AREA) * 4);
        for (int64_t s = 0; s < p->stretches; s += pass)
            for (int64_t b = 0; b < some; ++b)
                for (int64_t r = 0; r < parts; ++r)
                    add_product(
                        p, panel + r * SIDE * p->stride, scales + r * SIDE * w->groups, p->tokens + (b0 + b) * p->width * SIDE,
                        p->token_scale + (b0 + b) * p->scales * SIDE, s, s + pass < p->stretches ? s + pass : p->stretches,
                        sums + (b * parts + r) * AREA
                    );
        for (int64_t b = 0; b < some; ++b)
            for (int64_t r = 0; r < parts; ++r)
                store_tokens(w, sums + (b * parts + r) * AREA, row0 + r * SIDE, (b0 + b) * SIDE, count, bias, y, dtype);
    }
}

inline int64_t filled(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

extern "C" {

// Whether processor and system let us use it; asks the system once.
int hfli_has_amx(void) {
    static int found = -1;
    if (found < 0) {
        unsigned a = 0, b = 0, c = 0, d = 0;
        const int there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
        found = there && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    }
    return found;
}

// What hfli_product computes. Scales of both sides must be those of a multiple of 16 columns each, one a multiple of the
// other, unless they are those of a whole row; no zero points with 8 bits. Returns 0, 2 without memory, 3 if it cannot.
int hfli_product_amx(
    const hfli_job* job, const int8_t* codes, const float* scale, int64_t shared, int64_t dtype, int64_t count, int64_t threads
) {
    const hfli_weight* w = job->weight;
    const int64_t n = w->columns;
    Plan p;
    p.w = w, p.shared = shared, p.scales = (n + shared - 1) / shared;
    const int64_t own = w->groups == 1 ? n : w->group_size, other = p.scales == 1 ? n : shared;
    const int64_t small = own < other ? own : other, large = own < other ? other : own;
    const int whole = small == n;
    if ((w->bits == 8 && w->zero) || (!whole && (small % 16 || (large != n && large % small)))) return 3;
    p.step = whole || small % 64 == 0 ? 64 : small % 32 == 0 ? 32 : 16;
    p.steps = (n + p.step - 1) / p.step, p.width = p.steps * p.step, p.stride = p.width + 64;
    p.stretch = whole ? p.width : small, p.stretches = (n + p.stretch - 1) / p.stretch;
    p.blocks = (count + SIDE - 1) / SIDE;
    const int64_t panel = filled(PANEL * p.stride), scales = filled(PANEL * w->groups * 4), sums = BATCH * PANEL * SIDE * 4;
    const int64_t tokens = filled(p.blocks * p.width * SIDE), token_scales = filled(p.blocks * p.scales * SIDE * 4);
    char* memory = (char*)aligned_alloc(64, (size_t)(tokens + token_scales + threads * (panel + scales + sums)));
    if (!memory) return 2;
    p.tokens = (int8_t*)memory, p.token_scale = (float*)(memory + tokens);
    const int64_t panels = (w->rows + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p.blocks; ++b)
            pack_tokens(&p, codes, scale, b * SIDE, count, p.tokens + b * p.width * SIDE, p.token_scale + b * p.scales * SIDE);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part) {
            char* mine = memory + tokens + token_scales + part * (panel + scales + sums);
            configure(p.step);
            for (int64_t i = panels * part / threads; i < panels * (part + 1) / threads; ++i) {
                unpack_panel(w, &p, i * PANEL, (int8_t*)mine, (float*)(mine + panel));
                multiply_panel(
                    &p, (int8_t*)mine, (float*)(mine + panel), i * PANEL, count, job->bias, job->y, dtype,
                    (float*)(mine + panel + scales)
                );
            }
            _tile_release();
        }
    }
    free(memory);
    return 0;
}

// What hfli_linear computes, for one weight and many tokens: each digit of the activations is a token of its own. Returns
// what it does, and 3 if it cannot.
int hfli_linear_amx(
    const hfli_job* job, const void* x, int64_t dtype, int64_t count, int64_t digits, int64_t threads
) {
    const hfli_weight* w = job->weight;
    const int64_t n = w->columns, rows = w->rows, scales = (n + HFLI_SHARED - 1) / HFLI_SHARED;
    const int64_t planes = filled(count * digits * n), parts = filled(count * digits * scales * 4);
    const int64_t values = filled((scales * HFLI_SHARED + 16) * 4), products = filled(count * digits * rows * 4);
    char* memory = (char*)aligned_alloc(64, (size_t)(planes + parts + values + products));
    if (!memory) return 2;
    int8_t* codes = (int8_t*)memory;
    float *scale = (float*)(memory + planes), *product = (float*)(memory + planes + parts + values);
    int32_t* value = (int32_t*)(memory + planes + parts);
    int failed = 0;
    for (int64_t t = 0; t < count && !failed; ++t) {
        float* own = scale + t * digits * scales;
        failed = !hfli_avx512.integers(x, dtype, t * n, n, digits, value, own);
        for (int64_t d = digits - 1; d >= 0 && !failed; --d) {
            int8_t* plane = codes + (t * digits + d) * n;
            for (int64_t j = 0; j < n; ++j) {
                const int32_t v = value[j];
                plane[j] = (int8_t)v, value[j] = (v - (int8_t)v) >> 8;
            }
            for (int64_t g = 0; d && g < scales; ++g) own[d * scales + g] = own[g];
        }
        float factor = 256.0f;
        for (int64_t d = digits - 2; d >= 0 && !failed; --d, factor *= 256.0f)
            for (int64_t g = 0; g < scales; ++g) own[d * scales + g] *= factor;
    }
    if (!failed) {
        const hfli_job whole = {w, 0, product};
        failed = hfli_product_amx(&whole, codes, scale, HFLI_SHARED, HFLB_F32, count * digits, threads);
    }
    for (int64_t t = 0; t < count && !failed; ++t) {
        float* sum = product + t * digits * rows;
        for (int64_t d = 1; d < digits; ++d)
            for (int64_t r = 0; r < rows; ++r) sum[r] += sum[d * rows + r];
        for (int64_t r = 0; job->bias && r < rows; ++r) sum[r] += hflb_value(job->bias, dtype, r);
        hflb_store(job->y, dtype, t * rows, sum, rows);
    }
    free(memory);
    return failed;
}

}  // extern "C"
#else
#include "integer.h"
extern "C" int hfli_has_amx(void) { return 0; }
extern "C" int hfli_product_amx(const hfli_job*, const int8_t*, const float*, int64_t, int64_t, int64_t, int64_t) { return 3; }
extern "C" int hfli_linear_amx(const hfli_job*, const void*, int64_t, int64_t, int64_t, int64_t) { return 3; }
#endif
