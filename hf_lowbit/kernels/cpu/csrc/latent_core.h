// The steps of latent.h, for whatever `multiply` the including file brings.
#include <math.h>
#include <stdlib.h>

#include <vector>

namespace {

const int64_t BLOCK = HFLB_BLOCK, CHUNK = HFLB_CHUNK;
const int64_t STEP_BYTES = 2048;  // of 32 columns of a latent for 32 tokens, or of 32 tokens for 32 columns
const int64_t BLOCKS = CHUNK / BLOCK;
const int64_t RESYNC = 16;        // blocks after which angles are formed anew: each step of the recurrence rounds
const int64_t MOST_TILES = 1 << 19;  // bytes of tiles that are made before they are used: a part of the second cache

inline int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Memory that a thread keeps: fresh memory of this size is given back and faulted in again at each call.
struct Arena {
    char* base;
    int64_t size;
    ~Arena() { free(base); }
    char* of(int64_t bytes) {
        if (bytes > size) {
            free(base);
            size = up_to(bytes, 4096);
            base = (char*)aligned_alloc(64, (size_t)size);
            if (!base) size = 0;
        }
        return base;
    }
};
thread_local Arena own_memory = {nullptr, 0}, shared_memory = {nullptr, 0};

// Buffers one after the other, each aligned. Without a base they are only counted.
struct Pieces {
    char* base;
    int64_t used;
    template <class T>
    T* take(int64_t count) {
        T* found = base ? (T*)(base + used) : nullptr;
        used += up_to(count * (int64_t)sizeof(T), 64);
        return found;
    }
};

struct Group {
    int64_t rank, width;     // of the latent; filled up to whole steps
    int64_t start;           // its place in a row
    int64_t row, rows;       // its queries among the rows of weights, filled up to 16
    int64_t sums;            // its place among the sums
    std::vector<int64_t> heads;  // of keys
};

struct Plan {
    const hflb_attention* a;
    int64_t rep, width;                   // queries of a key head; numbers of a query as the factor's rows are ordered
    std::vector<Group> keys, values;
    std::vector<int64_t> key_row, value_row;  // by query head
    int64_t key_width, value_width, key_rows, value_rows, sums, widest_key, widest_value;
    bool absorbs;
};

int64_t groups_of(const Plan& p, const hflb_latents& of, std::vector<Group>& to, std::vector<int64_t>& row, int64_t* width, int64_t* sums) {
    int64_t start = 0, rows = 0;
    *width = *sums = 0;
    row.resize((size_t)p.a->heads);
    for (int64_t g = 0; g < of.groups; ++g) {
        Group group;
        group.rank = of.ranks[g], group.width = up_to(of.ranks[g], 32);
        group.start = start, group.row = rows, group.sums = *sums;
        for (int64_t head = 0; head < p.a->kv_heads; ++head) {
            if (of.owner[head] != g) continue;
            for (int64_t n = 0; n < p.rep; ++n) row[(size_t)(head * p.rep + n)] = rows++;
            group.heads.push_back(head);
        }
        rows = up_to(rows, 16);
        group.rows = rows - group.row;
        start += group.rank, *width += group.width, *sums += group.rows * group.width;
        to.push_back(group);
    }
    return rows;
}

// How many tokens' tiles of a group are made before they are used.
inline int64_t tokens_at_once(int64_t width) {
    const int64_t blocks = MOST_TILES / (width / 32 * STEP_BYTES);
    return blocks < 1 ? BLOCK : blocks > BLOCKS ? CHUNK : blocks * BLOCK;
}

// How a block's queries and keys are turned.
struct Turn {
    const float* table;             // keys by this
    float *cosine, *sine, *own;     // queries by these; a table of the block's own
};

// One thread's buffers.
struct Scratch {
    uint16_t *staged, *weights, *absorbed;
    uint8_t* tiles;
    float *products, *query, *turned, *step_cosine, *step_sine, *dots, *squares, *offset, *scores;
    Turn turns[BLOCKS];
    int64_t position, since;  // of the last block, and blocks since its angles were formed anew
    const Turn* last;
};

Scratch scratch_in(Pieces* from, const Plan& p) {
    const hflb_attention* a = p.a;
    Scratch s;
    const int64_t key = p.widest_key, value = p.widest_value, widest = key > value ? key : value;
    const int64_t keys = tokens_at_once(key) * key, values = tokens_at_once(value) * value;
    s.staged = from->take<uint16_t>(CHUNK * widest);
    s.tiles = from->take<uint8_t>(2 * (keys > values ? keys : values));
    s.weights = from->take<uint16_t>(p.value_rows * CHUNK);
    s.absorbed = from->take<uint16_t>(p.absorbs ? p.key_rows * p.key_width : 0);
    s.products = from->take<float>(2 * 1024);
    s.query = from->take<float>(a->heads * p.width);
    s.turned = from->take<float>(BLOCKS * p.rep * p.width);
    for (float** each : {&s.step_cosine, &s.step_sine}) *each = from->take<float>(a->pairs);
    for (Turn& turn : s.turns) {
        for (float** each : {&turn.cosine, &turn.sine}) *each = from->take<float>(a->pairs);
        turn.own = from->take<float>(a->pairs * 2 * BLOCK);
    }
    s.dots = from->take<float>(BLOCKS * p.rep * BLOCK);
    s.squares = from->take<float>(CHUNK);
    s.offset = from->take<float>(a->heads);
    s.scores = from->take<float>(a->heads * CHUNK);
    return s;
}

// What a stretch of a row of the batch comes to: per query the largest score and the sum, and the sums of latents, which
// lie [strip of 32 columns][16 rows][2][row][16] group after group.
struct Part {
    float *largest, *total, *sums;
};

// Latents as they come, or from codes ---------------------------------------------------------------------------------

template <int BITS>
void decode_group(const uint8_t* codes, int64_t rank, float scale, float zero, uint16_t* to) {
    const int64_t each = BITS == 3 ? 8 : BITS == 4 ? 2 : 1, words = (rank + each - 1) / each;
    const __m512 scales = spread(scale), zeros = spread(zero);
    for (int64_t j = 0; j < words; j += 16) {
        const __mmask16 some = (__mmask16)(words - j < 16 ? (1 << (words - j)) - 1 : 0xffff);
        __m512i word = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + j));
        if (BITS == 3) {
            const __m512i second = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + words + j));
            const __m512i third = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + 2 * words + j));
            word = _mm512_or_si512(word, _mm512_or_si512(_mm512_slli_epi32(second, 8), _mm512_slli_epi32(third, 16)));
        }
        for (int64_t place = 0; place < each; ++place) {
            const int64_t at = place * words + j, left = rank - at < words - j ? rank - at : words - j;
            if (left <= 0) break;
            const __m512i code = _mm512_and_si512(_mm512_srli_epi32(word, (unsigned)(BITS * place)), spread((1 << BITS) - 1));
            const __m512 value = times(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zeros), scales);
            const __mmask16 filled = (__mmask16)(left < 16 ? (1 << left) - 1 : 0xffff);
            _mm256_mask_storeu_epi16(to + at, filled, (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}

// Rows of one group, one after the other, each filled up to whole steps with zeros.
void stage(const std::vector<Group>& groups, const Group& group, const uint8_t* rows, int64_t stride, int64_t count, int64_t bits, uint16_t* to) {
    const int64_t all = (int64_t)groups.size(), index = &group - groups.data();
    int64_t codes = 4 * all;
    for (int64_t g = 0; g < index; ++g) {
        const int64_t rank = groups[(size_t)g].rank;
        codes += bits == 8 ? rank : bits == 4 ? (rank + 1) / 2 : (rank + 7) / 8 * 3;
    }
    for (int64_t t = 0; t < count; ++t, rows += stride, to += group.width) {
        memset(to + group.rank, 0, (size_t)(group.width - group.rank) * 2);
        if (!bits) {
            memcpy(to, rows + 2 * group.start, (size_t)group.rank * 2);
            continue;
        }
        uint16_t half;
        int16_t zero;
        memcpy(&half, rows + 2 * index, 2);
        memcpy(&zero, rows + 2 * (all + index), 2);
        const float scale = hflb_half_to_float(half);
        if (bits == 8) decode_group<8>(rows + codes, group.rank, scale, zero, to);
        else if (bits == 4) decode_group<4>(rows + codes, group.rank, scale, zero, to);
        else decode_group<3>(rows + codes, group.rank, scale, zero, to);
    }
}

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

// Weights -------------------------------------------------------------------------------------------------------------

// NaN stays NaN, minus infinity becomes 0. Relative error below 3e-7 (a polynomial of degree 6 on half an octave around 0).
HFLB_INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(spread(-200.0f), x);  // the second where one is NaN
    const __m512 n = _mm512_roundscale_ps(times(x, spread(1.44269504f)), 0);
    __m512 f = _mm512_fnmadd_ps(n, spread(0.693145752f), x);
    f = _mm512_fnmadd_ps(n, spread(1.42860677e-6f), f);
    __m512 y = spread(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, f, spread(c));
    return _mm512_scalef_ps(y, n);
}

