// What is computed and where it lies: groups, buffers of a thread, parts of a row of the batch.
#pragma once
#include <stdlib.h>

#include <vector>

#include "latent.h"

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
