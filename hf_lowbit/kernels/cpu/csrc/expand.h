// Dense rows from the planes, for any instruction set; tile.h tells what the including file defines.

namespace {

// Where the scales of a row begin that a table of so many entries has for a block.
HFLB_INLINE const uint8_t* scales_at(const hflb_weight* w, const void* table, int64_t entries, int64_t block, int64_t row) {
    const int64_t size = w->scale_dtype == HFLB_F16 ? 2 : 4;
    return (const uint8_t*)table + ((row / HFLB_STRIP * w->blocks + block) * entries * HFLB_STRIP + row % HFLB_STRIP) * size;
}

// 16 of them; what lies before is counted in rows.
HFLB_INLINE Floats scales_of(const hflb_weight* w, const uint8_t* from, int64_t rows) {
    return w->scale_dtype == HFLB_F16 ? from_halves((const uint16_t*)from + rows) : load((const float*)from + rows);
}

HFLB_INLINE int64_t scale_entries(const hflb_weight* w) { return 2 * w->salient_groups + w->groups; }
HFLB_INLINE int64_t shift_entries(const hflb_weight* w) { return w->salient_groups + w->groups; }

// Scales and shifts of 16 rows as floats: [entry][block][row]. In the file those of one row lie far apart.
struct Scales {
    const float* scale;
    const float* shift;  // null without
};

HFLB_INLINE Scales gather_scales(const hflb_weight* w, int64_t row0, float* to) {
    const int64_t scales = scale_entries(w), shifts = w->row_shift ? shift_entries(w) : 0;
    const Scales found = {to, shifts ? to + scales * w->blocks * HFLB_TILE : 0};
    for (int64_t entry = 0; entry < scales + shifts; ++entry)
        for (int64_t block = 0; block < w->blocks; ++block, to += HFLB_TILE)
            store(
                to, entry < scales ? scales_of(w, scales_at(w, w->row_scale, scales, block, row0), entry * HFLB_STRIP)
                                   : scales_of(w, scales_at(w, w->row_shift, shifts, block, row0), (entry - scales) * HFLB_STRIP)
            );
    return found;
}

// +-scale * column scale of 16 columns or slots, by their code.
template <int CODED>
HFLB_INLINE Floats signed_of(Bits sign, Bits code, int bit, const float* columns, int64_t other, const Floats* scale) {
    Floats value = times(load(columns), scale[0]);
    if (CODED) value = times_where(code, bit, load(columns + other), scale[1], value);
    return negated_unless(sign, bit, value);
}

// With the shift, and 0 where pruned; `shift` and `keep` may be null.
template <int CODED>
HFLB_INLINE Floats finished(Floats value, Bits code, const uint8_t* keep, int bit, const Floats* shift) {
    if (shift) value = plus(value, CODED ? choose(code, bit, shift[1], shift[0]) : shift[0]);
    if (!keep) return value;
    const Floats kept = choose(bits_of(keep), bit, value, spread(0.0f));
    return CODED ? choose(code, bit, value, kept) : kept;
}

// Plain columns of one row. MORE: there are shifts or a mask.
template <int DTYPE, int CODED, int MORE>
HFLB_INLINE void expand_plain(const hflb_weight* weight, Scales table, int64_t row, int64_t r, void* out) {
    const hflb_weight w = *weight;  // a copy, which no store can change
    const int64_t groups = (w.columns + HFLB_GROUP - 1) / HFLB_GROUP, bytes = groups * 16, in_block = w.block_size / HFLB_GROUP;
    Floats scale[2], offset[2];
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t h = 0; g % in_block == 0 && h <= CODED; ++h) {
            const int64_t entry = (w.salient_groups + h) * w.blocks + g / in_block;
            scale[h] = spread(table.scale[entry * HFLB_TILE + r]);
            if (MORE && table.shift) offset[h] = spread(table.shift[entry * HFLB_TILE + r]);
        }
        const int64_t at = row * bytes + g * 16;
        const Bits sign = bits_of(w.sign + at), code = CODED ? bits_of(w.group + at) : sign;
        const uint8_t* keep = w.keep ? w.keep + at : 0;
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; ++bit) {
            const int64_t column = g * HFLB_GROUP + bit * 16;
            Floats value = signed_of<CODED>(sign, code, bit, w.plain_scale + column, groups * HFLB_GROUP, scale);
            if (MORE) value = finished<CODED>(value, code, keep, bit, table.shift ? offset : 0);
            if (column + 16 <= w.columns) {
                store_as<DTYPE>(out, column, value);
            } else if (column < w.columns) {
                float some[16];
                store(some, value);
                hflb_store(out, DTYPE, column, some, w.columns - column);
            }
        }
    }
}

