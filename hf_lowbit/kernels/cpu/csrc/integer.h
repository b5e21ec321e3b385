// Products with weights of the format "integer" on a processor, straight from the packed codes. Plain C interface: no
// torch, no Python. What a value is, kernels/integer.py and kernels/activation.py define.
//
// Activations are integers, too: of one byte where a layer quantizes them, and else of two or three ("digits"), with a
// scale for 128 columns, which float32 and its halves fit into. A row times a token then is a sum of products of bytes.
//
// A block is what one vector of packed codes holds: 4 * lanes bytes (with 3 bits: 4 * lanes codes). Codes come out of it
// V = 8 / bits at a time: part k has columns k, V + k, 2 V + k ... of the block, and activations are put into the same
// order once per token. So lane l of the sums belongs to HFLI_LANE_COLUMNS neighbouring columns, and a group may end
// after any multiple of these.
#pragma once
#include <stdint.h>

#include "half.h"

#define HFLI_ABI 1
#define HFLI_SHARED 128  // columns that share a scale where activations are no stored integers

// Vectors must stay in registers from one function to the next, so the compiler is left no choice.
#define HFLI_INLINE inline __attribute__((always_inline))

#ifdef __cplusplus
extern "C" {
#endif

enum { HFLI_PORTABLE = 0, HFLI_AVX2 = 1, HFLI_AVX512 = 2 };

typedef struct {
    int64_t rows;         // out_features
    int64_t columns;      // in_features
    int64_t bits;         // 2, 3, 4 or 8
    int64_t group_size;   // columns that share a scale; all of a row: the number of columns
    int64_t groups;       // ceil(columns / group_size)
    int64_t row_bytes;    // of codes
    int64_t zero_bytes;   // of the zero points of a row
    int64_t scale_dtype;  // HFLB_F32, HFLB_F16 or HFLB_BF16
    const uint8_t* codes;  // [rows][row_bytes]
    const void* scale;     // [rows][groups]
    const uint8_t* zero;   // [rows][zero_bytes], or null: 2^(bits - 1)
} hfli_weight;

// How activations are made integers, kernels/activation.py says: rows are divided, rotated and rounded.
typedef struct {
    int64_t columns;
    int64_t order;        // of the Hadamard blocks, core * 2^p; 1: no rotation
    int64_t core;         // order of the factor that is no power of two, else 1
    int64_t bits;         // of a code, 2 to 8
    int64_t group_size;   // columns that share a scale; all: the number of columns
    const float* core_matrix;  // [core][core], transposed, of +-1, or null
    const float* divisor;      // [columns] or null
} hfli_transform;

// One product of a call.
typedef struct {
    const hfli_weight* weight;
    const void* bias;  // [rows] or null
    void* y;           // [count][rows]
} hfli_job;

// Activations of one token, [blocks] of everything.
typedef struct {
    int8_t* digits;  // [digits][V][4 * lanes], most significant first
    int32_t* start;  // [1 or 2][lanes]: minus the middle of the codes' range times the lane's sum
    float* scale;    // [lanes]
    float* sum;      // of each of the weight's groups, with the scale: [groups]
} hfli_token;

typedef struct {
    const hfli_weight* weight;
    const hfli_token* tokens;
    const int32_t* lane_group;  // [blocks][lanes]: the group that a lane belongs to
    int64_t count, digits;
    const void* bias;
    void* y;
    int64_t dtype;  // of bias and y
} hfli_work;

// What each instruction set has; integer_rows.h tells what they do.
typedef struct {
    int64_t lanes;
    int (*integers)(const void* x, int64_t dtype, int64_t at, int64_t columns, int64_t digits, int32_t* values, float* scale);
    void (*arrange)(
        const hfli_weight* w, const int32_t* values, const float* scale, int64_t shared, int64_t digits, const hfli_token* to
    );
    void (*rows)(const hfli_work* work, int64_t row0, int64_t end, float* buffer);
    void (*expand)(const hfli_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, float* buffer);
    int (*round_token)(
        const hfli_transform* how, const void* x, int64_t dtype, int64_t at, float* buffer, int8_t* codes, float* scale
    );
} hfli_kernels;
extern const hfli_kernels hfli_avx512, hfli_avx2, hfli_portable;

// Codes that a vector of packed ones is taken apart into, and their columns.
static inline int64_t hfli_parts(int64_t bits) { return bits == 3 ? 1 : 8 / bits; }
static inline int64_t hfli_lane_columns(int64_t bits) { return 4 * hfli_parts(bits); }
static inline int64_t hfli_blocks(const hfli_weight* w, int64_t lanes) {
    const int64_t columns = lanes * hfli_lane_columns(w->bits);
    return (w->columns + columns - 1) / columns;
}
// Floats that some rows need: tables of their groups, and the codes of one row.
static inline int64_t hfli_row_floats(const hfli_weight* w) { return (8 * (w->groups + 64) + w->columns / 4 + 64 + 15) / 16 * 16; }

#ifdef __cplusplus
}
#endif
