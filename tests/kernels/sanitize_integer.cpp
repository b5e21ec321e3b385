// Calls the library with random weights in buffers of exactly the size that integer.h promises, for the sanitizers to
// watch. Built and run by test_integer_cpu.py; prints the number of cases.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>

#include "integer.h"

extern "C" {
int hfli_isa(void);
int hfli_has_amx(void);
int hfli_linear(const hfli_job*, int64_t, const void*, int64_t, int64_t, int64_t, int64_t, int64_t);
int hfli_linear_amx(const hfli_job*, const void*, int64_t, int64_t, int64_t, int64_t);
int hfli_product(const hfli_job*, const int8_t*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t);
int hfli_product_amx(const hfli_job*, const int8_t*, const float*, int64_t, int64_t, int64_t, int64_t);
int hfli_round(const hfli_transform*, const void*, int64_t, int64_t, int8_t*, float*, int64_t, int64_t);
int hfli_dequantize(const hfli_weight*, int64_t, int64_t, void*, int64_t, int64_t, int64_t);
}

static std::mt19937 generator(7);
static int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// A buffer of its own on the heap, so that one byte too far is seen.
template <class T>
struct Exact {
    T* data;
    explicit Exact(int64_t count) : data((T*)malloc(count ? (size_t)count * sizeof(T) : 1)) {}
    ~Exact() { free(data); }
    Exact(const Exact&) = delete;
};

static void random_bytes(void* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) ((uint8_t*)to)[i] = (uint8_t)between(0, 255);
}

static void random_numbers(void* to, int64_t count, int64_t dtype) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = (float)between(-1000, 1000) / 500.0f;
        hflb_store(to, dtype, i, &value, 1);
    }
}

int main(int count, char** arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 300;
    const int64_t widths[] = {2, 3, 4, 8}, orders[] = {1, 1, 2, 4, 8, 16, 32, 64, 128, 256};
    for (int number = 0; number < cases; ++number) {
        hfli_weight w;
        memset(&w, 0, sizeof w);
        w.bits = widths[between(0, 3)];
        const int64_t lane = hfli_lane_columns(w.bits), order = orders[between(0, 9)];
        w.rows = between(1, 140), w.columns = order * between(1, order > 32 ? 5 : 40);
        const int several = between(0, 3) > 0;
        w.group_size = several ? lane * between(1, 20) : w.columns;
        w.groups = (w.columns + w.group_size - 1) / w.group_size;
        if (w.groups == 1) w.group_size = w.columns;
        w.row_bytes = (w.columns * w.bits + 7) / 8, w.zero_bytes = (w.groups * w.bits + 7) / 8;
        w.scale_dtype = between(0, 2);
        const int64_t size = w.scale_dtype == HFLB_F32 ? 4 : 2;
        Exact<uint8_t> codes(w.rows * w.row_bytes), scale(w.rows * w.groups * size), zero(w.rows * w.zero_bytes);
        random_bytes(codes.data, w.rows * w.row_bytes), random_bytes(zero.data, w.rows * w.zero_bytes);
        random_numbers(scale.data, w.rows * w.groups, w.scale_dtype);
        w.codes = codes.data, w.scale = scale.data, w.zero = between(0, 1) ? zero.data : 0;
        const int64_t dtype = between(0, 2), tokens = between(0, 40), width = dtype == HFLB_F32 ? 4 : 2;
        Exact<uint8_t> x(tokens * w.columns * width), bias(w.rows * width), y(tokens * w.rows * width);
        Exact<uint8_t> more(tokens * w.rows * width), dense(w.rows * w.columns * width);
        random_numbers(x.data, tokens * w.columns, dtype), random_numbers(bias.data, w.rows, dtype);
        const hfli_job jobs[2] = {{&w, number % 2 ? bias.data : 0, y.data}, {&w, 0, more.data}};
        const int64_t shared = between(0, 2) ? lane * between(1, 20) : w.columns;
        const int64_t scales = (w.columns + shared - 1) / shared, core = order % 4 == 0 && order > 4 && between(0, 1) ? 4 : 1;
        Exact<int8_t> rounded(tokens * w.columns);
        Exact<float> step(tokens * scales), matrix(core * core), divisor(w.columns);
        random_numbers(matrix.data, core * core, HFLB_F32);
        for (int64_t i = 0; i < w.columns; ++i) divisor.data[i] = (float)between(1, 9);
        const hfli_transform how = {
            w.columns, order, core, between(2, 8), shared < w.columns ? shared : w.columns, core > 1 ? matrix.data : 0,
            between(0, 1) ? divisor.data : 0
        };
        for (int64_t isa = 0; isa <= hfli_isa(); ++isa) {
            const int64_t threads = between(1, 4), begin = between(0, w.rows), some = tokens < 9 ? tokens : 9;
            if (hfli_linear(jobs, between(1, 2), x.data, dtype, some, between(1, 3), isa, threads)) return 1;
            if (hfli_dequantize(&w, begin, w.rows, dense.data, dtype, isa, threads)) return 2;
            if (hfli_round(&how, x.data, dtype, tokens, rounded.data, step.data, isa, threads)) return 3;
            if (hfli_product(jobs, rounded.data, step.data, shared, dtype, some, isa, threads)) return 4;
        }
        if (tokens && hfli_isa() == HFLI_AVX512 && hfli_has_amx()) {
            if (hfli_product_amx(jobs, rounded.data, step.data, shared, dtype, tokens, between(1, 3)) % 3) return 5;
            if (hfli_linear_amx(jobs, x.data, dtype, tokens, between(1, 3), between(1, 3)) % 3) return 6;
        }
    }
    printf("%d\n", cases);
    return 0;
}
