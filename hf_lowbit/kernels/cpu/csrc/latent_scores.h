// Queries meet the keys that are rebuilt from latents. The including file brings `multiply`.
#pragma once
#include <math.h>

#include "latent_rows.h"

namespace {

// Queries -------------------------------------------------------------------------------------------------------------

// The queries of a row in float32, scaled, in the order of the factor's rows.
void take_queries(const Plan& p, int64_t b, Scratch* s) {
    const hflb_attention* a = p.a;
    for (int64_t h = 0; h < a->heads; ++h) {
        const uint16_t* q = a->q + (b * a->heads + h) * a->head_dim;
        for (int64_t j = 0; j < p.width; ++j) {
            const float scale = a->scaling * a->scale[j % a->pairs];
            s->query[h * p.width + j] = a->place[j] < 0 ? 0 : scale * hflb_brain_to_float(q[a->place[j]]);
        }
    }
    s->since = RESYNC;
    for (int64_t j = 0; j < a->pairs; ++j) {  // a block further: 31 and 1
        const float *c = a->turns + 2 * BLOCK * j, *sine = c + BLOCK;
        s->step_cosine[j] = c[BLOCK - 1] * c[1] - sine[BLOCK - 1] * sine[1];
        s->step_sine[j] = sine[BLOCK - 1] * c[1] + c[BLOCK - 1] * sine[1];
    }
}

// Angles by which queries are turned back, for a position.
void form_angles(const Plan& p, int32_t position, Turn* turn, Scratch* s) {
    const hflb_attention* a = p.a;
    if (s->since < RESYNC && position == s->position + BLOCK) {
        for (int64_t j = 0; j < a->pairs; j += 16) {
            const __m512 c = load(s->last->cosine + j), sine = load(s->last->sine + j);
            const __m512 by = load(s->step_cosine + j), by_sine = load(s->step_sine + j);
            store(turn->cosine + j, _mm512_fmsub_ps(c, by, times(sine, by_sine)));
            store(turn->sine + j, fma(sine, by, times(c, by_sine)));
        }
        ++s->since;
    } else {
        for (int64_t j = 0; j < a->pairs; ++j) {
            const float angle = (float)position * a->frequencies[j];
            turn->cosine[j] = cosf(angle), turn->sine[j] = sinf(angle);
        }
        s->since = 0;
    }
    s->position = position, s->last = turn;
}

// How the tokens of a block are turned: all by the first one's position, which is for the queries, and then each by
// its distance, for which there is a table if positions rise one by one; or all alike (padding); or in no order.
void prepare_block(const Plan& p, int64_t b, int64_t token, int64_t count, Turn* turn, Scratch* s) {
    const hflb_attention* a = p.a;
    turn->table = a->turns;
    if (!a->positions) return form_angles(p, 0, turn, s);  // all frequencies are 0
    const int32_t* positions = a->positions + b * a->positions_stride + token;
    bool rises = true, stays = true;
    for (int64_t i = 1; i < count; ++i) {
        rises &= positions[i] == positions[0] + i;
        stays &= positions[i] == positions[0];
    }
    form_angles(p, rises || stays ? positions[0] : 0, turn, s);
    if (rises) return;
    turn->table = turn->own;
    for (int64_t j = 0; j < a->pairs; ++j) {
        float* own = turn->own + 2 * BLOCK * j;
        for (int64_t i = 0; i < BLOCK; ++i) {
            const float angle = stays || i >= count ? 0 : (float)positions[i] * a->frequencies[j];
            own[i] = cosf(angle), own[BLOCK + i] = sinf(angle);
        }
    }
}

// Queries of a key head, [rep][width], turned back.
void turn_queries(const Plan& p, int64_t head, const Turn& turn, const Scratch* s, float* to) {
    const int64_t pairs = p.a->pairs;
    for (int64_t n = 0; n < p.rep; ++n, to += p.width) {
        const float *first = s->query + (head * p.rep + n) * p.width, *second = first + pairs;
        for (int64_t j = 0; j < pairs; j += 16) {
            const __m512 c = load(turn.cosine + j), sine = load(turn.sine + j), x = load(first + j), y = load(second + j);
            store(to + j, fma(x, c, times(y, sine)));
            store(to + pairs + j, _mm512_fmsub_ps(y, c, times(x, sine)));
        }
    }
}

// No turning, no norm: what a query asks of the latents themselves, [queries of a group][its width] in bfloat16. What it
// says to the bias is the same for all tokens.
void absorb_queries(const Plan& p, Scratch* s) {
    const hflb_attention* a = p.a;
    for (const Group& group : p.keys) {
        uint16_t* to = s->absorbed + group.row * p.key_width;
        memset(to, 0, (size_t)(group.rows * p.key_width) * 2);
        for (const int64_t head : group.heads)
            for (int64_t n = 0; n < p.rep; ++n) {
                const int64_t h = head * p.rep + n;
                uint16_t* own = s->absorbed + p.key_row[(size_t)h] * p.key_width;
                s->offset[h] = 0;
                for (int64_t j = 0; j < p.width && a->keys.bias; ++j)
                    s->offset[h] += s->query[h * p.width + j] * a->keys.bias[head * p.width + j];
                for (int64_t column = 0; column < group.width; column += 16) {
                    __m512 sum = spread(0.0f);
                    for (int64_t j = 0; j < p.width; ++j) {
                        const uint16_t* up = a->keys.up + head * a->keys.up_head + j * a->keys.up_row + column;
                        sum = fma(spread(s->query[h * p.width + j]), from_brains(up), sum);
                    }
                    store_as<HFLB_BF16>(own, column, sum);
                }
            }
    }
}

// Scores --------------------------------------------------------------------------------------------------------------

// 32 tokens of a group as tiles [step][2][pair of columns][token]. `rank` columns of a row are there. What will be read
// next lies so many bytes `ahead`: columns of another group, which no processor expects.
void tile_keys(const uint8_t* rows, int64_t stride, int64_t rank, int64_t width, int64_t count, int64_t ahead, uint8_t* to) {
    for (int64_t k = 0; k < width; k += 32)
        for (int64_t half = 0; half < 2; ++half, to += STEP_BYTES / 2) {
            int64_t at[16];
            for (int64_t t = 0; t < 16; ++t) {
                const int64_t token = 16 * half + t;
                at[t] = (token < count ? token : count - 1) * stride + 2 * k;
                _mm_prefetch((const char*)(uintptr_t)((uintptr_t)rows + (uintptr_t)(at[t] + ahead)), _MM_HINT_T1);
            }
            Bytes words[16];
            load_rows(rows, at, rank - k < 32 ? (rank - k) / 8 : 4, words);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 64 * i, words[i]);
        }
}

