// y = (x down^T) up^T + bias for few tokens: memory, the two products, rows over threads.
#include <stdlib.h>

#include "low_rank.h"

namespace {

const int64_t TOKENS = 32;  // at once, for memory's sake
const int64_t SHARE = 32 << 10;  // bytes of the factors that a thread should read: calling it takes as long as some KB

int64_t padded(int64_t columns) { return (columns + HFLB_LR_PAD - 1) / HFLB_LR_PAD * HFLB_LR_PAD; }

void shared_rows(hflb_lr_kernel* kernel, const hflb_lr_rows* job, int64_t rows, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < threads; ++part) kernel(job, rows * part / threads, rows * (part + 1) / threads);
}

}  // namespace

extern "C" {

int hflb_lr_abi(void) { return HFLB_LR_ABI; }

// The best instruction set of this processor.
int hflb_lr_isa(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return HFLB_LR_PORTABLE;
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide ? HFLB_LR_AVX512 : HFLB_LR_AVX2;
#else
    return HFLB_LR_PORTABLE;
#endif
}

// x [count][m], up [n][rank], down [rank][m] and y [count][n] are contiguous; x, bias [n] (or null) and y have one dtype,
// the factors another or the same. `isa` is at most what hflb_lr_isa says, and not portable. Sums and what is between the
// factors are float32. Returns 0, or 2 without memory.
int hflb_lr_linear(
    const void* x, const void* up, const void* down, const void* bias, void* y, int64_t dtype, int64_t factor_dtype,
    int64_t count, int64_t n, int64_t rank, int64_t m, int64_t isa, int64_t threads
) {
    hflb_lr_kernel* kernel = isa >= HFLB_LR_AVX512 ? hflb_lr_avx512 : hflb_lr_avx2;
    const int64_t most = count < TOKENS ? count : TOKENS, wide = padded(m), middle = padded(rank), out = padded(n);
    const int64_t size = dtype == HFLB_F32 ? 4 : 2, bytes = rank * (n + m) * (factor_dtype == HFLB_F32 ? 4 : 2);
    if (threads > bytes / SHARE) threads = bytes < SHARE ? 1 : bytes / SHARE;
    float* memory = (float*)aligned_alloc(64, (size_t)(most * (wide + middle + out) * 4));
    if (!memory) return 2;
    float *inputs = memory, *between = inputs + most * wide, *outputs = between + most * middle;
    for (int64_t first = 0; first < count; first += TOKENS) {
        const int64_t tokens = count - first < TOKENS ? count - first : TOKENS;
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t k = 0; k < m; ++k) inputs[t * wide + k] = hflb_value(x, dtype, (first + t) * m + k);
            for (int64_t k = m; k < wide; ++k) inputs[t * wide + k] = 0;
            for (int64_t k = rank; k < middle; ++k) between[t * middle + k] = 0;
        }
        const hflb_lr_rows in = {down, factor_dtype, m, inputs, wide, tokens, between, middle};
        const hflb_lr_rows expand = {up, factor_dtype, rank, between, middle, tokens, outputs, out};
        shared_rows(kernel, &in, rank, threads);
        shared_rows(kernel, &expand, n, threads);
        for (int64_t t = 0; t < tokens; ++t) {
            float* own = outputs + t * out;
            if (bias)
                for (int64_t k = 0; k < n; ++k) own[k] += hflb_value(bias, dtype, k);
            hflb_store((char*)y + (first + t) * n * size, dtype, 0, own, n);
        }
    }
    free(memory);
    return 0;
}

}  // extern "C"
