// Calls the library with random weights in buffers of exactly the size that binary.h promises, for the sanitizers to
// watch. Built and run by test_cpu.py; prints the number of cases.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "binary.h"

extern "C" {
int hflb_isa(void);
int hflb_linear(const hflb_job*, int64_t, const void*, int64_t, int64_t, int64_t, int64_t, int64_t);
int hflb_has_amx(void);
int hflb_wide_amx(const hflb_weight*, const void*, int64_t, const void*, void*, int64_t);
int hflb_dequantize(const hflb_weight*, int64_t, int64_t, void*, int64_t, int64_t, int64_t, int64_t);
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

static void random_floats(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = (float)between(-1000, 1000) / 500.0f;
}

static void random_scales(void* to, int64_t count, int64_t dtype) {
    if (dtype == HFLB_F32) return random_floats((float*)to, count);
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)to)[i] = dtype == HFLB_F16 ? 0x3800 + between(0, 255) : 0x3f80;
}

int main(int count, char** arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 300;
    for (int number = 0; number < cases; ++number) {
        hflb_weight w;
        memset(&w, 0, sizeof w);
        w.rows = between(1, 70), w.columns = between(1, 700);
        w.block_size = HFLB_GROUP * between(1, 3);
        w.blocks = (w.columns + w.block_size - 1) / w.block_size;
        w.groups = between(1, 2), w.salient_groups = between(0, w.groups);
        w.runs = w.salient_groups ? 8 * between(1, 5) : 0, w.used_runs = w.runs ? between(1, w.runs) : 0;
        w.scale_dtype = between(0, 1);
        const bool shift = between(0, 3) == 0, mask = between(0, 2) == 0;
        const int64_t padded = (w.columns + HFLB_GROUP - 1) / HFLB_GROUP * HFLB_GROUP, plane = w.rows * padded / 8;
        const int64_t size = w.scale_dtype == HFLB_F32 ? 4 : 2, S = w.salient_groups, G = w.groups, slots = w.runs * HFLB_RUN;
        Exact<uint8_t> sign(plane), group(plane), keep(plane), runs(4 * w.rows * w.runs * 2);
        const int64_t filled = (w.rows + HFLB_STRIP - 1) / HFLB_STRIP * HFLB_STRIP;
        Exact<uint8_t> scale((2 * S + G) * w.blocks * filled * size), offset((S + G) * w.blocks * filled * size);
        Exact<float> plain(G * padded), first(S * slots), second(S * slots);
        Exact<int32_t> column(slots), block(w.runs);
        random_bytes(sign.data, plane), random_bytes(group.data, plane), random_bytes(keep.data, plane);
        random_bytes(runs.data, 4 * w.rows * w.runs * 2);
        random_scales(scale.data, (2 * S + G) * w.blocks * filled, w.scale_dtype);
        random_scales(offset.data, (S + G) * w.blocks * filled, w.scale_dtype);
        random_floats(plain.data, G * padded), random_floats(first.data, S * slots), random_floats(second.data, S * slots);
        for (int64_t run = 0; run < w.runs; ++run) block.data[run] = (int32_t)between(0, w.blocks - 1);
        for (int64_t i = 0; i < slots; ++i) {
            column.data[i] = (int32_t)between(-1, w.columns - 1);
            for (int64_t h = 0; h < S; ++h)
                if (column.data[i] < 0) first.data[h * slots + i] = second.data[h * slots + i] = 0.0f;
        }
        w.sign = sign.data, w.group = G > 1 ? group.data : 0, w.keep = mask ? keep.data : 0;
        w.row_scale = scale.data, w.row_shift = shift ? offset.data : 0, w.plain_scale = plain.data;
        w.run_column = column.data, w.run_block = block.data, w.run_planes = runs.data;
        w.first_scale = first.data, w.second_scale = second.data;
        const int64_t dtype = between(0, 2), tokens = between(0, 5), width = dtype == HFLB_F32 ? 4 : 2;
        Exact<uint8_t> x(tokens * w.columns * width), bias(w.rows * width), y(tokens * w.rows * width);
        Exact<uint8_t> more(tokens * w.rows * width);
        const hflb_job jobs[2] = {{&w, number % 2 ? bias.data : 0, y.data}, {&w, 0, more.data}};
        Exact<uint8_t> dense(w.rows * w.columns * width), apart(w.rows * (w.columns + slots) * width);
        random_scales(x.data, tokens * w.columns, dtype), random_scales(bias.data, w.rows, dtype);
        for (int64_t isa = 0; isa <= hflb_isa(); ++isa) {
            const int64_t threads = between(1, 4), begin = between(0, w.rows);
            if (hflb_linear(jobs, between(1, 2), x.data, dtype, tokens, between(1, 3), isa, threads)) return 1;
            if (hflb_dequantize(&w, begin, w.rows, dense.data, dtype, 0, isa, threads)) return 2;
            if (hflb_dequantize(&w, begin, w.rows, apart.data, dtype, 1, isa, threads)) return 3;
        }
        if (dtype == HFLB_BF16 && tokens && hflb_has_amx())
            if (hflb_wide_amx(&w, x.data, tokens, number % 2 ? bias.data : 0, y.data, between(1, 3))) return 4;
    }
    printf("%d\n", cases);
    return 0;
}