// Adds what sixteen pairs of rows of rebuilt keys, [2][2][16][16], say to N queries: dots [N][BLOCK].
template <int N, bool EXTRA>
void meet(const float* keys, const float* turns, const float* query, int64_t width, int64_t pairs, const float* bias, const float* norm, float* squares, float* dots) {
    __m512 sums[N][4];
    for (int n = 0; n < N; ++n) {
        sums[n][0] = load(dots + BLOCK * n), sums[n][1] = load(dots + BLOCK * n + 16);
        sums[n][2] = sums[n][3] = spread(0.0f);
    }
    __m512 square[2] = {spread(0.0f), spread(0.0f)};
    for (int64_t j = 0; j < 16; ++j) {
        __m512 x[2] = {load(keys + 16 * j), load(keys + 256 + 16 * j)};
        __m512 y[2] = {load(keys + 512 + 16 * j), load(keys + 768 + 16 * j)};
        for (int half = 0; half < 2; ++half) {
            if (EXTRA) {
                if (bias) x[half] = plus(x[half], spread(bias[j])), y[half] = plus(y[half], spread(bias[pairs + j]));
                if (norm) {
                    square[half] = fma(x[half], x[half], fma(y[half], y[half], square[half]));
                    x[half] = times(x[half], spread(norm[j])), y[half] = times(y[half], spread(norm[pairs + j]));
                }
            }
            const __m512 c = load(turns + 2 * BLOCK * j + 16 * half), sine = load(turns + 2 * BLOCK * j + BLOCK + 16 * half);
            const __m512 turned = _mm512_fmsub_ps(x[half], c, times(y[half], sine));
            y[half] = fma(y[half], c, times(x[half], sine));
            x[half] = turned;
        }
        for (int n = 0; n < N; ++n) {
            const __m512 first = spread(query[n * width + j]), second = spread(query[n * width + pairs + j]);
            sums[n][0] = fma(x[0], first, sums[n][0]), sums[n][1] = fma(x[1], first, sums[n][1]);
            sums[n][2] = fma(y[0], second, sums[n][2]), sums[n][3] = fma(y[1], second, sums[n][3]);
        }
    }
    for (int n = 0; n < N; ++n) {
        store(dots + BLOCK * n, plus(sums[n][0], sums[n][2]));
        store(dots + BLOCK * n + 16, plus(sums[n][1], sums[n][3]));
    }
    if (EXTRA && squares)
        for (int half = 0; half < 2; ++half) store(squares + 16 * half, plus(square[half], load(squares + 16 * half)));
}