inline float exponential(float x) { return _mm512_cvtss_f32(exponential(spread(x))); }

// Multiply the sums of one query.
void rescale(const Group& group, int64_t row, float factor, float* sums) {
    const int64_t blocks = group.rows / 16;
    float* own = sums + group.sums + row / 16 * 512 + row % 16 * 16;
    for (int64_t strip = 0; strip < group.width / 32; ++strip)
        for (int half = 0; half < 2; ++half) {
            float* at = own + strip * blocks * 512 + half * 256;
            store(at, times(load(at), spread(factor)));
        }
}

// Scores of a query become weights, which are rounded to bfloat16 for the sums and not for their total.
void weigh(const Plan& p, const Group& group, int64_t b, int64_t h, int64_t token, int64_t count, Part* part, Scratch* s) {
    const hflb_attention* a = p.a;
    float* scores = s->scores + h * CHUNK;
    uint16_t* weights = s->weights + p.value_row[(size_t)h] * CHUNK;
    const float* mask = a->mask ? a->mask + b * a->mask_batch + h * a->mask_head + token : nullptr;
    const __m512 none = spread(-INFINITY);
    __m512 top = none;
    __mmask16 broken = 0;
    for (int64_t i = 0; i < up_to(count, 32); i += 16) {
        const __mmask16 some = (__mmask16)(count - i >= 16 ? 0xffff : count > i ? (1 << (count - i)) - 1 : 0);
        __m512 own = load(scores + i);
        if (mask) own = plus(own, _mm512_maskz_loadu_ps(some, mask + i));
        own = _mm512_mask_blend_ps(some, none, own);
        store(scores + i, own);
        top = _mm512_max_ps(own, top);  // the second where one is NaN
        broken |= _mm512_cmp_ps_mask(own, own, _CMP_UNORD_Q);
    }
    const float before = part->largest[h], found = _mm512_reduce_max_ps(top), now = found > before ? found : before;
    if (broken) part->total[h] = NAN;
    if (now == -INFINITY || broken) {
        memset(weights, 0, (size_t)up_to(count, 32) * 2);
        return;
    }
    if (now > before) {
        const float factor = exponential(before - now);
        part->total[h] *= factor;
        if (before != -INFINITY) rescale(group, p.value_row[(size_t)h] - group.row, factor, part->sums);
        part->largest[h] = now;
    }
    __m512 total = spread(0.0f);
    for (int64_t i = 0; i < up_to(count, 32); i += 16) {
        const __m512 weight = exponential(_mm512_sub_ps(load(scores + i), spread(now)));
        total = plus(total, weight);
        store_as<HFLB_BF16>(weights, i, weight);
    }
    part->total[h] += _mm512_reduce_add_ps(total);
}

