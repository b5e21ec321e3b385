// Convolutions of signs by XOR and popcount: what is passed around, and what each instruction set brings.
//
// A tap of the kernel reads the signs of a pixel's channels as 64-bit words; bits of channels that do not exist are 0 in
// activations and weights alike and never differ. Taps outside the image are left out, so they add nothing.
#pragma once
#include <stdint.h>

#include "half.h"

enum { HFLB_POP_ABI = 1 };
enum { HFLB_POP_PORTABLE = 0, HFLB_POP_AVX2 = 1, HFLB_POP_AVX512 = 2 };
enum { HFLB_POP_LANES = 8, HFLB_POP_PIXELS = 8 };

// x [batch][channels][pixels] becomes words [batch][pixels][groups][words]: a bit is 1 where x * gain + bias >= 0.
typedef struct {
    int64_t batch, channels, pixels, groups, words, dtype;
    const void* x;
    const float *gain, *bias;  // [channels], or null
    uint64_t* out;
} hflb_pop_signs;

// The convolution of signs. Weights are [groups][kernel_h * kernel_w][words][lanes], lanes the outputs of a group rounded
// up to 8. The result is [batch][outs][out_height][out_width]: int32 without `affine`, else float32
// y = affine[0] * dot + affine[1], and with `act` t = y + act[1]; (t < 0 ? act[0] * t : t) + act[2].
typedef struct {
    int64_t batch, channels, height, width, outs, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, transposed;
    int64_t words, lanes;
    const uint64_t *weight, *packed;
    const float *affine, *act;  // [2][outs], [3][outs], or null
    void* y;
} hflb_pop_conv;

// Pixels [from, to) of all batch * pixels; rows [from, to) of all batch * out_height.
typedef void hflb_pop_pack_part(const hflb_pop_signs*, int64_t from, int64_t to);
typedef void hflb_pop_conv_part(const hflb_pop_conv*, int64_t from, int64_t to);
typedef struct {
    hflb_pop_pack_part* pack;
    hflb_pop_conv_part* conv;
} hflb_pop_kernels;

extern "C" const hflb_pop_kernels hflb_pop_portable, hflb_pop_avx2, hflb_pop_avx512;

// Where eight outputs go: `first` is the place of the first one's image in y, `area` that from one to the next.
typedef struct {
    const hflb_pop_conv* job;
    int64_t channel, outs, area, first;
} Results;
