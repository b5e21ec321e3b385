// What the package calls: activations to integers, tiles over threads, results in the caller's dtype.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "binary.h"

namespace {

inline float load_value(const void* from, int64_t dtype, int64_t at) {
    if (dtype == HFLB_F32) return ((const float*)from)[at];
    const uint16_t half = ((const uint16_t*)from)[at];
    if (dtype == HFLB_F16) return hflb_half_to_float(half);
    return hflb_brain_to_float(half);
}

inline void store_value(void* to, int64_t dtype, int64_t at, float value) {
    if (dtype == HFLB_F32) {
        ((float*)to)[at] = value;
    } else if (dtype == HFLB_F16) {
        ((uint16_t*)to)[at] = hflb_float_to_half(value);
    } else {  // round to nearest, ties to even; a NaN stays one
        union { float value; uint32_t bits; } word = {value};
        const uint32_t rounded = word.bits + 0x7fff + (word.bits >> 16 & 1);
        ((uint16_t*)to)[at] = value != value ? 0x7fc0 : (uint16_t)(rounded >> 16);
    }
}

// Largest integer that `planes` signed bytes hold, each from -128 to 127; a little less where floats round.
inline float limit_of(int64_t planes) { return planes == 1 ? 127.0f : planes == 2 ? 32639.0f : 8355000.0f; }

// One group of 128 values as integers with the scale that is given.
inline void digits_of(const float* values, float inverse, int64_t planes, int8_t* to, int32_t* integers) {
    for (int i = 0; i < HFLB_GROUP; ++i) integers[i] = (int32_t)rintf(values[i] * inverse);
    for (int i = 0; i < HFLB_GROUP; ++i) {
        int32_t rest = integers[i];
        for (int64_t p = planes - 1; p >= 0; --p) {
            const int8_t low = (int8_t)(rest & 0xff);
            to[p * HFLB_GROUP + i] = low;
            rest = (rest - low) >> 8;
        }
    }
}

// Values [codes][groups * 128] as integers; codes share a scale. `width`: columns whose sums are wanted.
void to_digits(
    const float* values, int64_t codes, int64_t groups, int64_t planes, int64_t width, int8_t* bytes, float* scale, float* sum
) {
    const int64_t columns = groups * HFLB_GROUP, parts = HFLB_GROUP / width;
    int32_t integers[HFLB_GROUP];
    for (int64_t g = 0; g < groups; ++g) {
        float most = 0.0f;
        for (int64_t h = 0; h < codes; ++h) {
            const float* from = values + h * columns + g * HFLB_GROUP;
            for (int i = 0; i < HFLB_GROUP; ++i) most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
        }
        const float inverse = most > 0.0f ? limit_of(planes) / most : 0.0f;
        scale[g] = most / limit_of(planes);
        const float safe = inverse <= 3.0e38f ? inverse : 0.0f;  // a denormal maximum: its reciprocal overflows
        for (int64_t h = 0; h < codes; ++h) {
            digits_of(
                values + h * columns + g * HFLB_GROUP, safe, planes, bytes + (h * groups + g) * planes * HFLB_GROUP, integers
            );
            for (int64_t part = 0; part < parts; ++part) {
                int64_t total = 0;
                for (int64_t i = part * width; i < (part + 1) * width; ++i) total += integers[i];
                sum[(h * groups + g) * parts + part] = (float)total * scale[g];
            }
        }
    }
}

struct Sizes {
    int64_t groups, run_groups, codes, planes;
    int64_t token_bytes, token_floats;
};

Sizes sizes_of(const hflb_weight* w, int64_t planes) {
    Sizes z;
    z.groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP;
    z.run_groups = w->runs / 8;
    z.codes = w->salient_groups;
    z.planes = planes;
    z.token_bytes = planes * HFLB_GROUP * (w->groups * z.groups + 2 * z.codes * z.run_groups);
    z.token_floats = z.groups * (1 + w->groups) + 2 * (z.run_groups + z.codes * w->runs);
    return z;
}

// Activations of one token; returns 0 if they hold NaN or infinity, which have no integer.
int make_token(const hflb_weight* w, const Sizes* z, const void* x, int64_t dtype, float* values, int8_t* bytes, float* floats, hflb_token* out) {
    const int64_t padded = z->groups * HFLB_GROUP, slots = w->runs * HFLB_RUN;
    float* raw = values;           // [padded]
    float* scaled = raw + padded;  // [max(groups * padded, codes * slots)]
    float check = 0.0f;
    for (int64_t j = 0; j < w->columns; ++j) {
        raw[j] = load_value(x, dtype, j);
        check += raw[j] * 0.0f;
    }
    if (check != 0.0f) return 0;  // NaN
    for (int64_t h = 0; h < w->groups; ++h)
        for (int64_t j = 0; j < padded; ++j)
            scaled[h * padded + j] = j < w->columns ? raw[j] * w->plain_scale[h * padded + j] : 0.0f;
    out->plain.bytes = bytes, out->plain.scale = floats, out->plain.sum = floats + z->groups;
    to_digits(scaled, w->groups, z->groups, z->planes, HFLB_GROUP, bytes, floats, floats + z->groups);
    bytes += w->groups * z->groups * z->planes * HFLB_GROUP;
    floats += z->groups * (1 + w->groups);
    for (int part = 0; part < 2 && z->codes; ++part) {
        const float* column_scale = part ? w->second_scale : w->first_scale;
        for (int64_t h = 0; h < z->codes; ++h)
            for (int64_t i = 0; i < slots; ++i) {
                const float own = column_scale[h * slots + i];
                scaled[h * slots + i] = own != 0.0f ? raw[w->run_column[i]] * own : 0.0f;
            }
        hflb_digits* to = part ? &out->second : &out->first;
        to->bytes = bytes, to->scale = floats, to->sum = floats + z->run_groups;
        to_digits(scaled, z->codes, z->run_groups, z->planes, HFLB_RUN, bytes, floats, floats + z->run_groups);
        bytes += z->codes * z->run_groups * z->planes * HFLB_GROUP;
        floats += z->run_groups + z->codes * w->runs;
    }
    return 1;
}

hflb_tile tile_of(int64_t isa) {
    return isa == HFLB_AVX512 ? hflb_tile_avx512 : isa == HFLB_AVX2 ? hflb_tile_avx2 : hflb_tile_portable;
}

hflb_expand expand_of(int64_t isa) {
    return isa == HFLB_AVX512 ? hflb_expand_avx512 : isa == HFLB_AVX2 ? hflb_expand_avx2 : hflb_expand_portable;
}

// Finite floats to bfloat16; a loop that compilers turn into vectors.
inline void store_brains(uint16_t* to, const float* from, int64_t count) {
    const uint32_t* bits = (const uint32_t*)from;
    for (int64_t j = 0; j < count; ++j) to[j] = (uint16_t)((bits[j] + 0x7fff + (bits[j] >> 16 & 1)) >> 16);
}

void* aligned(int64_t size) { return aligned_alloc(64, (size_t)((size + 127) / 64 * 64)); }

}  // namespace