// Values --------------------------------------------------------------------------------------------------------------

// Some tokens of a group as tiles [strip of 32 columns][step][2][pair of tokens][column]; columns 8q to 8q + 3 of a strip
// go to its first tile. Rows are read one after the other, as they lie.
void tile_values(const uint8_t* rows, int64_t stride, int64_t rank, int64_t count, uint8_t* to) {
    const int64_t steps = up_to(count, 32) / 32;
    for (int64_t t = 0; t < 32 * steps; t += 2) {
        const uint8_t* first = rows + (t < count ? t : count - 1) * stride;
        const uint8_t* second = rows + (t + 1 < count ? t + 1 : count - 1) * stride;
        uint8_t* at = to + t / 32 * STEP_BYTES + t % 32 / 2 * 64;
        for (int64_t column = 0; column < rank; column += 32, at += steps * STEP_BYTES) {
            const __mmask32 some = rank - column < 32 ? (__mmask32)((1u << (rank - column)) - 1) : 0xffffffffu;
            const __m512i a = _mm512_maskz_loadu_epi16(some, first + 2 * column), b = _mm512_maskz_loadu_epi16(some, second + 2 * column);
            _mm512_storeu_si512(at, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(at + 1024, _mm512_unpackhi_epi16(a, b));
        }
    }
}

void mix(const Plan& p, int64_t b, int64_t token, int64_t count, Part* part, Scratch* s) {
    const hflb_attention* a = p.a;
    const uint8_t* rows = (const uint8_t*)a->values.rows + b * a->values.batch_stride + token * a->values.token_stride;
    for (const Group& group : p.values) {
        const uint8_t* own = rows + 2 * group.start;
        int64_t stride = a->values.token_stride;
        if (a->bits) {
            stage(p.values, group, rows, stride, count, a->bits, s->staged);
            own = (const uint8_t*)s->staged, stride = 2 * group.width;
        }
        const int64_t blocks = group.rows / 16, at_once = tokens_at_once(group.width);
        for (int64_t i = 0; i < count; i += at_once) {
            const int64_t some = count - i < at_once ? count - i : at_once, steps = up_to(some, 32) / 32;
            tile_values(own + i * stride, stride, group.rank, some, s->tiles);
            const uint16_t* weights = s->weights + group.row * CHUNK + i;
            for (int64_t strip = 0; strip < group.width / 32; ++strip) {
                float* sums = part->sums + group.sums + strip * blocks * 512;
                const uint8_t* tiles = s->tiles + strip * steps * STEP_BYTES;
                int64_t r = 0;
                for (; r + 1 < blocks; r += 2)
                    multiply<true>(weights + 16 * r * CHUNK, weights + 16 * (r + 1) * CHUNK, CHUNK, tiles, steps, false, sums + r * 512);
                if (r < blocks) multiply<false>(weights + 16 * r * CHUNK, nullptr, CHUNK, tiles, steps, false, sums + r * 512);
            }
        }
    }
}

// A stretch of one row of the batch.
void attend_part(const Plan& p, int64_t b, int64_t begin, int64_t end, Part* part, Scratch* s) {
    const hflb_attention* a = p.a;
    for (int64_t h = 0; h < a->heads; ++h) part->largest[h] = -INFINITY, part->total[h] = 0;
    memset(part->sums, 0, (size_t)p.sums * 4);
    memset(s->weights, 0, (size_t)(p.value_rows * CHUNK) * 2);
    take_queries(p, b, s);
    if (p.absorbs) absorb_queries(p, s);
    for (int64_t token = begin; token < end; token += CHUNK) {
        const int64_t count = end - token < CHUNK ? end - token : CHUNK;
        score(p, b, token, count, s);
        for (const Group& group : p.values)
            for (const int64_t head : group.heads)
                for (int64_t n = 0; n < p.rep; ++n) weigh(p, group, b, head * p.rep + n, token, count, part, s);
        mix(p, b, token, count, part, s);
    }
}

// Results -------------------------------------------------------------------------------------------------------------

// The parts of one row and query become one latent [group.width], and the logarithm of the sum.
void merge(const Plan& p, const Group& group, int64_t h, const Part* parts, int64_t count, float* to, float* lse) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (parts[i].largest[h] > largest) largest = parts[i].largest[h];
    const int64_t blocks = group.rows / 16, row = p.value_row[(size_t)h] - group.row;
    memset(to, 0, (size_t)group.width * 4);
    for (int64_t i = 0; i < count; ++i) {
        if (isnan(parts[i].total[h])) total = NAN;
        if (parts[i].largest[h] == -INFINITY) continue;
        const float share = exponential(parts[i].largest[h] - largest);
        total += share * parts[i].total[h];
        const float* own = parts[i].sums + group.sums + row / 16 * 512 + row % 16 * 16;
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int64_t strip = 0; strip < group.width / 32; ++strip) {
            const __m512 a = load(own + strip * blocks * 512), b = load(own + strip * blocks * 512 + 256);
            float* at = to + 32 * strip;
            store(at, fma(_mm512_permutex2var_ps(a, low, b), spread(share), load(at)));
            store(at + 16, fma(_mm512_permutex2var_ps(a, high, b), spread(share), load(at + 16)));
        }
    }
    *lse = largest + logf(total);
    const __m512 inverse = spread(total == 0 ? 0 : 1 / total);
    for (int64_t j = 0; j < group.width; j += 16) store(to + j, times(load(to + j), inverse));
}

