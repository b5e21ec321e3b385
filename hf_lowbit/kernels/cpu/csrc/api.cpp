// What the package calls: memory, tiles over threads.
#include <stdlib.h>

#include "binary.h"

namespace {

const int64_t TOKENS = 32;  // at once, for memory's sake

const hflb_kernels* kernels_of(int64_t isa) {
    return isa >= HFLB_AVX512 ? &hflb_avx512 : isa == HFLB_AVX2 ? &hflb_avx2 : &hflb_portable;
}

// Buffers one after the other in one piece of memory, each aligned. First all are counted, then placed.
struct Pieces {
    char* base;
    int64_t used;
    template <class T>
    T* take(int64_t count) {
        T* found = (T*)(base + used);
        used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return found;
    }
};

struct Buffers {
    hflb_token* tokens;
    float* values;
};

hflb_digits digits_in(Pieces* from, int64_t codes, int64_t groups, int64_t sums, int64_t digits) {
    hflb_digits out;
    out.bytes = from->take<int8_t>(codes * groups * digits * HFLB_GROUP);
    out.scale = from->take<float>(groups);
    out.sum = from->take<int32_t>(codes * sums);
    return out;
}

// With `fill`, the tokens get their buffers; else only the size is counted.
Buffers buffers_in(Pieces* from, const hflb_weight* w, int64_t count, int64_t digits, bool fill) {
    const int64_t groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP, padded = groups * HFLB_GROUP;
    const int64_t run_groups = w->runs / 8, S = w->salient_groups, plain = w->groups * padded, slots = S * w->runs * HFLB_RUN;
    Buffers out;
    out.tokens = from->take<hflb_token>(count);
    out.values = from->take<float>(padded + (plain > slots ? plain : slots));
    for (int64_t m = 0; m < count; ++m) {
        hflb_token token;
        token.plain = digits_in(from, w->groups, groups, groups, digits);
        token.first = digits_in(from, S, run_groups, w->runs, digits);
        token.second = digits_in(from, S, run_groups, w->runs, digits);
        if (fill) out.tokens[m] = token;
    }
    return out;
}

void* aligned(int64_t size) { return aligned_alloc(64, (size_t)((size + 127) / 64 * 64)); }

// Some tokens with all weights that read them. Strips of all weights are shared out together.
int some_tokens(
    const hflb_job* jobs, int64_t n, int64_t from, const void* x, int64_t dtype, int64_t count, int64_t digits, int64_t isa,
    int64_t threads
) {
    const hflb_kernels* kernels = kernels_of(isa);
    const int64_t width = dtype == HFLB_F32 ? 4 : 2;
    Pieces size = {0, 0};
    size.take<hflb_work>(n);
    for (int64_t i = 0; i < n; ++i) buffers_in(&size, jobs[i].weight, count, digits, false);
    Pieces memory = {(char*)aligned(size.used), 0};
    if (!memory.base) return 2;
    hflb_work* works = memory.take<hflb_work>(n);
    int result = 0;
    int64_t strips = 0;
    for (int64_t i = 0; i < n && !result; ++i) {
        const hflb_weight* w = jobs[i].weight;
        const Buffers own = buffers_in(&memory, w, count, digits, true);
        for (int64_t m = 0; m < count && !result; ++m) {
            const char* token = (const char*)x + (from + m) * w->columns * width;
            result = !kernels->make_token(w, token, dtype, digits, own.values, own.tokens + m);
        }
        works[i] = {w, own.tokens, count, digits, jobs[i].bias, (char*)jobs[i].y + from * w->rows * width, dtype};
        strips += (w->rows + HFLB_STRIP - 1) / HFLB_STRIP;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && !result) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        int64_t first = strips * part / threads, last = strips * (part + 1) / threads;
        for (int64_t i = 0; i < n && !result; ++i) {
            const int64_t rows = works[i].weight->rows, own = (rows + HFLB_STRIP - 1) / HFLB_STRIP;
            for (int64_t strip = first < 0 ? 0 : first; strip < own && strip < last; ++strip) {
                const int64_t row = strip * HFLB_STRIP, end = row + HFLB_STRIP;
                kernels->rows(works + i, row, end < rows ? end : rows);  // all tokens, while its planes are in the cache
            }
            first -= own, last -= own;
        }
    }
    free(memory.base);
    return result;
}

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
    if (wide && __builtin_cpu_supports("avx512bf16")) return HFLB_AVX512BF16;
    return wide ? HFLB_AVX512 : HFLB_AVX2;
#else
    return HFLB_PORTABLE;
#endif
}

// y = x W^T + bias for `count` tokens and each of `n` weights with as many columns, x [count][columns] and each y
// [count][rows] contiguous, bias [rows] in the dtype of x. Returns 0, 1 if the activations hold NaN or infinity (y is not
// complete then), 2 without memory.
int hflb_linear(
    const hflb_job* jobs, int64_t n, const void* x, int64_t dtype, int64_t count, int64_t digits, int64_t isa, int64_t threads
) {
    int result = 0;
    for (int64_t m = 0; m < count && !result; m += TOKENS)
        result = some_tokens(jobs, n, m, x, dtype, count - m < TOKENS ? count - m : TOKENS, digits, isa, threads);
    return result;
}

// Rows from `begin` to `end` of the dense weight in a dtype, [end - begin][columns]. With `apart` salient columns stand
// after all others, in the slots of the runs, and what is in their own places is of no use. Returns 0, or 2 without memory.
int hflb_dequantize(
    const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t apart, int64_t isa, int64_t threads
) {
    const int64_t size = dtype == HFLB_F32 ? 4 : 2, stride = (w->columns + (apart ? w->runs * HFLB_RUN : 0)) * size;
    float* buffer = (float*)aligned(threads * hflb_scale_floats(w) * 4);
    if (!buffer) return 2;
    const auto expand = isa == HFLB_AVX512BF16 ? hflb_expand_avx512bf16 : kernels_of(isa)->expand;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        const int64_t first = (end - begin) * part / threads, last = (end - begin) * (part + 1) / threads;
        expand(w, begin + first, begin + last, (char*)out + first * stride, dtype, apart, buffer + part * hflb_scale_floats(w));
    }
    free(buffer);
    return 0;
}

}  // extern "C"
