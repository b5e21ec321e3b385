// The loops over rows and columns, for vectors of 16 floats that the including file defines:
//   Floats, zero(), fma(a, b, c), sum(a), load(const float*), from<DTYPE>(const char* row, column),
//   some<DTYPE>(row, column, count) with zeros past `count`, fetch(address).
#include "low_rank.h"

namespace {

// `ROWS` rows with `TOKENS` tokens: each weight is widened once and met by all tokens while it is in a register.
template <int DTYPE, int ROWS, int TOKENS>
HFLB_INLINE void tile(const hflb_lr_rows* job, int64_t row, int64_t token, int64_t ahead) {
    const int64_t size = DTYPE == HFLB_F32 ? 4 : 2, columns = job->columns, whole = columns / 16 * 16, width = columns * size;
    const char* w = (const char*)job->w + row * width;
    const float* x = job->x + token * job->x_stride;
    Floats sums[ROWS][TOKENS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = zero();
    for (int64_t k = 0; k < whole; k += 16) {
        Floats weights[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            weights[r] = from<DTYPE>(w + r * width, k);
            fetch(w + r * width + k * size + ahead);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const Floats value = load(x + t * job->x_stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sums[r][t] = fma(weights[r], value, sums[r][t]);
        }
    }
    if (whole < columns)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Floats weights = some<DTYPE>(w + r * width, whole, columns - whole);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) sums[r][t] = fma(weights, load(x + t * job->x_stride + whole), sums[r][t]);
        }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) job->y[(token + t) * job->y_stride + row + r] = sum(sums[r][t]);
}

// All tokens with some rows, which stay in the cache from the first tokens to the last.
template <int DTYPE, int ROWS>
HFLB_INLINE void tokens_of(const hflb_lr_rows* job, int64_t row, int64_t ahead) {
    int64_t t = 0;
    for (; t + 4 <= job->tokens; t += 4) tile<DTYPE, ROWS, 4>(job, row, t, ahead);
    for (; t + 2 <= job->tokens; t += 2) tile<DTYPE, ROWS, 2>(job, row, t, ahead);
    if (t < job->tokens) tile<DTYPE, ROWS, 1>(job, row, t, ahead);
}

// Bytes between what is multiplied and what is asked for meanwhile: far enough for memory to answer in time, and in the next
// rows, since the processor itself asks for the rest of these.
const int64_t AHEAD = 2048;

template <int DTYPE>
void rows_of(const hflb_lr_rows* job, int64_t begin, int64_t end) {
    const int64_t width = job->columns * (DTYPE == HFLB_F32 ? 4 : 2);
    int64_t row = begin;
    for (; row + AT_ONCE <= end; row += AT_ONCE) {
        const int64_t step = AT_ONCE * width, ahead = (AHEAD + step - 1) / step * step;
        tokens_of<DTYPE, AT_ONCE>(job, row, (end - row) * width >= ahead + step ? ahead : 0);  // past the end nothing
    }
    for (; row < end; ++row) tokens_of<DTYPE, 1>(job, row, 0);
}

void any_rows(const hflb_lr_rows* job, int64_t begin, int64_t end) {
    if (job->dtype == HFLB_F32) rows_of<HFLB_F32>(job, begin, end);
    else if (job->dtype == HFLB_F16) rows_of<HFLB_F16>(job, begin, end);
    else rows_of<HFLB_BF16>(job, begin, end);
}

}  // namespace
