/* Attention of one row a request: bound by memory, so every key and value is read once for the
 * heads that share it, and the next ones are asked for while these are computed with. */
#include "attention.h"

/* Query heads of a job, and those of them computed at once: with registers to spare. */
#define MAX_GROUP 8
#define MAX_HEADS (VL >= 16 ? 4 : 2)
/* Tokens whose scores are kept at a time. */
#define SEGMENT 512
/* How far ahead memory is asked for: a quarter of a small first-level cache. */
#define AHEAD_BYTES (8 << 10)

/* Two vectors of a row in the order in which they are cheapest to load; `unpair` undoes it. */
INLINE void load_pair(const void *p, int64_t i, int32_t dtype, vf pair[2]) {
    if (dtype == BF16)
        load_row_bf16((const bf16 *)p + i, pair);
    else
        load_row_f32((const float *)p + i, pair);
}

INLINE void unpair(vf pair[2], int32_t dtype) {
    if (dtype != BF16) return;
    vi low, high;
    for (int i = 0; i < VL; i++) {
        low[i] = i / 2 + i % 2 * VL;
        high[i] = VL / 2 + i / 2 + i % 2 * VL;
    }
    vf first = __builtin_shuffle(pair[0], pair[1], low);
    pair[1] = __builtin_shuffle(pair[0], pair[1], high);
    pair[0] = first;
}

/* The same for numbers of `from` that are to meet a row of `dtype`. */
INLINE void load_as_pair(const void *p, int64_t i, int32_t from, int32_t dtype, vf pair[2]) {
    pair[0] = load_any(p, i, from);
    pair[1] = load_any(p, i + VL, from);
    if (dtype != BF16) return;
    vi even, odd;
    for (int j = 0; j < VL; j++) even[j] = 2 * j, odd[j] = 2 * j + 1;
    vf first = __builtin_shuffle(pair[0], pair[1], even);
    pair[1] = __builtin_shuffle(pair[0], pair[1], odd);
    pair[0] = first;
}

/* Scores of a group of VL tokens for `heads` query heads, in `scores` [heads][SEGMENT]. Asks for
 * the group at `ahead`, line by line. */
INLINE void score_group(const float *q, int heads, const char *keys, int64_t dim, float *scores,
                        int32_t dtype, const char *ahead) {
    int tokens = VL / heads;
    for (int64_t t = 0; t < VL; t += tokens) {
        vf dots[VL]; /* [heads][tokens] */
        UNROLL
        for (int i = 0; i < VL; i++) dots[i] = splat(0.0f);
        int64_t d = 0;
        UNROLL
        for (; d + NR <= dim; d += NR) {
            UNROLL
            for (int i = 0; i < tokens; i++) {
                int64_t at = (t + i) * dim + d;
                vf key[2];
                __builtin_prefetch(ahead + at * item_bytes(dtype), 0, 3);
                load_pair(keys, at, dtype, key);
                UNROLL
                for (int g = 0; g < heads; g++) {
                    dots[g * tokens + i] += load_f32(q + g * dim + d) * key[0];
                    dots[g * tokens + i] += load_f32(q + g * dim + d + VL) * key[1];
                }
            }
        }
        if (d < dim)
            UNROLL
            for (int i = 0; i < tokens; i++) {
                vf key = load_any(keys, (t + i) * dim + d, dtype);
                UNROLL
                for (int g = 0; g < heads; g++)
                    dots[g * tokens + i] += load_f32(q + g * dim + d) * key;
            }
        float flat[VL];
        store_f32(flat, sums(dots));
        for (int g = 0; g < heads; g++)
            memcpy(scores + g * SEGMENT + t, flat + g * tokens, tokens * sizeof(float));
    }
}

/* Columns [d, d + pairs * NR) of out [heads][dim] += weights [heads][SEGMENT] times the values of
 * `count` tokens. */
