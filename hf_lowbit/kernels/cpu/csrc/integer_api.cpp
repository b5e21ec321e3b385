// The interface of the library: chooses the instruction set, allocates, shares rows out to threads.
#include <stdlib.h>
#include <string.h>

#include "integer.h"

namespace {

const int64_t TOKENS = 16;  // at once: their integers are to stay in a cache

const hfli_kernels* kernels_of(int64_t isa) {
    return isa == HFLI_AVX512 ? &hfli_avx512 : isa == HFLI_AVX2 ? &hfli_avx2 : &hfli_portable;
}

// Pieces of one allocation, each on a line of the cache. Without a base the bytes are counted only.
struct Pieces {
    char* base;
    int64_t used;
    template <class T>
    T* take(int64_t count) {
        char* piece = base ? base + used : 0;
        used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return (T*)piece;
    }
};

char* aligned(int64_t size) { return (char*)aligned_alloc(64, (size_t)((size + 127) / 64 * 64)); }

hfli_token take_token(Pieces* from, const hfli_weight* w, int64_t lanes, int64_t digits) {
    const int64_t blocks = hfli_blocks(w, lanes);
    hfli_token token;
    token.digits = from->take<int8_t>(blocks * digits * lanes * hfli_lane_columns(w->bits));
    token.start = from->take<int32_t>(blocks * lanes * (digits == 3 ? 2 : 1));
    token.scale = from->take<float>(blocks * lanes);
    token.sum = from->take<float>(w->groups);
    return token;
}

void groups_of_lanes(const hfli_weight* w, int64_t lanes, int32_t* to) {
    const int64_t columns = hfli_lane_columns(w->bits);
    for (int64_t i = 0; i < hfli_blocks(w, lanes) * lanes; ++i) {
        const int64_t group = i * columns / w->group_size;
        to[i] = (int32_t)(group < w->groups ? group : w->groups - 1);
    }
}

// Integers of the activations of some tokens, where they come from.
struct Source {
    const void* x;           // [count][columns], in a dtype; or null:
    const int8_t* codes;     // [count][columns]
    const float* scale;      // [count][ceil(columns / shared)]
    int64_t dtype, shared, digits;
};

// Some tokens with one weight, from token `from` on.
int some_tokens(const hfli_job* job, const Source* source, int64_t from, int64_t count, int64_t dtype, int64_t isa, int64_t threads) {
    const hfli_kernels* kernels = kernels_of(isa);
    const hfli_weight* w = job->weight;
    const int64_t lanes = kernels->lanes, blocks = hfli_blocks(w, lanes), digits = source->digits;
    const int64_t filled = blocks * lanes * hfli_lane_columns(w->bits) + HFLI_SHARED, tables = hfli_row_floats(w);
    const int64_t scales = (w->columns + source->shared - 1) / source->shared;
    Pieces memory = {0, 0};
    hfli_token tokens[TOKENS];
    int32_t *groups = 0, *values = 0;
    float *own = 0, *buffers = 0;
    for (int pass = 0; pass < 2; ++pass) {  // the first one counts
        if (pass) memory.base = aligned(memory.used), memory.used = 0;
        if (pass && !memory.base) return 2;
        groups = memory.take<int32_t>(blocks * lanes);
        values = memory.take<int32_t>(filled);
        own = memory.take<float>(w->columns / HFLI_SHARED + 1);
        buffers = memory.take<float>(tables * threads);
        for (int64_t t = 0; t < count; ++t) tokens[t] = take_token(&memory, w, lanes, digits);
    }
    groups_of_lanes(w, lanes, groups);
    memset(values, 0, (size_t)filled * 4);
    int failed = 0;
    for (int64_t t = 0; t < count && !failed; ++t) {
        const int64_t at = (from + t) * w->columns;
        const float* scale = own;
        if (source->x) {
            failed = !kernels->integers(source->x, source->dtype, at, w->columns, digits, values, own);
        } else {
            for (int64_t j = 0; j < w->columns; ++j) values[j] = source->codes[at + j];
            scale = source->scale + (from + t) * scales;
        }
        if (!failed) kernels->arrange(w, values, scale, source->shared, digits, tokens + t);
    }
    const int64_t width = dtype == HFLB_F32 ? 4 : 2;
    const hfli_work work = {w, tokens, groups, count, digits, job->bias, (char*)job->y + from * w->rows * width, dtype};
#pragma omp parallel for num_threads(threads) if (threads > 1 && !failed) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        const int64_t first = w->rows * part / threads, last = w->rows * (part + 1) / threads;
        if (!failed) kernels->rows(&work, first, last, buffers + part * tables);
    }
    free(memory.base);
    return failed;
}

}  // namespace