extern "C" {

int hflb_abi(void) { return HFLB_ABI; }

// The best instruction set of this processor.
int hflb_isa(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return HFLB_PORTABLE;
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
    return wide ? HFLB_AVX512 : HFLB_AVX2;
#else
    return HFLB_PORTABLE;
#endif
}

// y = x W^T + bias for `count` tokens, x [count][columns] and y [count][rows] contiguous, bias [rows] in the dtype of x.
// Returns 0, 1 if the activations hold NaN or infinity (y is not written then), 2 without memory.
int hflb_linear(
    const hflb_weight* w, const void* x, int64_t dtype, int64_t count, const void* bias, void* y, int64_t planes, int64_t isa,
    int64_t threads
) {
    if (count <= 0 || w->rows <= 0) return 0;
    const Sizes z = sizes_of(w, planes);
    const int64_t padded = z.groups * HFLB_GROUP, slots = w->runs * HFLB_RUN;
    const int64_t most = w->groups * padded > z.codes * slots ? w->groups * padded : z.codes * slots;
    const int64_t shifts = w->row_shift ? 1 : 0;
    const int64_t per_token =
        HFLB_TILE * ((1 + shifts) * w->groups * z.groups + (2 + shifts) * z.codes * w->runs) + HFLB_TILE;
    const int64_t row_bytes = 8 * (z.groups * 16 + 64) + 16 * (z.run_groups * 16 + 64);  // a pair of rows
    // every thread has its own part, a multiple of 64 bytes
    const int64_t per_thread = ((count * per_token) * 4 + row_bytes + 63) / 64 * 64;
    int8_t* bytes = (int8_t*)aligned(count * z.token_bytes);
    float* floats = (float*)aligned(4 * (count * z.token_floats + padded + most));
    hflb_token* tokens = (hflb_token*)aligned(count * (int64_t)sizeof(hflb_token));
    char* scratch = (char*)aligned(threads * per_thread);
    int result = bytes && floats && tokens && scratch ? 0 : 2;
    for (int64_t m = 0; m < count && !result; ++m) {
        const char* own = (const char*)x + m * w->columns * (dtype == HFLB_F32 ? 4 : 2);
        float* at = floats + padded + most + m * z.token_floats;
        if (!make_token(w, &z, own, dtype, floats, bytes + m * z.token_bytes, at, tokens + m)) result = 1;
    }
    if (!result) {
        const hflb_tile tile = tile_of(isa);
        const int64_t tiles = (w->rows + HFLB_TILE - 1) / HFLB_TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t part = 0; part < threads; ++part) {
            float* own = (float*)(scratch + part * per_thread);
            float* out = own;  // [count][16]
            const hflb_work work = {w, tokens, count, planes, own + count * HFLB_TILE};
            for (int64_t t = tiles * part / threads; t < tiles * (part + 1) / threads; ++t) {
                const int64_t row0 = t * HFLB_TILE, left = w->rows - row0;
                tile(&work, row0, out);
                for (int64_t m = 0; m < count; ++m)
                    for (int64_t r = 0; r < (left < HFLB_TILE ? left : HFLB_TILE); ++r) {
                        const float extra = bias ? load_value(bias, dtype, row0 + r) : 0.0f;
                        store_value(y, dtype, m * w->rows + row0 + r, out[m * HFLB_TILE + r] + extra);
                    }
            }
        }
    }
    free(bytes);
    free(floats);
    free(tokens);
    free(scratch);
    return result;
}

// Rows from `begin` to `end` of the dense weight, [end - begin][columns] in a dtype. Returns 0, or 2 without memory.
int hflb_dequantize(const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t isa, int64_t threads) {
    const int64_t padded = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP * HFLB_GROUP;
    const hflb_expand expand = expand_of(isa);
    float* scratch = (float*)aligned(threads * (padded + HFLB_RUN) * 4);
    if (!scratch) return 2;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        float* row = scratch + part * (padded + HFLB_RUN);
        for (int64_t r = begin + (end - begin) * part / threads; r < begin + (end - begin) * (part + 1) / threads; ++r) {
            expand(w, r, row, row + padded);
            if (dtype == HFLB_F32) {
                memcpy((float*)out + (r - begin) * w->columns, row, (size_t)w->columns * 4);
            } else if (dtype == HFLB_BF16) {
                store_brains((uint16_t*)out + (r - begin) * w->columns, row, w->columns);
            } else {
                for (int64_t j = 0; j < w->columns; ++j) store_value(out, dtype, (r - begin) * w->columns + j, row[j]);
            }
        }
    }
    free(scratch);
    return 0;
}

}  // extern "C"
