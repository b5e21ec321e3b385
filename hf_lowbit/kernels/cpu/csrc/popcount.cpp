// What the package calls: pixels and rows over threads.
#include "popcount.h"

namespace {

const hflb_pop_kernels* kernels_of(int64_t isa) {
    return isa >= HFLB_POP_AVX512 ? &hflb_pop_avx512 : isa == HFLB_POP_AVX2 ? &hflb_pop_avx2 : &hflb_pop_portable;
}

}  // namespace

extern "C" {

int hflb_pop_abi(void) { return HFLB_POP_ABI; }

// The best instruction set of this processor.
int hflb_pop_isa(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return HFLB_POP_PORTABLE;
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vpopcntdq");
    return wide ? HFLB_POP_AVX512 : HFLB_POP_AVX2;
#else
    return HFLB_POP_PORTABLE;
#endif
}

// `isa` is at most what hflb_pop_isa says. Results do not depend on the number of threads.
void hflb_pop_pack(const hflb_pop_signs* job, int64_t isa, int64_t threads) {
    const int64_t total = job->batch * job->pixels;
    hflb_pop_pack_part* part = kernels_of(isa)->pack;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < threads; ++t) part(job, total * t / threads, total * (t + 1) / threads);
}

void hflb_pop_convolve(const hflb_pop_conv* job, int64_t isa, int64_t threads) {
    const int64_t rows = job->batch * job->out_height;
    hflb_pop_conv_part* part = kernels_of(isa)->conv;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < threads; ++t) part(job, rows * t / threads, rows * (t + 1) / threads);
}

}  // extern "C"
