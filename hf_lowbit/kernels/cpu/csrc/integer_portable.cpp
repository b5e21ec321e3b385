// Plain C++, for processors without a form of their own. The same sums in plain loops: slow, and said so.
#pragma GCC optimize("O2")  // unrolling would take minutes and gain nothing here
#include <math.h>
#include <string.h>

#include "integer.h"

namespace {

const int LANES = 8;
struct Floats { float v[LANES]; };
struct Ints { int32_t v[LANES]; };
struct Bytes { uint8_t v[4 * LANES]; };

#define EACH(type, value) \
    type out; \
    for (int i = 0; i < LANES; ++i) out.v[i] = (value); \
    return out

inline Floats load(const float* from) { EACH(Floats, from[i]); }
inline void store(float* to, const Floats& value) { memcpy(to, value.v, sizeof value.v); }
inline Floats spread(float value) { EACH(Floats, value); }
inline Floats times(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] * b.v[i]); }
inline Floats plus(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] + b.v[i]); }
inline Floats minus(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] - b.v[i]); }
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) { EACH(Floats, a.v[i] * b.v[i] + c.v[i]); }
inline Floats from_halves(const uint16_t* from) { EACH(Floats, hflb_half_to_float(from[i])); }
inline Floats from_brains(const uint16_t* from) { EACH(Floats, hflb_brain_to_float(from[i])); }
inline Floats some_halves(const uint16_t* from, int64_t count) { EACH(Floats, i < count ? hflb_half_to_float(from[i]) : 0.0f); }
inline Floats from_bytes(const uint8_t* from) { EACH(Floats, (float)from[i]); }
template <int DTYPE>
inline void store_as(void* to, int64_t at, const Floats& value) { hflb_store(to, DTYPE, at, value.v, LANES); }
inline float total(const Floats& value) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; ++i) sum += value.v[i];
    return sum;
}
inline Ints load(const int32_t* from) { EACH(Ints, from[i]); }
inline void store(int32_t* to, const Ints& value) { memcpy(to, value.v, sizeof value.v); }
inline Floats look_up(const float* table, const Ints& at) { EACH(Floats, table[at.v[i]]); }
inline Floats permuted(const float* from, const Ints& at) { return look_up(from, at); }
inline Ints none() { EACH(Ints, 0); }
// unsigned, for sums may wrap on the way
inline Ints plus(const Ints& a, const Ints& b) { EACH(Ints, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
inline Ints shift_up(const Ints& value) { EACH(Ints, (int32_t)((uint32_t)value.v[i] << 8)); }
inline Floats to_floats(const Ints& value) { EACH(Floats, (float)value.v[i]); }
inline Ints to_ints(const Floats& value) { EACH(Ints, (int32_t)rintf(value.v[i])); }

inline Floats over(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] / b.v[i]); }
inline Ints clamped(const Ints& value, int most) { EACH(Ints, value.v[i] > most ? most : value.v[i] < -most ? -most : value.v[i]); }
inline void store_codes(int8_t* to, const Ints& value) {
    for (int i = 0; i < LANES; ++i) to[i] = (int8_t)value.v[i];
}
// The number H places away in a vector, and the sign with which its own goes into the sum or difference.
template <int H>
inline Floats partner(const Floats& value) { EACH(Floats, value.v[i ^ H]); }
template <int H>
inline Floats pattern() { EACH(Floats, i & H ? -1.0f : 1.0f); }

inline int32_t largest_bits(const float* from, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        memcpy(&bits, from + i, 4);
        bits &= 0x7fffffff;
        if (bits > most) most = bits;
    }
    return most;
}
inline float dot_of(const float* a, const float* b, int64_t count) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

inline Bytes load_bytes(const void* from) {
    Bytes out;
    memcpy(out.v, from, sizeof out.v);
    return out;
}
inline Bytes load_some(const uint8_t* from, int64_t count) {
    Bytes out = {{0}};
    memcpy(out.v, from, (size_t)count);
    return out;
}
template <int BITS>
inline uint8_t code_at(const uint8_t* from, int j) {
    const int bit = BITS * j, low = from[bit / 8] >> bit % 8;
    return (uint8_t)((bit % 8 + BITS > 8 ? low | from[bit / 8 + 1] << (8 - bit % 8) : low) & ((1 << BITS) - 1));
}
template <int BITS>
inline void take_apart(const Bytes& packed, Bytes* to) {
    const int parts = BITS == 3 ? 1 : 8 / BITS;
    for (int k = 0; k < parts; ++k)
        for (int i = 0; i < 4 * LANES; ++i) to[k].v[i] = code_at<BITS>(packed.v, parts * i + k);
}
const int AT_ONCE_BYTES = 16;
template <int BITS>
inline void many(const uint8_t* from, uint8_t* to) {
    for (int j = 0; j < AT_ONCE_BYTES; ++j) to[j] = code_at<BITS>(from, j);
}
template <int BITS>
inline void last_ones(const uint8_t* from, int64_t bytes, uint8_t* to) {
    uint8_t some[AT_ONCE_BYTES] = {0};
    memcpy(some, from, (size_t)bytes);
    many<BITS>(some, to);
}
template <int BITS>
inline Ints add_dot(const Ints& sum, const Bytes& codes, const Bytes& digits) {
    Ints out = sum;
    for (int i = 0; i < 4 * LANES; ++i) out.v[i / 4] += (int32_t)codes.v[i] * (int8_t)digits.v[i];
    return out;
}

}  // namespace

#include "integer_rows.h"
#include "integer_transform.h"

extern "C" const hfli_kernels hfli_portable = {LANES, integers, arrange, rows, expand, round_token};
