/* Attention over the paged cache, online softmax as in FlashAttention (Dao et al., NeurIPS 2022,
 * section 3.1), block by block, nothing gathered first. */
#include <math.h>

#include "kernels.h"
#include "scratch.h"
#include "tile.h"

/* Query rows computed together in a prefill: with 14-row tiles, four of them. */
#define QUERY_ROWS (4 * MR)
#define MASKED (-INFINITY)

typedef struct {
    const attention_t *shape;
    const batch_t *batch;
    const void *cache;
    const void *query;
    int64_t q_stride;
    void *output;
    int64_t o_stride;
} job_t;

static int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

static size_t item_bytes(int32_t dtype) { return dtype == BF16 ? 2 : 4; }

/* Keys of one head of one block [block_size, head_dim]; its values follow. */
static const void *block_keys(const job_t *job, int64_t seq, int64_t block, int64_t kv_head) {
    const attention_t *s = job->shape;
    int64_t id = job->batch->block_tables[seq * job->batch->max_blocks + block];
    int64_t head_items = 2 * s->block_size * s->head_dim;
    return (const char *)job->cache +
           (id * s->num_kv_heads + kv_head) * head_items * item_bytes(s->cache_dtype);
}

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

INLINE vf load_any(const void *p, int64_t i, int32_t dtype) {
    return dtype == BF16 ? load_bf16((const bf16 *)p + i) : load_f32((const float *)p + i);
}

INLINE void store_any(void *p, int64_t i, vf v, int32_t dtype) {
    if (dtype == BF16)
        store_bf16((bf16 *)p + i, v);
    else
        store_f32((float *)p + i, v);
}

/* The first position that row `position` sees. */
INLINE int64_t first_seen(const attention_t *s, int64_t position) {
    return s->window > 0 && position >= s->window ? position - s->window + 1 : 0;
}

/* -- one row a request: memory bound, every key and value is read once for its group of heads */

#define MAX_GROUP 8

/* Asks for `count` rows of one head, from `from` on. */
INLINE void ask_for(const void *from, int64_t count, int64_t row_bytes) {
    for (int64_t at = 0; at < count * row_bytes; at += 64)
        __builtin_prefetch((const char *)from + at, 0, 3);
}

/* Scores of tokens [lo, hi) of one block for `group` query heads, in `scores` [group][block_size];
 * lo and hi are multiples of VL. */
INLINE void score_block(const float *q, int group, const void *keys, int64_t lo, int64_t hi,
                        int64_t head_dim, int64_t block_size, float *scores, int32_t dtype) {
    int64_t row_bytes = head_dim * (int64_t)item_bytes(dtype);
    for (int64_t t = lo; t < hi; t += VL) {
        /* The values lie behind the keys and are what comes next. */
        ask_for((const char *)keys + (block_size + t) * row_bytes, VL, row_bytes);
        for (int g = 0; g < group; g++) {
            vf dots[VL];
            UNROLL
            for (int i = 0; i < VL; i++) dots[i] = splat(0.0f);
            for (int64_t d = 0; d < head_dim; d += VL) {
                vf own = load_f32(q + g * head_dim + d);
                UNROLL
                for (int i = 0; i < VL; i++)
                    dots[i] += own * load_any(keys, (t + i) * head_dim + d, dtype);
            }
            store_f32(scores + g * block_size + t, sums(dots));
        }
    }
}

/* out += weights[lo, hi) times the values of those tokens. */
INLINE void add_values(float *out, const float *weights, const void *values, int64_t lo, int64_t hi,
                       int64_t head_dim, int32_t dtype) {
    for (int64_t d = 0; d < head_dim; d += 4 * VL) {
        int n = head_dim - d >= 4 * VL ? 4 : (int)((head_dim - d) / VL);
        vf acc[4];
        for (int i = 0; i < n; i++) acc[i] = load_f32(out + d + i * VL);
        if (n == 4)
            for (int64_t t = lo; t < hi; t++)
                for (int i = 0; i < 4; i++)
                    acc[i] += weights[t] * load_any(values, t * head_dim + d + i * VL, dtype);
        else
            for (int64_t t = lo; t < hi; t++)
                for (int i = 0; i < n; i++)
                    acc[i] += weights[t] * load_any(values, t * head_dim + d + i * VL, dtype);
        for (int i = 0; i < n; i++) store_f32(out + d + i * VL, acc[i]);
    }
}

