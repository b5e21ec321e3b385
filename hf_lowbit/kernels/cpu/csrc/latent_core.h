// The steps of latent.h, for whatever `multiply` the including file brings.
#include "latent_scores.h"
#include "latent_sums.h"

namespace {

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
