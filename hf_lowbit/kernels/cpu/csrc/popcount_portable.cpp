// Plain C++, for any processor.
#define HFLB_INLINE inline
#include <string.h>

#include "popcount.h"

namespace {
const int PIXELS_AT_ONCE = 4;
struct Lanes { uint64_t word[HFLB_POP_LANES]; };
struct Count { int32_t sum[HFLB_POP_LANES]; };
inline Lanes load(const uint64_t* from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}
inline Count none() { return Count(); }
inline int32_t ones(uint64_t word) {
#if defined(__GNUC__)
    return __builtin_popcountll(word);
#else
    int32_t found = 0;
    for (; word; word &= word - 1) ++found;
    return found;
#endif
}
inline Count differing(Count count, const Lanes& lanes, uint64_t word) {
    for (int l = 0; l < HFLB_POP_LANES; ++l) count.sum[l] += ones(lanes.word[l] ^ word);
    return count;
}
inline void dots(const Count& count, int32_t valid, int32_t* to) {
    for (int l = 0; l < HFLB_POP_LANES; ++l) to[l] = valid - 2 * count.sum[l];
}
void finish(const Results*, const int32_t*, int64_t, int64_t, int64_t);
}  // namespace

#include "popcount_rows.h"

namespace {
void finish(const Results* to, const int32_t* tile, int64_t place, int64_t apart, int64_t pixels) {
    finish_slowly(to, tile, place, apart, pixels);
}
void pack_pixels(const hflb_pop_signs* job, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) pack_one(job, i / job->pixels, i % job->pixels);
}
}  // namespace

extern "C" const hflb_pop_kernels hflb_pop_portable = {pack_pixels, conv_rows};
