// Plain C++, for processors without a tile of their own. The same sums in plain loops: slow, and said so.
#pragma GCC optimize("O2")  // unrolling would take minutes and gain nothing here
#include "binary.h"

#include <math.h>

#define HFLB_INLINE inline

namespace {

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Bytes { uint32_t v[16]; };
typedef uint32_t Four;  // in the order of this processor, as Bytes are
typedef Ints Sums;
const int AT_ONCE = 1;

#define EACH(type, value) \
    type out; \
    for (int i = 0; i < 16; ++i) out.v[i] = (value); \
    return out

HFLB_INLINE Floats load(const float* from) { EACH(Floats, from[i]); }
HFLB_INLINE void store(float* to, const Floats& value) { memcpy(to, value.v, sizeof value.v); }
HFLB_INLINE Floats spread(float value) { EACH(Floats, value); }
HFLB_INLINE Floats times(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] * b.v[i]); }
HFLB_INLINE Floats plus(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] + b.v[i]); }
HFLB_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) { EACH(Floats, a.v[i] * b.v[i] + c.v[i]); }
HFLB_INLINE Floats negated(const Floats& value) { EACH(Floats, -value.v[i]); }
HFLB_INLINE Floats magnitude(const Floats& value) { EACH(Floats, fabsf(value.v[i])); }
HFLB_INLINE Floats larger(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HFLB_INLINE Floats from_halves(const uint16_t* from) { EACH(Floats, hflb_half_to_float(from[i])); }
HFLB_INLINE Floats from_brains(const uint16_t* from) { EACH(Floats, hflb_brain_to_float(from[i])); }
template <int DTYPE>
inline void store_as(void* to, int64_t at, const Floats& value) { hflb_store(to, DTYPE, at, value.v, 16); }
// Sixteen columns: the first where bit `bit` of the bytes is 1, else the second.
typedef const uint8_t* Bits;
HFLB_INLINE Bits bits_of(const uint8_t* bytes) { return bytes; }
HFLB_INLINE Floats choose(Bits bytes, int bit, const Floats& yes, const Floats& no) {
    EACH(Floats, bytes[i] >> bit & 1 ? yes.v[i] : no.v[i]);
}
HFLB_INLINE Floats times_where(Bits bytes, int bit, const Floats& a, const Floats& b, const Floats& no) {
    return choose(bytes, bit, times(a, b), no);
}
HFLB_INLINE Floats negated_unless(Bits bytes, int bit, const Floats& value) { return choose(bytes, bit, value, negated(value)); }

HFLB_INLINE Ints spread(int32_t value) { EACH(Ints, value); }
// unsigned, for sums may wrap on the way
HFLB_INLINE Ints plus(const Ints& a, const Ints& b) { EACH(Ints, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
HFLB_INLINE Ints shift_up(const Ints& value) { EACH(Ints, (int32_t)((uint32_t)value.v[i] << 8)); }
HFLB_INLINE Floats to_floats(const Ints& value) { EACH(Floats, (float)value.v[i]); }
HFLB_INLINE Ints to_ints(const Floats& value) { EACH(Ints, (int32_t)rintf(value.v[i])); }
HFLB_INLINE int32_t sum_of(const Ints& value) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += value.v[i];
    return sum;
}
HFLB_INLINE void store_digit(int8_t* to, const Ints& value) {
    for (int i = 0; i < 16; ++i) to[i] = (int8_t)(value.v[i] & 255);
}
HFLB_INLINE Ints next_digit(const Ints& value) { EACH(Ints, (value.v[i] - (int8_t)(value.v[i] & 255)) / 256); }

HFLB_INLINE Bytes no_bytes() { return Bytes(); }
HFLB_INLINE Bytes both(const Bytes& a, const Bytes& b) { EACH(Bytes, a.v[i] & b.v[i]); }
HFLB_INLINE Bytes inverse(const Bytes& value) { EACH(Bytes, ~value.v[i]); }
const uint32_t EVEN = 0x55555555;
HFLB_INLINE Bytes evens(const Bytes& high, const Bytes& low) { EACH(Bytes, (low.v[i] & EVEN) | (high.v[i] << 1 & ~EVEN)); }
HFLB_INLINE Bytes odds(const Bytes& high, const Bytes& low) { EACH(Bytes, (low.v[i] >> 1 & EVEN) | (high.v[i] & ~EVEN)); }
HFLB_INLINE Bytes weights(const Bytes& pairs, int pair) { EACH(Bytes, pairs.v[i] >> (2 * pair) & 0x03030303); }
HFLB_INLINE void load_rows(const uint8_t* from, const int64_t* at, int64_t groups, Bytes* to) {
    for (int64_t k = 0; k < 4 * groups; ++k)
        for (int i = 0; i < 16; ++i) memcpy(&to[k].v[i], from + at[i] + 4 * k, 4);
}

const bool STARTS = true;
HFLB_INLINE Sums sums_from(int32_t start) { return spread(start); }
HFLB_INLINE Sums no_sums() { return Sums(); }
HFLB_INLINE Four four_of(const int8_t* digits) {
    Four four;
    memcpy(&four, digits, 4);
    return four;
}
HFLB_INLINE Sums dot(const Sums& sum, const Bytes& weight, Four x) {
    Sums out = sum;
    for (int i = 0; i < 16; ++i)
        for (int at = 0; at < 32; at += 8) out.v[i] += (int32_t)(weight.v[i] >> at & 3) * (int8_t)(x >> at & 255);
    return out;
}
HFLB_INLINE Ints total(const Sums& sum) { return sum; }

}  // namespace

#include "expand.h"
#include "tile.h"

extern "C" const hflb_kernels hflb_portable = {make_token, any_rows, expand_rows};
