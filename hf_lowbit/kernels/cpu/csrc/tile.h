// One tile of 16 rows, for any instruction set. The including file defines, in an anonymous namespace, things of 16
// parts, one for each row of the tile (or for each of 16 columns, in `make_token` and `expand`):
//   Floats                          load, store, spread, times, fma, plus, choose, times_where, negated_unless, negated,
//                                   magnitude, larger, from_halves, from_brains, store_as (in a dtype)
//   Ints                            spread, plus, shift_up, to_floats, to_ints, next_digit, store_digit, sum_of
//   Bytes                           four bytes each: load_rows, both, inverse, evens, odds, weights
//   Four                            four digits, in every part: four_of
//   Sums                            of products of four bytes: no_sums, dot, total; sums_from, if STARTS says so
// and AT_ONCE, how often 16 rows or how many tokens there are registers for.
// A weight is a byte: 2 * high + low, of two bits. With the sign where the code of a position is h as the high bit, and
// "the code is another" as the low bit, it is 1 +- 1 where the code is h, else 1. The plain sum of the activations, which
// this is too much, is taken off at the start. Codes alone as low bits give the sums that shifts need.

namespace {

const int BITS = 8;    // bit positions of a byte: 16 columns each
const int WORDS = 4;   // four columns each, of the 16

const int STRIP = 4;   // groups whose planes are loaded together: 64 bytes, a line of the cache

// Planes of 16 rows in a strip: [group][word].
struct Planes {
    Bytes sign[STRIP * WORDS], code[STRIP * WORDS], keep[STRIP * WORDS];
};

HFLB_INLINE void fetch(const uint8_t* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// High and low bits of the weights for code `h`; where a position is pruned the code is another.
HFLB_INLINE void sign_bits(
    const hflb_weight* w, const Planes* from, int64_t group, int64_t coded, int64_t h, Bytes* high, Bytes* low
) {
    const Bytes* sign = from->sign + group * WORDS;
    const Bytes* codes = from->code + group * WORDS;
    const Bytes* keep = from->keep + group * WORDS;
    for (int k = 0; k < WORDS; ++k) {
        if (!coded && !w->keep) {
            high[k] = sign[k], low[k] = no_bytes();
            continue;
        }
        const Bytes is = !coded || (w->keep && !h) ? keep[k] : h ? codes[k] : inverse(codes[k]);
        high[k] = both(is, sign[k]), low[k] = inverse(is);
    }
}

// The same for weights that are 1 where the code is `h`, else 0.
HFLB_INLINE void code_bits(
    const hflb_weight* w, const Planes* from, int64_t group, int64_t coded, int64_t h, Bytes* high, Bytes* low
) {
    const Bytes* codes = from->code + group * WORDS;
    const Bytes* keep = from->keep + group * WORDS;
    for (int k = 0; k < WORDS; ++k) {
        const Bytes is = !coded || (w->keep && !h) ? keep[k] : h ? codes[k] : inverse(codes[k]);
        high[k] = no_bytes(), low[k] = is;
    }
}

// The bits of a plane's weights in pairs, ready for `weights`.
struct Pairs {
    Bytes even[WORDS], odd[WORDS];
};

// What one code's sums of 16 rows need. Returns 0 where every weight is 1 and no product is needed.
HFLB_INLINE int pairs_of(
    const hflb_weight* w, const Planes* planes, int64_t group, int64_t coded, int64_t code, int64_t shift, Pairs* to
) {
    Bytes high[WORDS], low[WORDS];
    if (shift && !coded && !w->keep) return 0;
    if (shift) code_bits(w, planes, group, coded, code, high, low);
    else sign_bits(w, planes, group, coded, code, high, low);
    for (int k = 0; k < WORDS; ++k) to->even[k] = evens(high[k], low[k]), to->odd[k] = odds(high[k], low[k]);
    return 1;
}

// The digits' sums before anything is added; `start` belongs to the value that `joined` makes of them.
template <int DIGITS>
HFLB_INLINE void begin(Sums* sum, int32_t start) {
    for (int d = 0; d < DIGITS; ++d) sum[d] = no_sums();
    if (STARTS) sum[DIGITS - 1] = sums_from(start);
}

// The digits' sums as one, from the most significant on.
template <int DIGITS>
HFLB_INLINE Ints joined(const Sums* sum, int32_t start) {
    Ints all = total(sum[0]);
    for (int d = 1; d < DIGITS; ++d) all = plus(shift_up(all), total(sum[d]));
    return STARTS ? all : plus(all, spread(start));
}

// Sums of the 16 columns of one bit position.
template <int DIGITS, int HALVES>
HFLB_INLINE void add_words(const Pairs* pairs, int bit, const int8_t* digits, Sums (*sum)[DIGITS]) {
#pragma GCC unroll 4
    for (int k = 0; k < WORDS; ++k) {
        Four x[DIGITS];
        for (int d = 0; d < DIGITS; ++d) x[d] = four_of(digits + d * HFLB_GROUP + k * 4);
        for (int h = 0; h < HALVES; ++h) {
            const Bytes weight = weights(bit % 2 ? pairs[h].odd[k] : pairs[h].even[k], bit / 2);
            for (int d = 0; d < DIGITS; ++d) sum[h][d] = dot(sum[h][d], weight, x[d]);
        }
    }
}

// Two pieces of memory that are soon needed, HALVES * 4 lines of the cache each. They are asked for one line at a time
// between products: more at once than the processor has buffers for would hold up all that comes after.
struct Ahead {
    const uint8_t *first, *second;
};

// Sums of 128 columns: HALVES times 16 rows, which share what is loaded of the activations, and TOKENS tokens, which
// share the weights.
template <int DIGITS, int TOKENS, int HALVES>
HFLB_INLINE void products(
    const Pairs* pairs, const int8_t* const* digits, const int32_t* start, Ahead ahead, Ints (*out)[HALVES]
) {
    Sums sum[TOKENS][HALVES][DIGITS];
    for (int t = 0; t < TOKENS; ++t)
        for (int h = 0; h < HALVES; ++h) begin<DIGITS>(sum[t][h], start[t]);
#pragma GCC unroll 4
    for (int k = 0; k < WORDS; ++k) {
#pragma GCC unroll 8
        for (int bit = 0; bit < BITS; ++bit) {
            const int line = (k * BITS + bit) % 16;
            if (line < HALVES * 4) __builtin_prefetch((k < WORDS / 2 ? ahead.first : ahead.second) + line * 64, 0, 2);
            Bytes weight[HALVES];
            for (int h = 0; h < HALVES; ++h) weight[h] = weights(bit % 2 ? pairs[h].odd[k] : pairs[h].even[k], bit / 2);
            for (int t = 0; t < TOKENS; ++t)
                for (int d = 0; d < DIGITS; ++d) {
                    const Four x = four_of(digits[t] + d * HFLB_GROUP + bit * 16 + k * 4);
                    for (int h = 0; h < HALVES; ++h) sum[t][h][d] = dot(sum[t][h][d], weight[h], x);
                }
        }
    }
    for (int t = 0; t < TOKENS; ++t)
        for (int h = 0; h < HALVES; ++h) out[t][h] = joined<DIGITS>(sum[t][h], start[t]);
}

HFLB_INLINE Floats add_scaled(Floats to, Floats scale, float unit, Ints value) {
    return fma(times(scale, spread(unit)), to_floats(value), to);
}

// Plain columns of one group of 128, for TOKENS tokens from x on. `ahead` has four pieces of memory to ask for.
template <int DIGITS, int TOKENS, int HALVES>
HFLB_INLINE void plain_group(
    const hflb_weight* w, const hflb_token* x, int64_t row0, int64_t g, const Planes* planes, const uint8_t* const* ahead,
    Floats (*sums)[HALVES]
) {
    const int64_t groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP, G = w->groups;
    const int64_t block = g / (w->block_size / HFLB_GROUP);
    for (int64_t n = 0; n < (w->row_shift ? 2 * G : G); ++n) {
        const int64_t code = n % G, shift = n >= G;  // with shifts column scales are 1: one set of digits for both codes
        const int64_t at = (shift ? 0 : code) * groups + g;
        const void* table = shift ? w->row_shift : w->row_scale;
        const int64_t entries = shift ? shift_entries(w) : scale_entries(w);
        Pairs pairs[HALVES];
        const int8_t* digits[TOKENS];
        int32_t start[TOKENS];
        Ints out[TOKENS][HALVES];
        int needed = 1;
        for (int h = 0; h < HALVES; ++h) needed = pairs_of(w, planes + h, g % STRIP, G > 1, code, shift, pairs + h);
        for (int t = 0; t < TOKENS; ++t) {
            digits[t] = x[t].plain.bytes + at * DIGITS * HFLB_GROUP;
            start[t] = shift ? 0 : -x[t].plain.sum[at];
            for (int h = 0; h < HALVES; ++h) out[t][h] = spread(x[t].plain.sum[at]);
        }
        const Ahead two = {ahead[n % 2 * 2], ahead[n % 2 * 2 + 1]};
        if (needed) products<DIGITS, TOKENS, HALVES>(pairs, digits, start, two, out);
        const uint8_t* scales = scales_at(w, table, entries, block, row0);
        for (int h = 0; h < HALVES; ++h) {
            const Floats scale = scales_of(w, scales, (w->salient_groups + code) * HFLB_STRIP + h * HFLB_TILE);
            for (int t = 0; t < TOKENS; ++t) sums[t][h] = add_scaled(sums[t][h], scale, x[t].plain.scale[g], out[t][h]);
        }
    }
}

// One plane of the salient columns in one group of eight runs; `part` is 1 for the second plane.
template <int DIGITS, int TOKENS, int HALVES>
HFLB_INLINE void run_group(
    const hflb_weight* w, const hflb_token* tokens, int64_t row0, int64_t g, int part, const Planes* planes,
    Floats (*sums)[HALVES]
) {
    const int64_t G = w->groups, S = w->salient_groups;
    for (int64_t n = 0; n < (w->row_shift && !part ? 2 * S : S); ++n) {
        const int64_t code = n % S, shift = n >= S, entry = (part ? S + G : 0) + code;
        const int64_t at = (shift ? 0 : code) * (w->runs / BITS) + g;
        const void* table = shift ? w->row_shift : w->row_scale;
        const int64_t entries = shift ? shift_entries(w) : scale_entries(w);
        Pairs pairs[HALVES];
        int needed = 1;
        for (int h = 0; h < HALVES; ++h) needed = pairs_of(w, planes + h, g % STRIP, S > 1, code, shift, pairs + h);
#pragma GCC unroll 8
        for (int bit = 0; bit < BITS; ++bit) {
            if (g * BITS + bit >= w->used_runs) break;
            const uint8_t* scales = scales_at(w, table, entries, w->run_block[g * BITS + bit], row0);
            Floats scale[HALVES];
            for (int h = 0; h < HALVES; ++h) scale[h] = scales_of(w, scales, entry * HFLB_STRIP + h * HFLB_TILE);
            for (int t = 0; t < TOKENS; ++t) {
                const hflb_digits* x = part ? &tokens[t].second : &tokens[t].first;
                const int8_t* digits = x->bytes + at * DIGITS * HFLB_GROUP + bit * HFLB_RUN;
                const int32_t plain = x->sum[at * BITS + bit];
                const int32_t start = !needed ? plain : shift ? 0 : -plain;
                Sums sum[HALVES][DIGITS];
                for (int h = 0; h < HALVES; ++h) begin<DIGITS>(sum[h], start);
                if (needed) add_words<DIGITS, HALVES>(pairs, bit, digits, sum);
                for (int h = 0; h < HALVES; ++h)
                    sums[t][h] = add_scaled(sums[t][h], scale[h], x->scale[g], joined<DIGITS>(sum[h], start));
            }
        }
    }
}

// Reading ahead: hardware follows the planes of so many rows badly. What the next rows need is asked for while these are
// worked on, group g's share of it. The four pieces are left for `products` to ask for.
HFLB_INLINE void fetch_ahead(
    const hflb_weight* w, int64_t row0, int64_t rows, int64_t g, int64_t groups, const uint8_t** pieces
) {
    const int64_t next = row0 + rows, in_block = w->block_size / HFLB_GROUP, block = g / in_block, step = rows * 16;
    const uint8_t* here = w->sign + row0 * groups * 16;  // nothing to ask for: what is there already
    for (int i = 0; i < 4; ++i) pieces[i] = here;
    if (next + rows > w->rows) return;
    const int64_t at = next * groups * 16 + g * step;
    int count = 0;
    pieces[count++] = w->sign + at;
    if (w->groups > 1) pieces[count++] = w->group + at;
    if (w->keep) pieces[count++] = w->keep + at;
    const int64_t lines = w->runs * (w->keep ? 4 : 3), first = lines * g / groups, last = lines * (g + 1) / groups;
    for (int64_t line = first; line < last; ++line) {
        const int64_t plane = line / w->runs, bytes = rows * 2;
        if (plane != 1 || w->salient_groups > 1)
            fetch(w->run_planes + (plane * w->rows + next) * w->runs * 2 + line % w->runs * bytes, bytes);
    }
    if (g % in_block || next % HFLB_STRIP) return;
    const int64_t size = HFLB_STRIP * (w->scale_dtype == HFLB_F16 ? 2 : 4), scales = scale_entries(w) * size;
    const uint8_t* table = scales_at(w, w->row_scale, scale_entries(w), block, next);
    const int64_t asked = count < 2 * w->groups ? rows * 16 : 0;  // by `products`
    if (asked) pieces[count++] = table;
    fetch(table + asked, scales - asked);
    if (w->row_shift) fetch(scales_at(w, w->row_shift, shift_entries(w), block, next), shift_entries(w) * size);
}

// HALVES times 16 rows for TOKENS tokens from number m on.
template <int DIGITS, int TOKENS, int HALVES>
inline void tile(const hflb_work* work, int64_t row0, int64_t m) {
    const hflb_weight own_weight = *work->weight;  // a copy, which no store can change
    const hflb_weight* w = &own_weight;
    const hflb_token* x = work->tokens + m;
    const int64_t groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP, run_groups = w->runs / BITS;
    const int64_t bytes = groups * 16, run_bytes = w->runs * 2, plane = w->rows * run_bytes;
    int64_t at[HALVES * HFLB_TILE], run_at[HALVES * HFLB_TILE];
    for (int r = 0; r < HALVES * HFLB_TILE; ++r) {  // a row beyond the last is read as the last, and its sum dropped
        const int64_t row = row0 + r < w->rows ? row0 + r : w->rows - 1;
        at[r] = row * bytes, run_at[r] = row * run_bytes;
    }
    Floats sums[TOKENS][HALVES];
    Planes planes[HALVES];
    const uint8_t* ahead[4];
    for (int h = 0; h < HALVES; ++h) {
        for (int t = 0; t < TOKENS; ++t) sums[t][h] = spread(0.0f);
    }
    for (int64_t g = 0; g < groups; ++g) {
        fetch_ahead(w, row0, m ? w->rows : HALVES * HFLB_TILE, g, groups, ahead);
        const int64_t strip = groups - g < STRIP ? groups - g : STRIP;
        for (int h = 0; h < HALVES && g % STRIP == 0; ++h) {
            load_rows(w->sign + g * 16, at + h * HFLB_TILE, strip, planes[h].sign);
            if (w->groups > 1) load_rows(w->group + g * 16, at + h * HFLB_TILE, strip, planes[h].code);
            if (w->keep) load_rows(w->keep + g * 16, at + h * HFLB_TILE, strip, planes[h].keep);
        }
        plain_group<DIGITS, TOKENS, HALVES>(w, x, row0, g, planes, ahead, sums);
    }
    for (int64_t from = 0; from < run_groups; from += STRIP) {
        const uint8_t* own = w->run_planes + from * 16;
        const int64_t strip = run_groups - from < STRIP ? run_groups - from : STRIP;
        for (int h = 0; h < HALVES; ++h) {
            if (w->salient_groups > 1) load_rows(own + plane, run_at + h * HFLB_TILE, strip, planes[h].code);
            if (w->keep) load_rows(own + 3 * plane, run_at + h * HFLB_TILE, strip, planes[h].keep);
        }
        for (int part = 0; part < 2; ++part) {
            for (int h = 0; h < HALVES; ++h)
                load_rows(own + 2 * part * plane, run_at + h * HFLB_TILE, strip, planes[h].sign);
            for (int64_t g = from; g < from + strip; ++g) {
                run_group<DIGITS, TOKENS, HALVES>(w, x, row0, g, part, planes, sums);
            }
        }
    }
    const int64_t left = w->rows - row0, count = left < HALVES * HFLB_TILE ? left : HALVES * HFLB_TILE;
    for (int t = 0; t < TOKENS; ++t) {
        float out[HALVES * HFLB_TILE];
        for (int h = 0; h < HALVES; ++h) store(out + h * HFLB_TILE, sums[t][h]);
        if (work->bias)
            for (int64_t i = 0; i < count; ++i) out[i] += hflb_value(work->bias, work->dtype, row0 + i);
        hflb_store(work->y, work->dtype, (m + t) * w->rows + row0, out, count);
    }
}

// Rows from `row0` to `end`: as many rows or tokens at once as there are registers for.
template <int DIGITS>
inline void all_tokens(const hflb_work* work, int64_t row0, int64_t end) {
    int64_t m = 0;
    for (; AT_ONCE >= 4 && m + 4 <= work->count; m += 4)
        for (int64_t row = row0; row < end; row += HFLB_TILE) tile<DIGITS, AT_ONCE >= 4 ? 4 : 1, 1>(work, row, m);
    for (; AT_ONCE >= 2 && m + 2 <= work->count; m += 2)
        for (int64_t row = row0; row < end; row += HFLB_TILE) tile<DIGITS, AT_ONCE >= 2 ? 2 : 1, 1>(work, row, m);
    for (; m < work->count; ++m) {
        int64_t row = row0;
        for (; AT_ONCE > 1 && row + AT_ONCE * HFLB_TILE <= end; row += AT_ONCE * HFLB_TILE) tile<DIGITS, 1, AT_ONCE>(work, row, m);
        for (; row < end; row += HFLB_TILE) tile<DIGITS, 1, 1>(work, row, m);
    }
}

inline void any_rows(const hflb_work* work, int64_t row0, int64_t end) {
    if (work->digits == 1) all_tokens<1>(work, row0, end);
    else if (work->digits == 2) all_tokens<2>(work, row0, end);
    else all_tokens<3>(work, row0, end);
}

// Activations -------------------------------------------------------------------------------------------------------

// Largest integer that `digits` signed bytes hold, each from -128 to 127; a little less where floats round.
inline float limit_of(int64_t digits) { return digits == 1 ? 127.0f : digits == 2 ? 32639.0f : 8355000.0f; }

// Values [codes][groups * 128] as integers; codes share a scale. `width`: columns whose sums are wanted, 128 or 16.
inline void to_digits(const float* values, int64_t codes, int64_t groups, int64_t digits, int64_t width, const hflb_digits* to) {
    const int64_t columns = groups * HFLB_GROUP, parts = HFLB_GROUP / width;
    for (int64_t g = 0; g < groups; ++g) {
        Floats largest = spread(0.0f);
        for (int64_t h = 0; h < codes; ++h)
            for (int i = 0; i < HFLB_GROUP; i += 16)
                largest = larger(largest, magnitude(load(values + h * columns + g * HFLB_GROUP + i)));
        float all[16], most = 0.0f;
        store(all, largest);
        for (int i = 0; i < 16; ++i) most = all[i] > most ? all[i] : most;
        const float factor = most > 0.0f ? limit_of(digits) / most : 0.0f;
        const Floats safe = spread(factor <= 3.0e38f ? factor : 0.0f);  // the reciprocal of a denormal overflows
        to->scale[g] = most / limit_of(digits);
        for (int64_t h = 0; h < codes; ++h) {
            int8_t* bytes = to->bytes + (h * groups + g) * digits * HFLB_GROUP;
            Ints sum = spread((int32_t)0);
            for (int i = 0; i < HFLB_GROUP; i += 16) {
                Ints rest = to_ints(times(load(values + h * columns + g * HFLB_GROUP + i), safe));
                if (parts == 1) sum = plus(sum, rest);
                else to->sum[(h * groups + g) * parts + i / 16] = sum_of(rest);
                for (int64_t d = digits - 1; d >= 0; --d, rest = next_digit(rest)) store_digit(bytes + d * HFLB_GROUP + i, rest);
            }
            if (parts == 1) to->sum[h * groups + g] = sum_of(sum);
        }
    }
}

inline Floats load_any(const void* from, int64_t dtype, int64_t at) {
    if (dtype == HFLB_F32) return load((const float*)from + at);
    return dtype == HFLB_F16 ? from_halves((const uint16_t*)from + at) : from_brains((const uint16_t*)from + at);
}

// One token, x [columns]; returns 0 if it holds NaN or infinity, which have no integer. `values` has room for
// padded + max(groups * padded, salient_groups * runs * 16) floats.
inline int make_token(const hflb_weight* w, const void* x, int64_t dtype, int64_t digits, float* values, const hflb_token* to) {
    const int64_t groups = (w->columns + HFLB_GROUP - 1) / HFLB_GROUP, padded = groups * HFLB_GROUP;
    const int64_t slots = w->runs * HFLB_RUN, full = w->columns / 16 * 16;
    float* raw = values;
    float* scaled = raw + padded;
    Floats check = spread(0.0f);
    for (int64_t j = 0; j < full; j += 16) {
        const Floats own = load_any(x, dtype, j);
        store(raw + j, own);
        check = fma(own, spread(0.0f), check);
    }
    float checks[16], bad = 0.0f;
    store(checks, check);
    for (int i = 0; i < 16; ++i) bad += checks[i];
    for (int64_t j = full; j < padded; ++j) {
        raw[j] = j < w->columns ? hflb_value(x, dtype, j) : 0.0f;
        bad += raw[j] * 0.0f;
    }
    if (bad != 0.0f) return 0;  // NaN
    for (int64_t h = 0; h < w->groups; ++h)
        for (int64_t j = 0; j < padded; j += 16)
            store(scaled + h * padded + j, times(load(raw + j), load(w->plain_scale + h * padded + j)));
    to_digits(scaled, w->groups, groups, digits, HFLB_GROUP, &to->plain);
    for (int part = 0; part < 2 && w->runs; ++part) {
        const float* column_scale = part ? w->second_scale : w->first_scale;
        for (int64_t h = 0; h < w->salient_groups; ++h)
            for (int64_t i = 0; i < slots; ++i) {
                const float own = column_scale[h * slots + i];
                scaled[h * slots + i] = own != 0.0f ? raw[w->run_column[i]] * own : 0.0f;
            }
        to_digits(scaled, w->salient_groups, w->runs / BITS, digits, HFLB_RUN, part ? &to->second : &to->first);
    }
    return 1;
}

}  // namespace
