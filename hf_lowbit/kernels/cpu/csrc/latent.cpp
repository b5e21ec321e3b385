// What the package calls.
#include "latent.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {

int hflb_latent_abi(void) { return HFLB_LATENT_ABI; }

// How this processor multiplies bfloat16, and whether the system lets us.
int hflb_latent_isa(void) {
    static int found = -1;
    if (found >= 0) return found;
    found = HFLB_NO_TILES;
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

// Returns 0, or 2 without memory or where the processor lacks what `isa` asks for.
int hflb_attend(const hflb_attention* a, int64_t isa, int64_t threads) {
    if (isa > hflb_latent_isa()) return 2;
    return isa == HFLB_TILES ? hflb_attend_tiles(a, threads) : isa == HFLB_DOTS ? hflb_attend_dots(a, threads) : 2;
}

}  // extern "C"