// The same for all queries of a key head and a block: query [rep][width], dots [rep][BLOCK].
template <bool EXTRA>
void meet_all(const Plan& p, const float* keys, const float* turns, const float* query, const float* bias, const float* norm, float* squares, float* dots) {
    const int64_t pairs = p.a->pairs;
    for (int64_t n = 0; n < p.rep; n += 4) {
        const auto some = p.rep - n >= 4 ? meet<4, EXTRA> : p.rep - n == 3 ? meet<3, EXTRA> : p.rep - n == 2 ? meet<2, EXTRA> : meet<1, EXTRA>;
        some(keys, turns, query + n * p.width, p.width, pairs, bias, norm, n || !norm ? nullptr : squares, dots + n * BLOCK);
    }
}

// Scores of the queries of one key head for some blocks, of which the first is number `first` of the chunk.
void score_head(const Plan& p, const Group& group, int64_t head, int64_t first, int64_t blocks, Scratch* s) {
    const hflb_attention* a = p.a;
    const uint16_t* up = a->keys.up + head * a->keys.up_head;
    const int64_t row = a->keys.up_row, steps = group.width / 32, half = a->pairs / 16, count = half * blocks;
    for (int64_t i = 0; i < blocks; ++i) turn_queries(p, head, s->turns[first + i], s, s->turned + i * p.rep * p.width);
    memset(s->dots, 0, (size_t)(blocks * p.rep * BLOCK) * 4);
    memset(s->squares, 0, (size_t)(blocks * BLOCK) * 4);
    // One product ahead: tiles and vectors work side by side then. Sixteen pairs of the factor's rows meet all blocks.
    for (int64_t m = 0; m <= count; ++m) {
        if (m < count) {
            const uint16_t* rows = up + m / blocks * 16 * row;
            multiply<true>(rows, rows + a->pairs * row, row, s->tiles + m % blocks * steps * STEP_BYTES, steps, true, s->products + m % 2 * 1024);
        }
        if (!m) continue;
        const int64_t j = (m - 1) / blocks * 16, i = (m - 1) % blocks;
        const float *keys = s->products + (m - 1) % 2 * 1024, *query = s->turned + i * p.rep * p.width + j;
        const float *table = s->turns[first + i].table + 2 * BLOCK * j, *bias = a->keys.bias ? a->keys.bias + head * p.width + j : nullptr;
        const float* norm = a->norm ? a->norm + j : nullptr;
        float *squares = s->squares + i * BLOCK, *dots = s->dots + i * p.rep * BLOCK;
        if (bias || norm) meet_all<true>(p, keys, table, query, bias, norm, squares, dots);
        else meet_all<false>(p, keys, table, query, bias, norm, squares, dots);
    }
    for (int64_t i = 0; i < blocks * BLOCK; i += 16) {
        __m512 factor = spread(1.0f);
        if (a->norm) {
            const __m512 mean = _mm512_div_ps(load(s->squares + i), spread((float)a->head_dim));
            factor = _mm512_div_ps(factor, _mm512_sqrt_ps(plus(mean, spread(a->eps))));
        }
        for (int64_t n = 0; n < p.rep; ++n) {
            const float* dots = s->dots + (i / BLOCK * p.rep + n) * BLOCK + i % BLOCK;
            store(s->scores + (head * p.rep + n) * CHUNK + first * BLOCK + i, times(factor, load(dots)));
        }
    }
}

