// Numbers in a dtype to floats and back, without hardware help.
#pragma once
#include <stdint.h>
#include <string.h>

enum { HFLB_F32 = 0, HFLB_F16 = 1, HFLB_BF16 = 2 };

static inline float hflb_brain_to_float(uint16_t brain) {
    union { uint32_t bits; float value; } word = {(uint32_t)brain << 16};
    return word.value;
}

static inline float hflb_half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    union { uint32_t bits; float value; } word;
    if (rest >= 0x7c00) {  // infinity and NaN
        word.bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        return word.value;
    }
    if (rest < 0x400) {  // zero and denormals: so many steps of 2^-24
        const float value = (float)rest * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    word.bits = sign | ((rest << 13) + 0x38000000);
    return word.value;
}

// To nearest, ties to even; too large becomes infinity.
static inline uint16_t hflb_float_to_half(float value) {
    union { float value; uint32_t bits; } word = {value};
    const uint16_t sign = (uint16_t)(word.bits >> 16 & 0x8000);
    const uint32_t rest = word.bits & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00;
    if (rest < 0x38800000) {  // below 2^-14: adding 0.5 leaves the steps of 2^-24 in the low bits
        union { float value; uint32_t bits; } shifted;
        word.bits = rest;
        shifted.value = word.value + 0.5f;
        return (uint16_t)(sign | (shifted.bits - 0x3f000000));
    }
    return (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
}

// To nearest, ties to even; a NaN stays one. No branches, so that compilers make vectors of it.
static inline uint16_t hflb_float_to_brain(float value) {
    union { float value; uint32_t bits; } word = {value};
    const uint32_t rounded = (word.bits + 0x7fff + (word.bits >> 16 & 1)) >> 16;
    return (uint16_t)((word.bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float hflb_value(const void* from, int64_t dtype, int64_t at) {
    if (dtype == HFLB_F32) return ((const float*)from)[at];
    const uint16_t half = ((const uint16_t*)from)[at];
    return dtype == HFLB_F16 ? hflb_half_to_float(half) : hflb_brain_to_float(half);
}

static inline void hflb_store(void* to, int64_t dtype, int64_t at, const float* from, int64_t count) {
    uint16_t* halves = (uint16_t*)to + at;
    if (dtype == HFLB_F32) memcpy((float*)to + at, from, (size_t)count * 4);
    else if (dtype == HFLB_F16) for (int64_t i = 0; i < count; ++i) halves[i] = hflb_float_to_half(from[i]);
    else for (int64_t i = 0; i < count; ++i) halves[i] = hflb_float_to_brain(from[i]);
}