/* Turns scores [0, count) into weights relative to the running maximum; rescales what was summed
 * before. `count` is a multiple of VL; masked scores are -inf. */
INLINE void soften(float *scores, int64_t count, float *top, float *total, float *out,
                   int64_t head_dim) {
    vf best = splat(*top);
    for (int64_t t = 0; t < count; t += VL) best = vmax(best, load_f32(scores + t));
    float new_top = max_of(best);
    if (new_top == MASKED) {
        for (int64_t t = 0; t < count; t += VL) store_f32(scores + t, splat(0.0f));
        return;
    }
    if (new_top > *top) {
        float factor = *top == MASKED ? 0.0f : expf(*top - new_top);
        *total *= factor;
        for (int64_t d = 0; d < head_dim; d += VL) store_f32(out + d, load_f32(out + d) * factor);
        *top = new_top;
    }
    vf added = splat(0.0f);
    for (int64_t t = 0; t < count; t += VL) {
        vf weight = vexp(load_f32(scores + t) - new_top);
        store_f32(scores + t, weight);
        added += weight;
    }
    *total += sum(added);
}

/* One request's only row, for the query heads [head, head + group) of one KV head. */
INLINE void attend_row(const job_t *job, int64_t seq, int64_t kv_head, int64_t head, int group,
                       float *space, int64_t dim, int32_t dtype) {
    const attention_t *s = job->shape;
    int64_t row = job->batch->cu_seqlens_q[seq], context_len = job->batch->context_lens[seq];
    int64_t size = s->block_size, from = first_seen(s, context_len - 1);
    float *q = space, *out = q + group * dim, *scores = out + group * dim;
    float top[MAX_GROUP], total[MAX_GROUP];
    for (int g = 0; g < group; g++) {
        top[g] = MASKED, total[g] = 0.0f;
        for (int64_t d = 0; d < dim; d += VL) {
            int64_t at = row * job->q_stride + (head + g) * dim + d;
            store_f32(q + g * dim + d, load_any(job->query, at, s->activation_dtype) * s->scale);
            store_f32(out + g * dim + d, splat(0.0f));
        }
    }
    for (int64_t block = from / size; block * size < context_len; block++) {
        int64_t lo = from > block * size ? from - block * size : 0;
        int64_t hi = context_len - block * size < size ? context_len - block * size : size;
        const char *keys = block_keys(job, seq, block, kv_head);
        const char *values = keys + size * dim * item_bytes(dtype);
        int64_t first = lo / VL * VL, last = (hi + VL - 1) / VL * VL;
        score_block(q, group, keys, first, last, dim, size, scores, dtype);
        if ((block + 1) * size < context_len)
            ask_for(block_keys(job, seq, block + 1, kv_head), size, dim * (int64_t)item_bytes(dtype));
        for (int g = 0; g < group; g++) {
            float *own = scores + g * size;
            for (int64_t t = first; t < lo; t++) own[t] = MASKED;
            for (int64_t t = hi; t < last; t++) own[t] = MASKED;
            soften(own + first, last - first, &top[g], &total[g], out + g * dim, dim);
            add_values(out + g * dim, own, values, lo, hi, dim, dtype);
        }
    }
    for (int g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d += VL)
            store_any(job->output, row * job->o_stride + (head + g) * dim + d,
                      load_f32(out + g * dim + d) / total[g], s->activation_dtype);
}

/* -- several rows: a small matrix product a block */