INLINE void add_columns(float *out, int heads, int pairs, int64_t d, const float *weights,
                        const char *values, int64_t count, int64_t dim, int32_t dtype,
                        const char *ahead) {
    vf sum[MAX_HEADS][4];
    UNROLL
    for (int g = 0; g < heads; g++)
        UNROLL
        for (int i = 0; i < 2 * pairs; i++) sum[g][i] = load_f32(out + g * dim + d + i * VL);
    for (int64_t t = 0; t < count; t++) {
        vf value[4];
        UNROLL
        for (int i = 0; i < pairs; i++) {
            int64_t at = t * dim + d + i * NR;
            __builtin_prefetch(ahead + at * item_bytes(dtype), 0, 3);
            load_pair(values, at, dtype, value + 2 * i);
        }
        UNROLL
        for (int g = 0; g < heads; g++) {
            vf weight = splat(weights[g * SEGMENT + t]);
            UNROLL
            for (int i = 0; i < 2 * pairs; i++) sum[g][i] += weight * value[i];
        }
    }
    UNROLL
    for (int g = 0; g < heads; g++)
        UNROLL
        for (int i = 0; i < 2 * pairs; i++) store_f32(out + g * dim + d + i * VL, sum[g][i]);
}

/* The same for all columns. */
INLINE void add_group(float *out, int heads, const float *weights, const char *values,
                      int64_t count, int64_t dim, int32_t dtype, const char *ahead) {
    int64_t d = 0;
    for (; d + 2 * NR <= dim; d += 2 * NR)
        add_columns(out, heads, 2, d, weights, values, count, dim, dtype, ahead);
    for (; d + NR <= dim; d += NR)
        add_columns(out, heads, 1, d, weights, values, count, dim, dtype, ahead);
    if (d < dim)
        for (int g = 0; g < heads; g++) {
            vf sum = load_f32(out + g * dim + d);
            for (int64_t t = 0; t < count; t++)
                sum += weights[g * SEGMENT + t] * load_any(values, t * dim + d, dtype);
            store_f32(out + g * dim + d, sum);
        }
}

/* Turns scores [0, count) into weights relative to the running maximum; rescales what was summed
 * before. `count` is a multiple of VL; masked scores are -inf. */
