// One tile of 16 rows, for any instruction set with byte products. The including file defines, in an anonymous namespace:
//   WIDTH                          bytes in a vector: Bytes, Words (32-bit integers) and Floats are as wide
//   prepare(sign, code, keep, bytes, to)  bring the planes of one row into a form from which weights come quickly; bytes
//                                  are a multiple of 16, `to` has room for 4 * (bytes + 64)
//   weights<CODE>(from, bytes, at, step)  bytes 0, 1 or 2 for WIDTH columns: 1 +- 1 where the code is CODE, else 1.
//                                  CODE EVERY: 1 +- 1 everywhere (planes without codes). CODE ITSELF: the code, 0 or 1
//   zero, load_bytes, load_floats, dot, shift_up, to_float, fma, minus, spread, one_of_four, total
//   Rows                           16 floats, one for each row of the tile; rows_of_halves, _brains, _floats, times, add,
//                                  put (at once), put_quads (four and four, apart); or 16 columns: choose, product, sum_of,
//                                  rows_of_one
// Weights times integers is the wanted sum plus the plain sum of the integers, which is taken off once per tile.

namespace {

const int STEPS = HFLB_GROUP / WIDTH;  // vectors that cover a group
const int RUNS = WIDTH / HFLB_RUN;     // runs in a vector
const int PAIR = 2;                    // rows that share what is loaded of the activations

// Scales of the tile's rows, 0 beyond the last row. Fetches those of a later tile as well: they lie too far apart to be
// foreseen by the hardware.
inline Rows scales_of(const hflb_weight* w, const void* table, int64_t entry, int64_t block, int64_t row0) {
    const int64_t left = w->rows - row0, at = (entry * w->blocks + block) * w->rows + row0;
    if (w->scale_dtype == HFLB_F32) {
        const float* from = (const float*)table + at;
        float some[HFLB_TILE] = {0};
        __builtin_prefetch(from + 32);
        if (left >= HFLB_TILE) return rows_of_floats(from);
        for (int64_t r = 0; r < left; ++r) some[r] = from[r];
        return rows_of_floats(some);
    }
    const uint16_t* from = (const uint16_t*)table + at;
    uint16_t some[HFLB_TILE] = {0};
    __builtin_prefetch(from + 64);
    if (left < HFLB_TILE) {
        for (int64_t r = 0; r < left; ++r) some[r] = from[r];
        from = some;
    }
    return w->scale_dtype == HFLB_F16 ? rows_of_halves(from) : rows_of_brains(from);
}

// scales[group][row] of plain columns: row scale times the activations' scale. Returns `fix` plus factor * row scale *
// sum of the activations.
inline Rows plain_scales(
    const hflb_weight* w, const void* table, int64_t entry, int64_t row0, const hflb_digits* x, const float* sum,
    float factor, float* scales, Rows fix
) {
    const int64_t groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP, in_block = w->block_size / HFLB_GROUP;
    for (int64_t block = 0, g = 0; g < groups; ++block) {
        const Rows rows = scales_of(w, table, entry, block, row0);
        for (int64_t i = 0; i < in_block && g < groups; ++i, ++g) {
            put(scales + g * HFLB_TILE, times(rows, x->scale[g]));
            fix = add(fix, rows, factor * sum[g]);
        }
    }
    return fix;
}

// The same for runs: scales[step][four rows][run of the step][row of the four].
inline Rows run_scales(
    const hflb_weight* w, const void* table, int64_t entry, int64_t row0, const hflb_digits* x, const float* sum,
    float factor, float* scales, Rows fix
) {
    Rows rows = scales_of(w, table, entry, w->run_block[0], row0);
    for (int64_t run = 0; run < w->runs; ++run) {
        if (run && w->run_block[run] != w->run_block[run - 1])
            rows = scales_of(w, table, entry, w->run_block[run], row0);
        put_quads(scales + (run / RUNS) * HFLB_TILE * RUNS + (run % RUNS) * 4, RUNS * 4, times(rows, x->scale[run / 8]));
        fix = add(fix, rows, factor * sum[run]);
    }
    return fix;
}

// Plain columns of two rows; scales are those of the first row, `apart` those of the second.
template <int CODE, int PLANES>
inline void plain_pair(
    const uint8_t* const* row, int64_t bytes, const int8_t* digits, const float* scales, int64_t apart, Floats* sum
) {
    Floats sum0 = sum[0], sum1 = sum[1];
    for (int64_t at = 0; at < bytes; at += 16, digits += PLANES * HFLB_GROUP, scales += HFLB_TILE) {
        Bytes w0[STEPS], w1[STEPS];
        for (int s = 0; s < STEPS; ++s) w0[s] = weights<CODE>(row[0], bytes, at, s), w1[s] = weights<CODE>(row[1], bytes, at, s);
        Words part0 = zero(), part1 = zero();
        for (int p = 0; p < PLANES; ++p) {
            if (p) part0 = shift_up(part0), part1 = shift_up(part1);
            for (int s = 0; s < STEPS; ++s) {
                const Bytes x = load_bytes(digits + p * HFLB_GROUP + s * WIDTH);
                part0 = dot(part0, w0[s], x), part1 = dot(part1, w1[s], x);
            }
        }
        sum0 = fma(to_float(part0), spread(scales[0]), sum0);
        sum1 = fma(to_float(part1), spread(scales[apart]), sum1);
    }
    sum[0] = sum0, sum[1] = sum1;
}

// Runs of two rows; `scales` are those of the four rows that they are among, `which` says which of them.
template <int CODE, int PLANES>
inline void run_pair(
    const uint8_t* const* row, int64_t bytes, const int8_t* digits, const float* scales, const int* which, Floats* sum
) {
    Floats sum0 = sum[0], sum1 = sum[1];
    for (int64_t at = 0; at < bytes; at += 16, digits += PLANES * HFLB_GROUP) {
        for (int s = 0; s < STEPS; ++s, scales += HFLB_TILE * RUNS) {
            const Bytes w0 = weights<CODE>(row[0], bytes, at, s), w1 = weights<CODE>(row[1], bytes, at, s);
            Words part0 = zero(), part1 = zero();
            for (int p = 0; p < PLANES; ++p) {
                if (p) part0 = shift_up(part0), part1 = shift_up(part1);
                const Bytes x = load_bytes(digits + p * HFLB_GROUP + s * WIDTH);
                part0 = dot(part0, w0, x), part1 = dot(part1, w1, x);
            }
            const Floats four = load_floats(scales);
            sum0 = fma(to_float(part0), one_of_four(four, which[0]), sum0);
            sum1 = fma(to_float(part1), one_of_four(four, which[1]), sum1);
        }
    }
    sum[0] = sum0, sum[1] = sum1;
}

// Where the parts of one token's scales begin, in floats.
struct Layout {
    int64_t plain, runs;        // sizes for one code
    int64_t first, second;      // scales of the two planes of the runs, after those of plain columns
    int64_t shift, run_shift;   // shifts of plain columns and of runs
    int64_t all;
};

inline Layout layout_of(const hflb_weight* w) {
    Layout at;
    at.plain = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP * HFLB_TILE;
    at.runs = w->runs * HFLB_TILE;
    at.first = w->groups * at.plain;
    at.second = at.first + w->salient_groups * at.runs;
    at.shift = at.second + w->salient_groups * at.runs;
    at.run_shift = at.shift + (w->row_shift ? w->groups * at.plain : 0);
    at.all = at.run_shift + (w->row_shift ? w->salient_groups * at.runs : 0);
    return at;
}

inline void scale_token(const hflb_weight* w, const Layout* at, const hflb_token* x, int64_t row0, float* scales, float* out) {
    const int64_t G = w->groups, S = w->salient_groups, groups = at->plain / HFLB_TILE;
    const float none[HFLB_TILE] = {0};
    Rows fix = rows_of_floats(none);
    for (int64_t h = 0; h < G; ++h)
        fix = plain_scales(w, w->row_scale, S + h, row0, &x->plain, x->plain.sum + h * groups, -1, scales + h * at->plain, fix);
    for (int64_t h = 0; h < S; ++h) {
        const int64_t own = h * at->runs, sums = h * w->runs;
        fix = run_scales(w, w->row_scale, h, row0, &x->first, x->first.sum + sums, -1, scales + at->first + own, fix);
        fix = run_scales(w, w->row_scale, S + G + h, row0, &x->second, x->second.sum + sums, -1, scales + at->second + own, fix);
    }
    if (w->row_shift) {
        // sum of shift[code] * x = shift[0] * sum of x + (shift[1] - shift[0]) * sum of x where the code is 1
        for (int64_t h = 0; h < G; ++h)
            fix = plain_scales(
                w, w->row_shift, S + h, row0, &x->plain, x->plain.sum, h ? 0 : 1, scales + at->shift + h * at->plain, fix
            );
        for (int64_t h = 0; h < S; ++h)
            fix = run_scales(
                w, w->row_shift, h, row0, &x->first, x->first.sum, h ? 0 : 1, scales + at->run_shift + h * at->runs, fix
            );
    }
    put(out, fix);
}

template <int PLANES>
inline void tile(const hflb_work* work, int64_t row0, float* out) {
    const hflb_weight* w = work->weight;
    const Layout at = layout_of(w);
    const int64_t groups = at.plain / HFLB_TILE, bytes = groups * 16, run_bytes = w->runs * 2;
    const int64_t G = w->groups, S = w->salient_groups, left = w->rows - row0;
    const int64_t count = left < HFLB_TILE ? left : HFLB_TILE;
    const int64_t plain_code = groups * PLANES * HFLB_GROUP, run_code = w->runs / 8 * PLANES * HFLB_GROUP;
    uint8_t* buffer = (uint8_t*)(work->scratch + work->count * at.all);
    const int64_t size = 4 * (bytes + 64), run_size = 4 * (run_bytes + 64);
    uint8_t* const row[PAIR] = {buffer, buffer + size};
    uint8_t* const first[PAIR] = {buffer + 2 * size, buffer + 2 * size + run_size};
    uint8_t* const second[PAIR] = {first[1] + run_size, first[1] + 2 * run_size};

    for (int64_t m = 0; m < work->count; ++m)
        scale_token(w, &at, work->tokens + m, row0, work->scratch + m * at.all, out + m * HFLB_TILE);
    for (int64_t r = 0; r < count; r += PAIR) {
        const int64_t other = r + 1 < count ? 1 : 0;  // a last row without a partner is its own
        const int which[PAIR] = {(int)(r % 4), (int)((r + other) % 4)};
        for (int i = 0; i < PAIR; ++i) {
            const int64_t n = row0 + r + i * other;
            const uint8_t* codes = G > 1 ? w->group + n * bytes : 0;
            prepare(w->sign + n * bytes, codes, w->keep ? w->keep + n * bytes : 0, bytes, row[i]);
            if (!S) continue;
            const int64_t plane = w->rows * run_bytes;
            const uint8_t* planes = w->run_planes + n * run_bytes;
            const uint8_t* run_codes = S > 1 ? planes + plane : 0;
            const uint8_t* run_keep = w->keep ? planes + 3 * plane : 0;
            prepare(planes, run_codes, run_keep, run_bytes, first[i]);
            prepare(planes + 2 * plane, run_codes, run_keep, run_bytes, second[i]);
        }
        for (int64_t m = 0; m < work->count; ++m) {
            const hflb_token* x = work->tokens + m;
            const float* scales = work->scratch + m * at.all;
            const float* plain = scales + r;
            const float* runs = scales + at.first + r / 4 * RUNS * 4;
            Floats sum[PAIR] = {no_floats(), no_floats()}, less[PAIR] = {no_floats(), no_floats()};
            if (G == 1) {
                plain_pair<EVERY, PLANES>(row, bytes, x->plain.bytes, plain, other, sum);
            } else {
                plain_pair<0, PLANES>(row, bytes, x->plain.bytes, plain, other, sum);
                plain_pair<1, PLANES>(row, bytes, x->plain.bytes + plain_code, plain + at.plain, other, sum);
            }
            for (int plane = 0; plane < 2 && S; ++plane, runs += S * at.runs) {
                const int8_t* digits = plane ? x->second.bytes : x->first.bytes;
                const uint8_t* const* from = plane ? second : first;
                if (S == 1) {
                    run_pair<EVERY, PLANES>(from, run_bytes, digits, runs, which, sum);
                } else {
                    run_pair<0, PLANES>(from, run_bytes, digits, runs, which, sum);
                    run_pair<1, PLANES>(from, run_bytes, digits + run_code, runs + at.runs, which, sum);
                }
            }
            if (w->row_shift && G > 1) {
                const float* own = scales + at.shift + r;
                plain_pair<ITSELF, PLANES>(row, bytes, x->plain.bytes, own + at.plain, other, sum);
                plain_pair<ITSELF, PLANES>(row, bytes, x->plain.bytes, own, other, less);
            }
            if (w->row_shift && S > 1) {
                const float* own = scales + at.run_shift + r / 4 * RUNS * 4;
                run_pair<ITSELF, PLANES>(first, run_bytes, x->first.bytes, own + at.runs, which, sum);
                run_pair<ITSELF, PLANES>(first, run_bytes, x->first.bytes, own, which, less);
            }
            for (int64_t i = 0; i <= other; ++i) out[m * HFLB_TILE + r + i] += total(minus(sum[i], less[i]));
        }
    }
}

// The scale of one row in one block.
inline float one_scale(const hflb_weight* w, const void* table, int64_t entry, int64_t block, int64_t row) {
    const int64_t at = (entry * w->blocks + block) * w->rows + row;
    if (w->scale_dtype == HFLB_F32) return ((const float*)table)[at];
    const uint16_t half = ((const uint16_t*)table)[at];
    return w->scale_dtype == HFLB_F16 ? hflb_half_to_float(half) : hflb_brain_to_float(half);
}

// +-scale * column scale + shift of 16 columns or slots; `code` is null where there is one code.
inline Rows values_of(
    const uint8_t* sign, const uint8_t* code, const uint8_t* keep, int bit, const float* columns, int64_t other,
    const float* scale, const float* shift
) {
    const Rows none = rows_of_one(0.0f);
    Rows value = times(rows_of_floats(columns), scale[0]), offset = rows_of_one(shift[0]);
    if (code) {
        value = choose(code, bit, times(rows_of_floats(columns + other), scale[1]), value);
        offset = choose(code, bit, rows_of_one(shift[1]), offset);
    }
    value = sum_of(choose(sign, bit, value, product(value, rows_of_one(-1.0f))), offset);
    return keep ? choose(keep, bit, value, none) : value;
}

inline void expand(const hflb_weight* w, int64_t row, float* out, float* buffer) {
    const int64_t groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP, G = w->groups, S = w->salient_groups;
    const int64_t bytes = groups * 16, run_bytes = w->runs * 2, in_block = w->block_size / HFLB_GROUP;
    float scale[4], shift[2] = {0, 0}, none[2] = {0, 0};
    for (int64_t g = 0; g < groups; ++g) {
        if (g % in_block == 0)
            for (int64_t h = 0; h < G; ++h) {
                scale[h] = one_scale(w, w->row_scale, S + h, g / in_block, row);
                if (w->row_shift) shift[h] = one_scale(w, w->row_shift, S + h, g / in_block, row);
            }
        const int64_t at = row * bytes + g * 16;
        for (int bit = 0; bit < 8; ++bit)
            put(out + g * HFLB_GROUP + bit * 16,
                values_of(
                    w->sign + at, G > 1 ? w->group + at : 0, w->keep ? w->keep + at : 0, bit,
                    w->plain_scale + g * HFLB_GROUP + bit * 16, groups * HFLB_GROUP, scale, shift
                ));
    }
    const int64_t plane = w->rows * run_bytes, slots = w->runs * HFLB_RUN;
    for (int64_t run = 0; run < w->runs; ++run) {
        const int64_t block = w->run_block[run];
        for (int64_t h = 0; h < S; ++h) {
            scale[h] = one_scale(w, w->row_scale, h, block, row);
            scale[2 + h] = one_scale(w, w->row_scale, S + G + h, block, row);
            if (w->row_shift) shift[h] = one_scale(w, w->row_shift, h, block, row);
        }
        const uint8_t* planes = w->run_planes + row * run_bytes + run / 8 * 16;
        const uint8_t* codes = S > 1 ? planes + plane : 0;
        const uint8_t* keep = w->keep ? planes + 3 * plane : 0;
        const int bit = (int)(run % 8);
        const float* first = w->first_scale + run * HFLB_RUN;
        const float* second = w->second_scale + run * HFLB_RUN;
        put(buffer, sum_of(
            values_of(planes, codes, keep, bit, first, slots, scale, shift),
            values_of(planes + 2 * plane, codes, keep, bit, second, slots, scale + 2, none)
        ));
        for (int i = 0; i < HFLB_RUN; ++i)
            if (w->run_column[run * HFLB_RUN + i] >= 0) out[w->run_column[run * HFLB_RUN + i]] = buffer[i];
    }
}

inline void any_tile(const hflb_work* work, int64_t row0, float* out) {
    if (work->planes == 1) tile<1>(work, row0, out);
    else if (work->planes == 2) tile<2>(work, row0, out);
    else tile<3>(work, row0, out);
}

}  // namespace
