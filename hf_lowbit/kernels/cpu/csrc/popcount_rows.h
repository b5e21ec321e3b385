// The loops over rows, outputs, pixels and taps. The including file brings:
//   PIXELS_AT_ONCE, Lanes (8 words), Count (8 sums), load(), none(), differing(Count, Lanes, word),
//   dots(Count, valid, to), which stores valid - 2 * count, and
//   finish(results, tile, place, apart, pixels), which turns a tile of dots into results.
#pragma once
#include "popcount.h"

namespace {

const int64_t MOST_TAPS = 64, MOST_LISTED = MOST_TAPS * MOST_TAPS;  // the caller refuses more

// Taps of one axis that a place along it reads: kernel index and input index of place 0, places step apart.
struct Axis {
    int64_t count, step, tap[MOST_TAPS], at[MOST_TAPS];
};

// Taps that `place` may read. Transposed, they are those of all places place + j * stride.
void taps_at(Axis* axis, int64_t place, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool transposed) {
    axis->count = 0;
    axis->step = transposed ? 1 : stride;
    for (int64_t k = 0; k < kernel; ++k) {
        int64_t at = place * stride - pad + k * dilation;
        if (transposed) {
            at = place + pad - k * dilation;
            if (at % stride) continue;  // negative remainders count as well
            at /= stride;
        }
        axis->tap[axis->count] = k;
        axis->at[axis->count++] = at;
    }
}

// Where a tap is found: words from the first of its row of places, and from the first of the weights.
struct Taps {
    int64_t count, step;  // words from one place to the next
    int64_t place[MOST_LISTED], weight[MOST_LISTED];
};

// Dots of P neighbouring places.
template <int P>
HFLB_INLINE void places(
    const Taps* taps, const uint64_t* image, const uint64_t* weight, int64_t words, int64_t lanes, int32_t each, int32_t* tile
) {
    Count count[P];
    for (int p = 0; p < P; ++p) count[p] = none();
    const int64_t step = taps->step;
    for (int64_t t = 0; t < taps->count; ++t) {
        const uint64_t *from = image + taps->place[t], *with = weight + taps->weight[t], *end = from + words;
        for (; from < end; ++from, with += lanes) {
            const Lanes own = load(with);
            for (int p = 0; p < P; ++p) count[p] = differing(count[p], own, from[p * step]);
        }
    }
    const int32_t valid = (int32_t)taps->count * each;
    for (int p = 0; p < P; ++p) dots(count[p], valid, tile + p * HFLB_POP_LANES);
}

// The taps inside the image at place j.
void taps_of_place(const hflb_pop_conv* job, const Axis* rows, const Axis* columns, int64_t j, Taps* taps) {
    const int64_t pixel = job->groups * job->words;
    taps->count = 0;
    taps->step = columns->step * pixel;
    for (int64_t r = 0; r < rows->count; ++r) {
        for (int64_t c = 0; c < columns->count; ++c) {
            const int64_t x = columns->at[c] + j * columns->step;
            if (x < 0 || x >= job->width) continue;
            taps->place[taps->count] = (rows->at[r] * job->width + columns->at[c]) * pixel;
            taps->weight[taps->count++] = (rows->tap[r] * job->kernel_w + columns->tap[c]) * job->words * job->lanes;
        }
    }
}

// Places where every column of the kernel is inside the image: [low, high).
void find_inside(const hflb_pop_conv* job, const Axis* columns, int64_t* low, int64_t* high) {
    for (int64_t c = 0; c < columns->count; ++c) {
        const int64_t at = columns->at[c], step = columns->step;
        const int64_t first = at < 0 ? (-at + step - 1) / step : 0;
        const int64_t end = at >= job->width ? 0 : (job->width - 1 - at) / step + 1;
        if (first > *low) *low = first;
        if (end < *high) *high = end;
    }
}

// One row in one phase, eight outputs of a group.
void one_row(
    const hflb_pop_conv* job, const Axis* rows, const Axis* columns, const Taps* inside, Taps* edge, int64_t low,
    int64_t high, int64_t total, const uint64_t* image, const uint64_t* weight, const Results* results, int64_t start, int64_t apart
) {
    const int64_t words = job->words, lanes = job->lanes, step = inside->step;
    const int32_t each = (int32_t)(job->channels / job->groups);
    int32_t tile[HFLB_POP_PIXELS * HFLB_POP_LANES];
    for (int64_t j = 0; j < total; j += HFLB_POP_PIXELS) {
        const int64_t count = total - j < HFLB_POP_PIXELS ? total - j : HFLB_POP_PIXELS;
        for (int64_t p = 0; p < count;) {
            const int64_t now = j + p, end = high < j + count ? high : j + count;
            const int64_t run = now >= low ? end - now : 0;
            const uint64_t* from = image + now * step;
            int32_t* own = tile + p * HFLB_POP_LANES;
            if (PIXELS_AT_ONCE >= 8 && run >= 8) {
                places<PIXELS_AT_ONCE>(inside, from, weight, words, lanes, each, own), p += 8;
            } else if (run >= 4) {
                places<4>(inside, from, weight, words, lanes, each, own), p += 4;
            } else if (run >= 2) {
                places<2>(inside, from, weight, words, lanes, each, own), p += 2;
            } else {
                if (run < 1) taps_of_place(job, rows, columns, now, edge);
                places<1>(run < 1 ? edge : inside, from, weight, words, lanes, each, own), p += 1;
            }
        }
        finish(results, tile, start + j * apart, apart, count);
    }
}

void rows_inside(const hflb_pop_conv* job, int64_t y, Axis* rows) {
    taps_at(rows, y, job->kernel_h, job->stride_h, job->pad_h, job->dilation_h, job->transposed);
    int64_t kept = 0;
    for (int64_t r = 0; r < rows->count; ++r) {
        if (rows->at[r] < 0 || rows->at[r] >= job->height) continue;
        rows->tap[kept] = rows->tap[r];
        rows->at[kept++] = rows->at[r];
    }
    rows->count = kept;
}

void conv_rows(const hflb_pop_conv* job, int64_t from, int64_t to) {
    const int64_t group_outs = job->outs / job->groups, kernel = job->kernel_h * job->kernel_w;
    const int64_t pixel = job->groups * job->words, phases = job->transposed ? job->stride_w : 1;
    const int64_t area = job->out_height * job->out_width;
    Axis rows, columns;
    Taps inside, edge;
    for (int64_t g = 0; g < job->groups; ++g) {
        for (int64_t lane = 0; lane < group_outs; lane += HFLB_POP_LANES) {  // its weights stay in the nearest cache
            const uint64_t* weight = job->weight + g * kernel * job->words * job->lanes + lane;
            const int64_t channel = g * group_outs + lane;
            const int64_t outs = group_outs - lane < HFLB_POP_LANES ? group_outs - lane : HFLB_POP_LANES;
            for (int64_t phase = 0; phase < phases && phase < job->out_width; ++phase) {
                taps_at(&columns, phase, job->kernel_w, job->stride_w, job->pad_w, job->dilation_w, job->transposed);
                const int64_t total = (job->out_width - phase + phases - 1) / phases;
                int64_t low = 0, high = total;
                find_inside(job, &columns, &low, &high);
                for (int64_t row = from; row < to; ++row) {
                    const int64_t n = row / job->out_height, y = row % job->out_height;
                    const Results results = {job, channel, outs, area, (n * job->outs + channel) * area};
                    const uint64_t* image = job->packed + n * job->height * job->width * pixel + g * job->words;
                    rows_inside(job, y, &rows);
                    if (low < high) taps_of_place(job, &rows, &columns, low, &inside);
                    inside.step = columns.step * pixel;
                    one_row(
                        job, &rows, &columns, &inside, &edge, low, high, total, image, weight, &results,
                        y * job->out_width + phase, phases
                    );
                }
            }
        }
    }
}

// Results one by one; the same steps as the vectors take.
HFLB_INLINE void finish_slowly(const Results* to, const int32_t* tile, int64_t place, int64_t apart, int64_t pixels) {
    const hflb_pop_conv* job = to->job;
    const float* act = job->act;
    for (int64_t l = 0; l < to->outs; ++l) {
        const int64_t channel = to->channel + l, base = to->first + l * to->area + place;
        for (int64_t p = 0; p < pixels; ++p) {
            const int32_t dot = tile[p * HFLB_POP_LANES + l];
            if (!job->affine) {
                ((int32_t*)job->y)[base + p * apart] = dot;
                continue;
            }
            volatile float value = job->affine[channel] * (float)dot;  // volatile: each step is rounded, as torch does
            value = value + job->affine[job->outs + channel];
            if (act) {
                value = value + act[job->outs + channel];
                if (value < 0) value = act[channel] * value;
                value = value + act[2 * job->outs + channel];
            }
            ((float*)job->y)[base + p * apart] = value;
        }
    }
}

// One pixel; the same sums as the vectors take.
HFLB_INLINE void pack_one(const hflb_pop_signs* job, int64_t n, int64_t pixel) {
    const int64_t each = job->channels / job->groups;
    uint64_t* out = job->out + (n * job->pixels + pixel) * job->groups * job->words;
    for (int64_t i = 0; i < job->groups * job->words; ++i) out[i] = 0;
    for (int64_t c = 0; c < job->channels; ++c) {
        volatile float value = hflb_value(job->x, job->dtype, (n * job->channels + c) * job->pixels + pixel);
        if (job->gain) value = value * job->gain[c];  // volatile: rounded here, as torch does
        if (job->bias) value = value + job->bias[c];
        const int64_t g = c / each, bit = c % each;
        if (value >= 0) out[g * job->words + bit / 64] |= (uint64_t)1 << bit % 64;
    }
}

}  // namespace
