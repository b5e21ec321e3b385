// Plain C++, for processors without a tile of their own. The same sums, one column at a time: slow, and said so.
#include "binary.h"

namespace {

const int WIDTH = 16;
struct Bytes { int8_t v[16]; };
struct Words { int32_t v[16]; };
struct Floats { float v[16]; };

inline Words zero() { return Words(); }
inline Floats no_floats() { return Floats(); }
inline Bytes load_bytes(const int8_t* from) {
    Bytes out;
    for (int i = 0; i < 16; ++i) out.v[i] = from[i];
    return out;
}
// Four scales of one run: they are all that one_of_four looks at.
inline Floats load_floats(const float* from) {
    Floats out = Floats();
    for (int i = 0; i < 4; ++i) out.v[i] = from[i];
    return out;
}
inline Floats one_of_four(const Floats& value, int which) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.v[i] = value.v[which];
    return out;
}
inline Words dot(const Words& sum, const Bytes& weight, const Bytes& digits) {
    Words out;
    for (int i = 0; i < 16; ++i) out.v[i] = sum.v[i] + (int32_t)weight.v[i] * digits.v[i];
    return out;
}
inline Words shift_up(const Words& value) {
    Words out;
    for (int i = 0; i < 16; ++i) out.v[i] = value.v[i] * 256;
    return out;
}
inline Floats to_float(const Words& value) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.v[i] = (float)value.v[i];
    return out;
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] * b.v[i] + c.v[i];
    return out;
}
inline Floats minus(const Floats& a, const Floats& b) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] - b.v[i];
    return out;
}
inline Floats spread(float value) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.v[i] = value;
    return out;
}
inline float total(const Floats& value) {
    float sum = 0.0f;
    for (int i = 0; i < 16; ++i) sum += value.v[i];
    return sum;
}
typedef Floats Rows;
inline Rows rows_of_floats(const float* from) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = from[i];
    return out;
}
inline Rows rows_of_halves(const uint16_t* from) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = hflb_half_to_float(from[i]);
    return out;
}
inline Rows rows_of_brains(const uint16_t* from) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = hflb_brain_to_float(from[i]);
    return out;
}
inline Rows times(const Rows& rows, float factor) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = rows.v[i] * factor;
    return out;
}
inline Rows add(const Rows& sum, const Rows& rows, float factor) { return fma(rows, spread(factor), sum); }
inline void put(float* to, const Rows& rows) {
    for (int i = 0; i < 16; ++i) to[i] = rows.v[i];
}
// Sixteen columns: the first where bit `bit` of the bytes is 1, else the second.
inline Rows choose(const uint8_t* bytes, int bit, const Rows& yes, const Rows& no) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = bytes[i] >> bit & 1 ? yes.v[i] : no.v[i];
    return out;
}
inline Rows product(const Rows& a, const Rows& b) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] * b.v[i];
    return out;
}
inline Rows sum_of(const Rows& a, const Rows& b) {
    Rows out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
}
inline Rows rows_of_one(float value) { return spread(value); }
inline void put_quads(float* to, int64_t apart, const Rows& rows) {
    for (int i = 0; i < 16; ++i) to[i / 4 * apart + i % 4] = rows.v[i];
}

// Four arrays of `bytes` bytes: sign where the code is 0, sign where it is 1, where the code is not 0, where it is 1. A
// pruned position has neither code.
inline void prepare(const uint8_t* sign, const uint8_t* code, const uint8_t* keep, int64_t bytes, uint8_t* to) {
    for (int64_t i = 0; i < bytes; ++i) {
        const uint8_t codes = code ? code[i] : 0, kept = keep ? keep[i] : 0xff;
        const uint8_t not0 = (uint8_t)(codes | ~kept), is1 = codes & kept;
        to[i] = (uint8_t)(sign[i] & ~not0);
        to[bytes + i] = sign[i] & is1;
        to[2 * bytes + i] = not0;
        to[3 * bytes + i] = is1;
    }
}

template <int CODE>
inline Bytes weights(const uint8_t* from, int64_t bytes, int64_t at, int step) {
    Bytes out;
    for (int j = 0; j < 16; ++j) {
        const int code = from[(CODE == 1 || CODE == ITSELF ? 3 : 2) * bytes + at + j] >> step & 1;
        const int sign = from[(CODE == 1 ? bytes : 0) + at + j] >> step & 1;
        out.v[j] = (int8_t)(CODE == ITSELF ? code : 2 * sign + (CODE == 1 ? !code : code));
    }
    return out;
}

}  // namespace

#include "tile.h"

extern "C" void hflb_tile_portable(const hflb_work* work, int64_t row0, float* out) { any_tile(work, row0, out); }
extern "C" void hflb_expand_portable(const hflb_weight* w, int64_t row, float* out, float* buffer) { expand(w, row, out, buffer); }