/* `count` keys of a block, [count, head_dim], to columns of [head_dim][block_size], fp32. */
static void transpose_keys(float *wide, const void *keys, int64_t count, int64_t size, int64_t dim,
                           int32_t dtype) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < dim; d += VL) {
            float part[VL];
            store_f32(part, load_any(keys, t * dim + d, dtype));
            for (int i = 0; i < VL; i++) wide[(d + i) * size + t] = part[i];
        }
}

/* c [rows][c_stride] = (add ? c : 0) + a [depth][rows] b [depth][width]; width a multiple of NR. */
static void multiply(float *c, int64_t c_stride, const float *a, int rows, int64_t depth,
                     const float *b, int64_t b_stride, int64_t width, int add) {
    for (int64_t column = 0; column < width; column += NR) {
        vf acc[MR][2];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 2; i++)
                acc[r][i] = add ? load_f32(c + r * c_stride + column + i * VL) : splat(0.0f);
#define MULTIPLY(R) tile_f32(R, depth, a, b + column, b_stride, acc, (const char *)b, 0)
        WITH_ROWS(rows, MULTIPLY)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 2; i++) store_f32(c + r * c_stride + column + i * VL, acc[r][i]);
    }
}

/* Rows [lo, hi) (positions of the request) of one query head against its KV head. */
static void attend_rows(const job_t *job, int64_t seq, int64_t kv_head, int64_t head, int64_t lo,
                        int64_t hi, float *space) {
    const attention_t *s = job->shape;
    int64_t dim = s->head_dim, size = s->block_size, num_rows = hi - lo;
    int64_t start = job->batch->context_lens[seq] -
                    (job->batch->cu_seqlens_q[seq + 1] - job->batch->cu_seqlens_q[seq]);
    int64_t first_row = job->batch->cu_seqlens_q[seq] + lo - start;
    int64_t width = round_up(dim, NR); /* of a row of output and of values while they are summed */
    float *q = space, *out = q + QUERY_ROWS * dim, *scores = out + QUERY_ROWS * width;
    float *weights = scores + QUERY_ROWS * size, *wide = weights + MR * size;
    float *wide_values = wide + size * dim;
    float top[QUERY_ROWS], total[QUERY_ROWS];
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t tile = r / MR * MR, rows = num_rows - tile < MR ? num_rows - tile : MR;
        top[r] = MASKED, total[r] = 0.0f;
        for (int64_t d = 0; d < dim; d += VL) {
            int64_t at = (first_row + r) * job->q_stride + head * dim + d;
            vf v = load_any(job->query, at, s->activation_dtype) * s->scale;
            for (int i = 0; i < VL; i++) q[tile * dim + (d + i) * rows + (r - tile)] = v[i];
        }
        for (int64_t d = 0; d < width; d += VL) store_f32(out + r * width + d, splat(0.0f));
    }
    for (int64_t block = first_seen(s, lo) / size; block * size < hi; block++) {
        const char *keys = block_keys(job, seq, block, kv_head);
        const void *values = keys + size * dim * item_bytes(s->cache_dtype);
        /* The tail of the last block may hold anything, NaN too, which 0 * NaN would spread. */
        int64_t held = job->batch->context_lens[seq] - block * size;
        held = held < size ? held : size;
        transpose_keys(wide, keys, held, size, dim, s->cache_dtype);
        for (int64_t t = 0; t < held; t++)
            for (int64_t d = 0; d < dim; d += VL)
                store_f32(wide_values + t * width + d, load_any(values, t * dim + d, s->cache_dtype));
        for (int64_t tile = 0; tile < num_rows; tile += MR) {
            int rows = num_rows - tile < MR ? (int)(num_rows - tile) : MR;
            if (lo + tile + rows <= block * size) continue; /* all of it lies in their future */
            float *own = scores + tile * size;
            multiply(own, size, q + tile * dim, rows, dim, wide, size, size, 0);
            for (int r = 0; r < rows; r++) {
                int64_t position = lo + tile + r, seen = first_seen(s, position);
                for (int64_t t = 0; t < size; t++) {
                    int64_t at = block * size + t;
                    if (at > position || at < seen) own[r * size + t] = MASKED;
                }
                soften(own + r * size, size, &top[tile + r], &total[tile + r],
                       out + (tile + r) * width, width);
            }
            pack_rows(weights, own, size, rows, held);
            multiply(out + tile * width, width, weights, rows, held, wide_values, width, width, 1);
        }
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t d = 0; d < dim; d += VL)
            store_any(job->output, (first_row + r) * job->o_stride + head * dim + d,
                      load_f32(out + r * width + d) / total[r], s->activation_dtype);
}