// R rows of the values' factor, bfloat16, by Y latents.
template <int R, int Y>
void expand_some(const uint16_t* up, int64_t row, const float* const* latents, int64_t rank, float* to) {
    __m512 sums[R][Y];
    for (int r = 0; r < R; ++r)
        for (int y = 0; y < Y; ++y) sums[r][y] = spread(0.0f);
    for (int64_t j = 0; j < rank; j += 16) {
        const __mmask16 some = (__mmask16)(rank - j < 16 ? (1 << (rank - j)) - 1 : 0xffff);
        __m512 own[Y];
        for (int y = 0; y < Y; ++y) own[y] = load(latents[y] + j);
        for (int r = 0; r < R; ++r) {
            const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, up + r * row + j));
            const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
            for (int y = 0; y < Y; ++y) sums[r][y] = fma(wide, own[y], sums[r][y]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int y = 0; y < Y; ++y) to[r * Y + y] = _mm512_reduce_add_ps(sums[r][y]);
}

// Rows of the values' factor for one key head meet the latents of its queries in all rows of the batch.
void expand(const Plan& p, const Group& group, int64_t head, const float* latents, int64_t stride) {
    const hflb_attention* a = p.a;
    const int64_t count = a->batch * p.rep;
    for (int64_t i = 0; i < a->head_dim;) {
        const int64_t rows = a->head_dim - i >= 4 ? 4 : 1;
        const uint16_t* up = a->values.up + head * a->values.up_head + i * a->values.up_row;
        for (int64_t n = 0; n < count;) {
            const int64_t some = count - n >= 4 ? 4 : 1;
            const float* own[4];
            float found[16];
            for (int64_t k = 0; k < some; ++k) own[k] = latents + ((n + k) / p.rep * a->heads + head * p.rep + (n + k) % p.rep) * stride;
            const auto by = rows == 4 ? some == 4 ? expand_some<4, 4> : expand_some<4, 1> : some == 4 ? expand_some<1, 4> : expand_some<1, 1>;
            by(up, a->values.up_row, own, group.rank, found);
            for (int64_t k = 0; k < some; ++k)
                for (int64_t r = 0; r < rows; ++r) {
                    const int64_t h = (n + k) / p.rep * a->heads + head * p.rep + (n + k) % p.rep;
                    const float bias = a->values.bias ? a->values.bias[head * a->head_dim + i + r] : 0;
                    a->out[h * a->head_dim + i + r] = hflb_float_to_brain(found[r * some + k] + bias);
                }
            n += some;
        }
        i += rows;
    }
}

