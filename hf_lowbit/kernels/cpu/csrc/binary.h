// Product with a weight of the format "binary", straight from the packed planes. Plain C interface: no torch, no Python.
//
// What a value is, kernels/reference.py defines. A row of the weight has two kinds of columns:
//   plain columns    value = +-rs[h] * cs[h][j]  (+ shift[h])                       (h: code of the position, 0 or 1)
//   salient columns  value = +-rs'[h] * cs[h][j]  +-  rs''[h] * cs2[h][p]  (+ shift'[h])
// Column scales are multiplied into the activations once per call, and activations become integers of one to three
// bytes with one scale for 128 columns. A row of a block then needs sums of bytes that bits select, which is what
// vpdpbusd and its like do. Sixteen rows are worked on together, one in each part of a vector: their scales lie side by
// side in the file, and an activation is the same for all of them.
//
// Salient columns are gathered beforehand into "runs" of 16 columns of one block, in planes of the same layout as the
// stored ones. In the main planes their activations are 0.
#pragma once
#include <stdint.h>

#include "half.h"

#define HFLB_ABI 5
#define HFLB_GROUP 128  // columns of a group of a plane, in 16 bytes
#define HFLB_RUN 16     // columns of a run: one bit position of a group
#define HFLB_TILE 16    // rows that are worked on together
#define HFLB_STRIP 64   // rows whose scales lie together

#ifdef __cplusplus
extern "C" {
#endif

enum { HFLB_PORTABLE = 0, HFLB_AVX2 = 1, HFLB_AVX512 = 2, HFLB_AVX512BF16 = 3 };

typedef struct {
    int64_t rows;            // out_features
    int64_t columns;         // in_features
    int64_t blocks;          // of block_size columns, which share a row scale
    int64_t block_size;      // a multiple of 128
    int64_t runs;            // a multiple of 8; 0 without salient columns
    int64_t used_runs;       // the first of them; the others fill up a group and are empty
    int64_t groups;          // codes of plain columns, 1 or 2
    int64_t salient_groups;  // codes of salient columns, 0, 1 or 2
    int64_t scale_dtype;     // of row_scale and row_shift: HFLB_F16 or HFLB_F32
    const uint8_t* sign;       // [rows][16 * groups of columns]
    const uint8_t* group;      // the same, with two groups: where the code is 1 and the weight kept; else null
    const uint8_t* keep;       // the same: where a weight is kept, and with two groups its code is 0; null without a mask
    const void* row_scale;     // [rows / 64][blocks][2 * salient_groups + groups][64]: rows are filled up with 0
    const void* row_shift;     // [rows / 64][blocks][salient_groups + groups][64] or null
    const float* plain_scale;  // [groups][padded columns]: column scales, 0 for salient columns and padding
    const int32_t* run_column;   // [runs * 16]: column of each slot, -1 for an empty one
    const int32_t* run_block;    // [runs]
    const float* first_scale;    // [salient_groups][runs * 16]: column scales, 0 for an empty slot
    const float* second_scale;   // [salient_groups][runs * 16]
    const uint8_t* run_planes;   // [4][rows][runs * 2]: signs, group, signs of the second plane, and keep with a mask
} hflb_weight;

// One product of a call.
typedef struct {
    const hflb_weight* weight;
    const void* bias;  // [rows] or null
    void* y;           // [count][rows]
} hflb_job;

// Activations of one token as integers, in bytes, most significant first.
typedef struct {
    int8_t* bytes;  // [codes][groups of 128][digits][128]
    float* scale;   // [groups of 128]
    int32_t* sum;   // [codes][groups of 128 or runs]: sums of the integers
} hflb_digits;

typedef struct {
    hflb_digits plain, first, second;
} hflb_token;

typedef struct {
    const hflb_weight* weight;
    const hflb_token* tokens;
    int64_t count;     // of tokens
    int64_t digits;    // bytes of an activation, 1 to 3
    const void* bias;  // [rows] or null
    void* y;           // [count][rows]
    int64_t dtype;     // of bias and y
} hflb_work;

// What each instruction set has; tile.h tells what they do.
typedef struct {
    int (*make_token)(const hflb_weight* w, const void* x, int64_t dtype, int64_t digits, float* values, const hflb_token* to);
    void (*rows)(const hflb_work* work, int64_t row0, int64_t end);  // at most a strip
    void (*expand)(
        const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t apart, float* buffer
    );
} hflb_kernels;
extern const hflb_kernels hflb_avx512, hflb_avx2, hflb_portable;

void hflb_expand_avx512bf16(
    const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t apart, float* buffer
);

// Floats for the scales of one tile's rows.
static inline int64_t hflb_scale_floats(const hflb_weight* w) {
    const int64_t entries = 2 * w->salient_groups + w->groups + (w->row_shift ? w->salient_groups + w->groups : 0);
    return entries * w->blocks * HFLB_TILE;
}

#ifdef __cplusplus
}
#endif
