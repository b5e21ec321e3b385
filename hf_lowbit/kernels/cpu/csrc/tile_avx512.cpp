// AVX-512 with VNNI and GFNI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,gfni,f16c,fma,avx2")
#include "avx512.h"
#include "expand.h"
#include "tile.h"

extern "C" const hflb_kernels hflb_avx512 = {make_token, any_rows, expand_rows};
#else
#include "binary.h"
extern "C" const hflb_kernels hflb_avx512 = {0, 0, 0};
#endif