Plan plan_of(const hflb_attention* a) {
    Plan p;
    p.a = a, p.rep = a->heads / a->kv_heads, p.width = 2 * a->pairs;
    p.absorbs = !a->positions && !a->norm;
    int64_t unused = 0;
    p.key_rows = groups_of(p, a->keys, p.keys, p.key_row, &p.key_width, &unused);
    p.value_rows = groups_of(p, a->values, p.values, p.value_row, &p.value_width, &p.sums);
    p.widest_key = p.widest_value = 0;
    for (const Group& group : p.keys) p.widest_key = group.width > p.widest_key ? group.width : p.widest_key;
    for (const Group& group : p.values) p.widest_value = group.width > p.widest_value ? group.width : p.widest_value;
    return p;
}

}  // namespace

extern "C" int HFLB_ATTEND(const hflb_attention* a, int64_t threads) {
    const Plan p = plan_of(a);
    const int64_t chunks = up_to(a->tokens, CHUNK) / CHUNK;
    int64_t splits = a->batch < threads ? up_to(threads, a->batch) / a->batch : 1;
    if (splits > (chunks + 1) / 2) splits = (chunks + 1) / 2;
    if (splits < 1) splits = 1;
    const int64_t count = a->batch * splits;
    Pieces shared = {nullptr, 0};
    std::vector<Part> parts((size_t)count);
    float* latents = nullptr;
    for (int round = 0; round < 2; ++round) {  // first all are counted, then placed
        if (round) {
            char* memory = shared_memory.of(shared.used);
            if (!memory) return 2;
            shared = {memory, 0};
        }
        for (Part& part : parts) part = {shared.take<float>(a->heads), shared.take<float>(a->heads), shared.take<float>(p.sums)};
        latents = shared.take<float>(a->batch * a->heads * p.widest_value);
    }
    Pieces size = {nullptr, 0};
    scratch_in(&size, p);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char* memory = own_memory.of(size.used);
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {  // the same for all threads
            Pieces own = {memory, 0};
            Scratch scratch = scratch_in(&own, p);
            begin_products();
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t b = i / splits, split = i % splits;
                const int64_t begin = chunks * split / splits * CHUNK, end = chunks * (split + 1) / splits * CHUNK;
                attend_part(p, b, begin, end < a->tokens ? end : a->tokens, &parts[(size_t)i], &scratch);
            }
            end_products();
#pragma omp for schedule(static)
            for (int64_t head = 0; head < a->kv_heads; ++head) {
                const Group& group = p.values[(size_t)a->values.owner[head]];
                for (int64_t m = 0; m < a->batch * p.rep; ++m) {
                    const int64_t b = m / p.rep, h = head * p.rep + m % p.rep;
                    merge(p, group, h, &parts[(size_t)(b * splits)], splits, latents + (b * a->heads + h) * p.widest_value, a->lse + b * a->heads + h);
                }
                expand(p, group, head, latents, p.widest_value);
            }
        }
    }
    return failed ? 2 : 0;
}