/* -- both */

static void attend_decode_job(const job_t *job, int64_t seq, int64_t part, float *space) {
    const attention_t *s = job->shape;
    int64_t group = s->num_heads / s->num_kv_heads, parts = (group + MAX_GROUP - 1) / MAX_GROUP;
    int64_t kv_head = part / parts, first = part % parts * MAX_GROUP;
    int count = group - first < MAX_GROUP ? (int)(group - first) : MAX_GROUP;
    int64_t head = kv_head * group + first;
    /* The common sizes as constants, so that the loops over a head are unrolled. */
#define ATTEND_ROW(DTYPE)                                                                         \
    if (s->head_dim == 64)                                                                        \
        attend_row(job, seq, kv_head, head, count, space, 64, DTYPE);                             \
    else if (s->head_dim == 128)                                                                  \
        attend_row(job, seq, kv_head, head, count, space, 128, DTYPE);                            \
    else                                                                                          \
        attend_row(job, seq, kv_head, head, count, space, s->head_dim, DTYPE);
    if (s->cache_dtype == BF16) {
        ATTEND_ROW(BF16)
    } else {
        ATTEND_ROW(F32)
    }
}

static void attend_prefill_job(const job_t *job, int64_t seq, int64_t part, float *space) {
    const attention_t *s = job->shape;
    int64_t query_len = job->batch->cu_seqlens_q[seq + 1] - job->batch->cu_seqlens_q[seq];
    int64_t start = job->batch->context_lens[seq] - query_len;
    int64_t head = part % s->num_heads, lo = part / s->num_heads * QUERY_ROWS;
    int64_t hi = lo + QUERY_ROWS < query_len ? lo + QUERY_ROWS : query_len;
    attend_rows(job, seq, head / (s->num_heads / s->num_kv_heads), head, start + lo, start + hi,
                space);
}

static void attend(const attention_t *s, const batch_t *batch, const int32_t *seqs, int64_t num_seqs,
            const void *cache, const void *query, int64_t q_stride, void *output, int64_t o_stride,
            int32_t num_threads) {
    job_t job = {s, batch, cache, query, q_stride, output, o_stride};
    int64_t group = s->num_heads / s->num_kv_heads;
    int64_t decode_jobs = s->num_kv_heads * ((group + MAX_GROUP - 1) / MAX_GROUP);
    int64_t width = round_up(s->head_dim, NR);
    int64_t row_floats = MAX_GROUP * (2 * s->head_dim + s->block_size);
    int64_t tile_floats = QUERY_ROWS * (s->head_dim + width + s->block_size) +
                          MR * s->block_size + s->block_size * (s->head_dim + width);
    int64_t floats = row_floats > tile_floats ? row_floats : tile_floats;
#pragma omp parallel num_threads(num_threads)
    {
        float *space = scratch((size_t)floats * sizeof(float));
        for (int64_t i = 0; i < num_seqs; i++) {
            int64_t seq = seqs[i];
            int64_t query_len = batch->cu_seqlens_q[seq + 1] - batch->cu_seqlens_q[seq];
            int64_t tiles = (query_len + QUERY_ROWS - 1) / QUERY_ROWS;
            int64_t jobs = query_len == 1 ? decode_jobs : tiles * s->num_heads;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t part = 0; part < jobs; part++) {
                if (query_len == 1)
                    attend_decode_job(&job, seq, part, space);
                else
                    attend_prefill_job(&job, seq, part, space);
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