static void soften(float *scores, int64_t count, float *top, float *total, float *out,
                   int64_t dim) {
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
        for (int64_t d = 0; d < dim; d += VL) store_f32(out + d, load_f32(out + d) * factor);
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

/* What a job reads, in groups of VL tokens: the keys of a segment, its values, the next segment. */
typedef struct {
    const job_t *job;
    int64_t seq, kv_head;
    int64_t start, end; /* tokens of the request, whole groups */
    int64_t ahead;      /* groups */
} stream_t;

/* Keys of the group of tokens from `token` on, which is in the stream or else the same in the next
 * head. */
INLINE const char *keys_at(const stream_t *stream, int64_t token) {
    const attention_t *s = stream->job->shape;
    int64_t kv_head = stream->kv_head;
    if (token >= stream->end) {
        token = stream->start + token - stream->end;
        if (token >= stream->end) token = stream->start;
        if (kv_head + 1 < s->num_kv_heads) kv_head++;
    }
    return block_keys(stream->job, stream->seq, token / s->block_size, kv_head) +
           token % s->block_size * s->head_dim * item_bytes(s->cache_dtype);
}

/* The group that is read `stream->ahead` groups after the `group`-th of a segment [lo, hi). */
INLINE const char *ahead_of(const stream_t *stream, int64_t lo, int64_t hi, int64_t group) {
    const attention_t *s = stream->job->shape;
    int64_t token = lo + (group + stream->ahead) * VL;
    if (token < hi) return keys_at(stream, token);
    token -= hi - lo;
    if (token < hi)
        return keys_at(stream, token) + s->block_size * s->head_dim * item_bytes(s->cache_dtype);
    return keys_at(stream, token);
}

/* A row of queries, scaled, to [dim] fp32 in the order of pairs. */
INLINE void load_query(float *q, const job_t *job, int64_t at, int64_t dim, int32_t dtype) {
    const attention_t *s = job->shape;
    int64_t d = 0;
    for (; d + NR <= dim; d += NR) {
        vf pair[2];
        load_as_pair(job->query, at + d, s->activation_dtype, dtype, pair);
        store_f32(q + d, pair[0] * s->scale);
        store_f32(q + d + VL, pair[1] * s->scale);
    }
    if (d < dim) store_f32(q + d, load_any(job->query, at + d, s->activation_dtype) * s->scale);
}

/* [dim] sums in the order of pairs, over the sum of their weights, to a row of the output. */
INLINE void store_output(const job_t *job, int64_t at, const float *sums, float total, int64_t dim,
                         int32_t dtype) {
    int32_t to = job->shape->activation_dtype;
    int64_t d = 0;
    for (; d + NR <= dim; d += NR) {
        vf pair[2];
        load_row_f32(sums + d, pair);
        unpair(pair, dtype);
        store_any(job->output, at + d, pair[0] / total, to);
        store_any(job->output, at + d + VL, pair[1] / total, to);
    }
    if (d < dim) store_any(job->output, at + d, load_f32(sums + d) / total, to);
}

#define WITH_HEADS(CALL)                                                                          \
    if (heads == MAX_HEADS)                                                                       \
        CALL(MAX_HEADS);                                                                          \
    else if (heads == 2)                                                                          \
        CALL(2);                                                                                  \
    else                                                                                          \
        CALL(1);

/* The row's query heads [head, head + group), which share a KV head. */
INLINE void attend_row(const job_t *job, int64_t seq, int64_t kv_head, int64_t head, int group,
                       float *space, int64_t dim, int32_t dtype) {
    const attention_t *s = job->shape;
    int64_t row = job->batch->cu_seqlens_q[seq], context_len = job->batch->context_lens[seq];
    int64_t from = first_seen(s, context_len - 1);
    float *q = space, *out = q + group * dim, *scores = out + group * dim;
    float top[MAX_GROUP], total[MAX_GROUP];
    for (int g = 0; g < group; g++) {
        top[g] = MASKED, total[g] = 0.0f;
        load_query(q + g * dim, job, row * job->q_stride + (head + g) * dim, dim, dtype);
        for (int64_t d = 0; d < dim; d += VL) store_f32(out + g * dim + d, splat(0.0f));
    }
    stream_t stream = {job, seq, kv_head, from / VL * VL, round_up(context_len, VL),
                       AHEAD_BYTES / (VL * dim * item_bytes(dtype)) + 1};
    int64_t values = s->block_size * dim * item_bytes(dtype); /* bytes from a group's keys */
    for (int64_t lo = stream.start, hi; lo < stream.end; lo = hi) {
        hi = lo + SEGMENT < stream.end ? lo + SEGMENT : stream.end;
        int64_t num_groups = (hi - lo) / VL;
        for (int g = 0, heads; g < group; g += heads) {
            heads = group - g >= MAX_HEADS ? MAX_HEADS : group - g >= 2 ? 2 : 1;
            for (int64_t i = 0; i < num_groups; i++) {
                const char *keys = keys_at(&stream, lo + i * VL);
                const char *ahead = ahead_of(&stream, lo, hi, i);
#define SCORE(HEADS) score_group(q + g * dim, HEADS, keys, dim, scores + i * VL, dtype, ahead)
                WITH_HEADS(SCORE)
            }
            for (int i = 0; i < heads; i++) {
                float *own = scores + i * SEGMENT;
                for (int64_t t = lo; t < from; t++) own[t - lo] = MASKED;
                for (int64_t t = context_len; t < hi; t++) own[t - lo] = MASKED;
                soften(own, hi - lo, &top[g + i], &total[g + i], out + (g + i) * dim, dim);
            }
            for (int64_t i = 0; i < num_groups; i++) {
                const char *rows = keys_at(&stream, lo + i * VL) + values;
                const char *ahead = ahead_of(&stream, lo, hi, num_groups + i);
                /* Behind the context may lie anything, NaN too, which 0 * NaN would spread. */
                int64_t left = context_len - lo - i * VL, count = left < VL ? left : VL;
#define ADD(HEADS) add_group(out + g * dim, HEADS, scores + i * VL, rows, count, dim, dtype, ahead)
                WITH_HEADS(ADD)
            }
        }
    }
    for (int g = 0; g < group; g++)
        store_output(job, row * job->o_stride + (head + g) * dim, out + g * dim, total[g], dim,
                     dtype);
}

static int64_t num_parts(const attention_t *s) {
    return (s->num_heads / s->num_kv_heads + MAX_GROUP - 1) / MAX_GROUP;
}

int64_t decode_jobs(const attention_t *s) { return s->num_kv_heads * num_parts(s); }

int64_t decode_scratch_floats(const attention_t *s) {
    return 2 * MAX_GROUP * s->head_dim + MAX_HEADS * SEGMENT;
}

void attend_decode(const job_t *job, int64_t seq, int64_t part, float *space) {
    const attention_t *s = job->shape;
    int64_t group = s->num_heads / s->num_kv_heads;
    int64_t kv_head = part / num_parts(s), first = part % num_parts(s) * MAX_GROUP;
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
