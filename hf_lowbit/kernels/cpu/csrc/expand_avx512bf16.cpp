// AVX-512 that rounds to bfloat16 by itself: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,gfni,f16c,fma,avx2")
#define HFLB_ROUNDS  // the macros of the compiler do not follow the line above
#include "avx512.h"
#include "expand.h"

extern "C" void hflb_expand_avx512bf16(
    const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t apart, float* buffer
) {
    expand_rows(w, begin, end, out, dtype, apart, buffer);
}
#else
#include "binary.h"
extern "C" void hflb_expand_avx512bf16(const hflb_weight*, int64_t, int64_t, void*, int64_t, int64_t, float*) {}
#endif
