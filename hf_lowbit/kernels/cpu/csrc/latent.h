// One token's attention over latents, in bfloat16. Plain C interface: no torch, no Python.
//
// What the result is, kernels/latent_attention.py defines. Keys are rebuilt 32 tokens at a time by products of tiles,
// turned and met by the queries while they are in the first cache; values are summed as latents, in products of tiles, too.
//
// The coordinates of a key come in pairs that a rotation turns: pair j is rows j and `pairs` + j of the factor. A position
// p + i (i < 32) turns by p, which is done to the queries, and by i, for which there is one table for all of a cache.
// Coordinates that are not turned are pairs of frequency 0.
#pragma once
#include <stdint.h>

#define HFLB_LATENT_ABI 1
#define HFLB_BLOCK 32   // tokens whose keys are rebuilt together
#define HFLB_CHUNK 256  // tokens whose scores become weights together

enum { HFLB_NO_TILES = 0, HFLB_DOTS = 1, HFLB_TILES = 2 };  // AVX-512 with BF16, AMX

#ifdef __cplusplus
extern "C" {
#endif

// Latents of keys or values. A row is one token's: bfloat16, or codes as kernels/latent_codec.py has them.
typedef struct {
    const void* rows;
    int64_t batch_stride, token_stride;  // bytes
    int64_t groups;
    const int64_t* ranks;                // [groups]
    const int64_t* owner;                // [kv_heads]: the group of each head
    const uint16_t* up;                  // bfloat16; of the keys [kv_heads][2 * pairs][up_row], zero beyond a rank
    int64_t up_head, up_row;             // strides; up_row of the keys is at least each rank rounded up to 32
    const float* bias;                   // keys [kv_heads][2 * pairs], values [kv_heads][head_dim], or NULL
} hflb_latents;

typedef struct {
    hflb_latents keys, values;
    const uint16_t* q;                   // bfloat16 [batch][heads][head_dim]
    const int64_t* place;                // [2 * pairs]: coordinate of a row of the factor, -1 for none
    const float* frequencies;            // [pairs]
    const float* scale;                  // [pairs]
    const float* turns;                  // [pairs][2][HFLB_BLOCK]: cosine and sine of i * frequency
    const float* norm;                   // [2 * pairs], or NULL
    const int32_t* positions;            // [batch][tokens], or NULL: keys are not rotated
    int64_t positions_stride;            // from row to row
    const float* mask;                   // added to the scores, or NULL
    int64_t mask_batch, mask_head;       // strides
    int64_t batch, tokens, heads, kv_heads, head_dim, pairs, bits;
    float scaling, eps;
    uint16_t* out;                       // bfloat16 [batch][heads][head_dim]
    float* lse;                          // [batch][heads]
} hflb_attention;

int hflb_attend_tiles(const hflb_attention* a, int64_t threads);
int hflb_attend_dots(const hflb_attention* a, int64_t threads);

#ifdef __cplusplus
}
#endif
