// Products with two dense factors for few tokens: what the files of this library share.
//
// A factor is read once, row after row, as it lies; tokens are floats. Between the factors are `rank` floats per token,
// which stay in the processor's cache.
#pragma once
#include "half.h"

enum { HFLB_LR_ABI = 1, HFLB_LR_PORTABLE = 0, HFLB_LR_AVX2 = 1, HFLB_LR_AVX512 = 2 };
// Columns of a padded token are a multiple of this, those past the last one zero.
enum { HFLB_LR_PAD = 16 };

// y[t][row] = sum over columns of w[row][column] * x[t][column], for rows from `begin` to `end`.
struct hflb_lr_rows {
    const void* w;  // (rows, columns) contiguous
    int64_t dtype;  // of w
    int64_t columns;
    const float* x;  // (tokens, x_stride), padded with zeros to a multiple of HFLB_LR_PAD
    int64_t x_stride, tokens;
    float* y;  // (tokens, y_stride)
    int64_t y_stride;
};

extern "C" {
typedef void hflb_lr_kernel(const hflb_lr_rows* job, int64_t begin, int64_t end);
// Null where the compiler knows no such processor.
extern hflb_lr_kernel* const hflb_lr_avx512;
extern hflb_lr_kernel* const hflb_lr_avx2;
}