// Scores of a group for some blocks, straight from the latents.
void score_absorbed(const Plan& p, const Group& group, int64_t first, int64_t blocks, Scratch* s) {
    const int64_t steps = group.width / 32;
    for (int64_t m = 0; m < group.rows / 16 * blocks; ++m) {
        const int64_t r = m / blocks * 16, place = (first + m % blocks) * BLOCK;
        const uint8_t* tiles = s->tiles + m % blocks * steps * STEP_BYTES;
        multiply<false>(s->absorbed + (group.row + r) * p.key_width, nullptr, p.key_width, tiles, steps, true, s->products);
        for (const int64_t head : group.heads)
            for (int64_t n = 0; n < p.rep; ++n) {
                const int64_t h = head * p.rep + n, row = p.key_row[(size_t)h] - group.row - r;
                if (row < 0 || row >= 16) continue;
                const __m512 bias = spread(s->offset[h]);
                store(s->scores + h * CHUNK + place, plus(bias, load(s->products + 16 * row)));
                store(s->scores + h * CHUNK + place + 16, plus(bias, load(s->products + 256 + 16 * row)));
            }
    }
}

void score(const Plan& p, int64_t b, int64_t token, int64_t count, Scratch* s) {
    const hflb_attention* a = p.a;
    const uint8_t* rows = (const uint8_t*)a->keys.rows + b * a->keys.batch_stride + token * a->keys.token_stride;
    for (int64_t i = 0; i < count && !p.absorbs; i += BLOCK)
        prepare_block(p, b, token + i, count - i < BLOCK ? count - i : BLOCK, s->turns + i / BLOCK, s);
    for (const Group& group : p.keys) {
        const uint8_t* own = rows + 2 * group.start;
        int64_t stride = a->keys.token_stride, rank = group.rank;
        if (a->bits || group.rank % 8) {
            stage(p.keys, group, rows, stride, count, a->bits, s->staged);
            own = (const uint8_t*)s->staged, stride = 2 * group.width, rank = group.width;
        }
        const int64_t at_once = tokens_at_once(group.width), ahead = &group == &p.keys.back() ? CHUNK * stride - 2 * group.start : 2 * rank;
        for (int64_t i = 0; i < count; i += at_once) {
            const int64_t some = count - i < at_once ? count - i : at_once, blocks = up_to(some, BLOCK) / BLOCK;
            for (int64_t k = 0; k < some; k += BLOCK) {
                uint8_t* tiles = s->tiles + k / BLOCK * (group.width / 32) * STEP_BYTES;
                tile_keys(own + (i + k) * stride, stride, rank, group.width, some - k < BLOCK ? some - k : BLOCK, ahead, tiles);
            }
            if (p.absorbs) score_absorbed(p, group, i / BLOCK, blocks, s);
            else for (const int64_t head : group.heads) score_head(p, group, head, i / BLOCK, blocks, s);
        }
    }
}

}  // namespace