// Salient columns of one row: over what was written for them as plain ones, or, with `apart`, slot after slot.
template <int DTYPE, int CODED>
HFLB_INLINE void expand_runs(const hflb_weight* weight, Scales table, int64_t row, int64_t r, void* out, int64_t apart) {
    const hflb_weight w = *weight;
    const int64_t G = w.groups, S = w.salient_groups, run_bytes = w.runs * 2, plane = w.rows * run_bytes;
    Floats scale[4], offset[2];
    const Floats* shift = table.shift ? offset : 0;
    for (int64_t g = 0; g < w.runs / 8; ++g) {
        const uint8_t* planes = w.run_planes + row * run_bytes + g * 16;
        const Bits code = bits_of(CODED ? planes + plane : planes);
        const uint8_t* keep = w.keep ? planes + 3 * plane : 0;
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; ++bit) {
            const int64_t run = g * 8 + bit, block = w.run_block[run], at = run * HFLB_RUN;
            if (run >= w.used_runs) {
                if (apart) store_as<DTYPE>(out, at, spread(0.0f));
                continue;
            }
            for (int64_t h = 0; (!run || block != w.run_block[run - 1]) && h < S; ++h) {
                scale[h] = spread(table.scale[(h * w.blocks + block) * HFLB_TILE + r]);
                scale[2 + h] = spread(table.scale[((S + G + h) * w.blocks + block) * HFLB_TILE + r]);
                if (shift) offset[h] = spread(table.shift[(h * w.blocks + block) * HFLB_TILE + r]);
            }
            const int64_t slots = w.runs * HFLB_RUN;
            const Floats first = signed_of<CODED>(bits_of(planes), code, bit, w.first_scale + at, slots, scale);
            const Floats second =
                signed_of<CODED>(bits_of(planes + 2 * plane), code, bit, w.second_scale + at, slots, scale + 2);
            const Floats shifted = finished<CODED>(first, code, 0, bit, shift);
            const Floats value = finished<CODED>(plus(shifted, second), code, keep, bit, 0);
            if (apart) {
                store_as<DTYPE>(out, at, value);
                continue;
            }
            uint32_t some[HFLB_RUN];
            store_as<DTYPE>(some, 0, value);
            for (int i = 0; i < HFLB_RUN; ++i) {
                const int32_t column = w.run_column[at + i];
                if (column < 0) continue;
                if (DTYPE == HFLB_F32) ((uint32_t*)out)[column] = some[i];
                else ((uint16_t*)out)[column] = ((const uint16_t*)some)[i];
            }
        }
    }
}

template <int DTYPE, int MORE>
HFLB_INLINE void expand_row(const hflb_weight* w, Scales table, int64_t row, int64_t r, void* out) {
    if (w->groups > 1) expand_plain<DTYPE, 1, MORE>(w, table, row, r, out);
    else expand_plain<DTYPE, 0, MORE>(w, table, row, r, out);
}

template <int DTYPE>
inline void expand_as(const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t apart, float* buffer) {
    const int64_t size = DTYPE == HFLB_F32 ? 4 : 2, stride = w->columns + (apart ? w->runs * HFLB_RUN : 0);
    Scales table = {0, 0};
    for (int64_t row = begin; row < end; ++row) {
        const int64_t r = row % HFLB_TILE;
        if (!r || row == begin) table = gather_scales(w, row - r, buffer);
        char* own = (char*)out + (row - begin) * stride * size;
        if (w->row_shift || w->keep) expand_row<DTYPE, 1>(w, table, row, r, own);
        else expand_row<DTYPE, 0>(w, table, row, r, own);
        char* slots = apart ? own + w->columns * size : own;
        if (w->salient_groups > 1) expand_runs<DTYPE, 1>(w, table, row, r, slots, apart);
        else expand_runs<DTYPE, 0>(w, table, row, r, slots, apart);
    }
}

// Rows of the dense weight in a dtype, [end - begin][columns]; with `apart` salient columns are not in their places, where
// something else stands, but after all others, in the slots of the runs. `buffer` has room for hflb_scale_floats(w) floats.
inline void expand_rows(const hflb_weight* w, int64_t begin, int64_t end, void* out, int64_t dtype, int64_t apart, float* buffer) {
    if (dtype == HFLB_F32) expand_as<HFLB_F32>(w, begin, end, out, apart, buffer);
    else if (dtype == HFLB_F16) expand_as<HFLB_F16>(w, begin, end, out, apart, buffer);
    else expand_as<HFLB_BF16>(w, begin, end, out, apart, buffer);
}

}  // namespace
