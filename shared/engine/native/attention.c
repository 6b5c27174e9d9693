/* Attention over the paged cache, online softmax as in FlashAttention (Dao et al., NeurIPS 2022,
 * section 3.1), block by block, nothing gathered first. */
#include "attention.h"

#include "scratch.h"

static void write_kv(const attention_t *s, const batch_t *batch, void *cache, const void *key,
                     const void *value, int64_t kv_stride, int32_t num_threads) {
    size_t to = item_bytes(s->cache_dtype), from = item_bytes(s->activation_dtype);
#pragma omp parallel for num_threads(num_threads) if (batch->num_tokens > 64)
    for (int64_t token = 0; token < batch->num_tokens; token++) {
        int64_t slot = batch->slot_mapping[token];
        int64_t block = slot / s->block_size, offset = slot % s->block_size;
        for (int64_t h = 0; h < s->num_kv_heads; h++)
            for (int part = 0; part < 2; part++) {
                int64_t at = ((block * s->num_kv_heads + h) * 2 + part) * s->block_size + offset;
                char *target = (char *)cache + at * s->head_dim * to;
                const char *source = (const char *)(part ? value : key) +
                                     (token * kv_stride + h * s->head_dim) * from;
                if (s->cache_dtype == s->activation_dtype)
                    memcpy(target, source, s->head_dim * to);
                else
                    for (int64_t d = 0; d < s->head_dim; d += VL)
                        store_bf16((bf16 *)target + d, load_f32((const float *)source + d));
            }
    }
}

static void attend(const attention_t *s, const batch_t *batch, const int32_t *seqs,
                   int64_t num_seqs, const void *cache, const void *query, int64_t q_stride,
                   void *output, int64_t o_stride, int32_t num_threads) {
    job_t job = {s, batch, cache, query, q_stride, output, o_stride};
    int64_t floats = decode_scratch_floats(s), others = prefill_scratch_floats(s);
    if (others > floats) floats = others;
    /* A thread takes neighbours, because it asks for the memory of the next head early. */
    int64_t neighbours = decode_jobs(s) / (2 * num_threads);
    if (neighbours == 0) neighbours = 1;
#pragma omp parallel num_threads(num_threads)
    {
        float *space = scratch((size_t)floats * sizeof(float));
        for (int64_t i = 0; i < num_seqs; i++) {
            int64_t seq = seqs[i], jobs = decode_jobs(s);
            int64_t num_rows = batch->cu_seqlens_q[seq + 1] - batch->cu_seqlens_q[seq];
            if (num_rows == 1) {
#pragma omp for schedule(dynamic, neighbours) nowait
                for (int64_t part = 0; part < jobs; part++) attend_decode(&job, seq, part, space);
            } else {
                jobs = prefill_jobs(s, num_rows);
#pragma omp for schedule(dynamic, 1) nowait
                for (int64_t part = 0; part < jobs; part++) attend_prefill(&job, seq, part, space);
            }
        }
    }
}

void attention(const attention_t *s, const batch_t *batch, const int32_t *seqs, int64_t num_seqs,
               void *cache, const void *query, int64_t q_stride, const void *key,
               const void *value, int64_t kv_stride, void *output, int64_t o_stride,
               int32_t num_threads) {
    write_kv(s, batch, cache, key, value, kv_stride, num_threads);
    attend(s, batch, seqs, num_seqs, cache, query, q_stride, output, o_stride, num_threads);
}
