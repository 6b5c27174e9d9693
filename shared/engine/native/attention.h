/* What the kernels of attention share. */
#ifndef BANYAN_ATTENTION_H
#define BANYAN_ATTENTION_H

#include <math.h>

#include "ops.h"

#define MASKED (-INFINITY)

/* One layer's attention over a batch. */
typedef struct {
    const attention_t *shape;
    const batch_t *batch;
    const void *cache;
    const void *query;
    int64_t q_stride;
    void *output;
    int64_t o_stride;
} job_t;

/* Keys of one head of one block [block_size, head_dim]; its values follow. */
INLINE const char *block_keys(const job_t *job, int64_t seq, int64_t block, int64_t kv_head) {
    const attention_t *s = job->shape;
    int64_t id = job->batch->block_tables[seq * job->batch->max_blocks + block];
    int64_t head_items = 2 * s->block_size * s->head_dim;
    return (const char *)job->cache +
           (id * s->num_kv_heads + kv_head) * head_items * item_bytes(s->cache_dtype);
}

/* The first position that the query at `position` sees. */
INLINE int64_t first_seen(const attention_t *s, int64_t position) {
    return s->window > 0 && position >= s->window ? position - s->window + 1 : 0;
}

/* A request with one row: jobs [0, decode_jobs()), each some heads of one KV head. */
int64_t decode_jobs(const attention_t *shape);
int64_t decode_scratch_floats(const attention_t *shape);
void attend_decode(const job_t *job, int64_t seq, int64_t part, float *space);

/* A request with several rows: jobs [0, prefill_jobs()), each some rows of one head. */
int64_t prefill_jobs(const attention_t *shape, int64_t num_rows);
int64_t prefill_scratch_floats(const attention_t *shape);
void attend_prefill(const job_t *job, int64_t seq, int64_t part, float *space);

#endif
