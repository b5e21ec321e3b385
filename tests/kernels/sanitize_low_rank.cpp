// Calls the library with random factors in buffers of exactly the size that it is told, for the sanitizers to watch.
// Built and run by test_low_rank_op.py; prints the number of cases.
#include <stdio.h>
#include <stdlib.h>

#include <random>

#include "low_rank.h"

extern "C" {
int hflb_lr_isa(void);
int hflb_lr_linear(
    const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t
);
}

static std::mt19937 generator(7);
static int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Numbers from 1 to 2 in a dtype, in a buffer of their own on the heap, so that one byte too far is seen.
struct Numbers {
    void* data;
    Numbers(int64_t count, int64_t dtype) : data(malloc((size_t)(count * (dtype == HFLB_F32 ? 4 : 2)))) {
        for (int64_t i = 0; i < count; ++i) {
            if (dtype == HFLB_F32) ((float*)data)[i] = 1.0f + (float)between(0, 999) / 1000.0f;
            else ((uint16_t*)data)[i] = (uint16_t)(dtype == HFLB_F16 ? 0x3c00 + between(0, 1023) : 0x3f80 + between(0, 127));
        }
    }
    ~Numbers() { free(data); }
    Numbers(const Numbers&) = delete;
};

int main(int count, char** arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 300;
    const int best = hflb_lr_isa();
    if (best == HFLB_LR_PORTABLE) return printf("%d\n", cases), 0;  // nothing of it would run
    for (int number = 0; number < cases; ++number) {
        const int64_t n = between(1, 70), m = between(1, 300), rank = between(1, 40), tokens = between(1, 40);
        const int64_t dtype = between(0, 2), held = between(0, 2), isa = between(HFLB_LR_AVX2, best);
        Numbers x(tokens * m, dtype), up(n * rank, held), down(rank * m, held), bias(n, dtype), y(tokens * n, dtype);
        if (hflb_lr_linear(
                x.data, up.data, down.data, number % 2 ? bias.data : 0, y.data, dtype, held, tokens, n, rank, m, isa, between(1, 3)
            ))
            return 1;
    }
    printf("%d\n", cases);
    return 0;
}