extern "C" {

int hfli_abi(void) { return HFLI_ABI; }

// The best instruction set of this processor.
int hfli_isa(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return HFLI_PORTABLE;
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                     __builtin_cpu_supports("gfni");
    return wide ? HFLI_AVX512 : HFLI_AVX2;
#else
    return HFLI_PORTABLE;
#endif
}

// y = x W^T + bias for `count` tokens and each of `n` weights with as many columns, x [count][columns] and each y
// [count][rows] contiguous, bias [rows] in the dtype of x. Returns 0, 1 if the activations hold NaN or infinity (y is not
// complete then), 2 without memory.
int hfli_linear(
    const hfli_job* jobs, int64_t n, const void* x, int64_t dtype, int64_t count, int64_t digits, int64_t isa, int64_t threads
) {
    const Source source = {x, 0, 0, dtype, HFLI_SHARED, digits};
    int failed = 0;
    for (int64_t i = 0; i < n && !failed; ++i)
        for (int64_t m = 0; m < count && !failed; m += TOKENS)
            failed = some_tokens(jobs + i, &source, m, count - m < TOKENS ? count - m : TOKENS, dtype, isa, threads);
    return failed;
}

// The same for activations that are integers of one byte, codes [count][columns], with a scale for `shared` columns,
// scale [count][ceil(columns / shared)]; y and bias in a dtype.
int hfli_product(
    const hfli_job* job, const int8_t* codes, const float* scale, int64_t shared, int64_t dtype, int64_t count, int64_t isa,
    int64_t threads
) {
    const Source source = {0, codes, scale, 0, shared, 1};
    int failed = 0;
    for (int64_t m = 0; m < count && !failed; m += TOKENS)
        failed = some_tokens(job, &source, m, count - m < TOKENS ? count - m : TOKENS, dtype, isa, threads);
    return failed;
}

// Codes [count][columns] and scales [count][ceil(columns / group_size)] of tokens x [count][columns]. Returns 0, 1 if one
// is not finite, 2 without memory.
int hfli_round(
    const hfli_transform* how, const void* x, int64_t dtype, int64_t count, int8_t* codes, float* scale, int64_t isa,
    int64_t threads
) {
    const hfli_kernels* kernels = kernels_of(isa);
    const int64_t n = how->columns, groups = (n + how->group_size - 1) / how->group_size;
    const int64_t own = (2 * (n + kernels->lanes) + 15) / 16 * 16;
    float* buffers = (float*)aligned(threads * own * 4);
    if (!buffers) return 2;
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(| : failed)
    for (int64_t part = 0; part < threads; ++part)
        for (int64_t t = count * part / threads; t < count * (part + 1) / threads; ++t)
            failed |= !kernels->round_token(how, x, dtype, t * n, buffers + part * own, codes + t * n, scale + t * groups);
    free(buffers);
    return failed;
}

// Rows from `begin` to `end` of the dense weight in a dtype, [end - begin][columns]. Returns 0, or 2 without memory.
int hfli_dequantize(
    const hfli_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t isa, int64_t threads
) {
    const int64_t stride = w->columns * (dtype == HFLB_F32 ? 4 : 2), tables = hfli_row_floats(w);
    float* buffers = (float*)aligned(threads * tables * 4);
    if (!buffers) return 2;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        const int64_t first = (end - begin) * part / threads, last = (end - begin) * (part + 1) / threads;
        kernels_of(isa)->expand(
            w, begin + first, begin + last, (char*)out + first * stride, dtype, buffers + part * tables
        );
    }
    free(buffers);
    return 0;
}

}  // extern "C"
