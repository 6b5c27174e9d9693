/* Attention of several rows a request: small matrix products, a block of the cache at a time. The
 * scores are kept with tokens as rows and queries as columns, so that the softmax runs over rows
 * and what comes out is what the product with the values reads. */
#include "attention.h"

#include "tile.h"

/* Queries of a job: whole panels of columns. */
#define QUERIES 64

typedef struct {
    float *q;       /* [head_dim][QUERIES], scaled */
    float *scores;  /* [block_size][QUERIES] */
    float *out;     /* [QUERIES][width] */
    float *keys;    /* [block_size][head_dim] */
    float *values;  /* [block_size][width] */
    float *top;     /* [QUERIES], of the scores so far */
    float *total;   /* [QUERIES], of the weights so far */
    int64_t width;  /* head_dim in whole panels */
} space_t;

static space_t divide(const attention_t *s, float *floats) {
    space_t space = {.width = round_up(s->head_dim, NR)};
    float **parts[] = {&space.q,      &space.scores, &space.out,  &space.keys,
                       &space.values, &space.top,    &space.total};
    int64_t sizes[] = {QUERIES * s->head_dim,         QUERIES * s->block_size,
                       QUERIES * space.width,         s->block_size * s->head_dim,
                       s->block_size * space.width,   QUERIES,
                       QUERIES};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        *parts[i] = floats;
        floats += sizes[i];
    }
    return space;
}

int64_t prefill_scratch_floats(const attention_t *s) {
    int64_t width = round_up(s->head_dim, NR);
    return QUERIES * (s->head_dim + s->block_size + width + 2) +
           s->block_size * (s->head_dim + width);
}

int64_t prefill_jobs(const attention_t *s, int64_t num_rows) {
    return (num_rows + QUERIES - 1) / QUERIES * s->num_heads;
}

/* Rows [row, row + count) of one head's queries, transposed. */
static void load_queries(const job_t *job, const space_t *space, int64_t row, int64_t count,
                         int64_t head) {
    const attention_t *s = job->shape;
    for (int64_t r = 0; r < QUERIES; r++)
        for (int64_t d = 0; d < s->head_dim; d += VL) {
            vf v = splat(0.0f);
            if (r < count)
                v = load_any(job->query, (row + r) * job->q_stride + head * s->head_dim + d,
                             s->activation_dtype) * s->scale;
            for (int i = 0; i < VL; i++) space->q[(d + i) * QUERIES + r] = v[i];
        }
}

/* `count` rows of the cache to fp32, `stride` apart. */
static void widen(float *wide, int64_t stride, const void *rows, int64_t count, int64_t dim,
                  int32_t dtype) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < dim; d += VL)
            store_f32(wide + t * stride + d, load_any(rows, t * dim + d, dtype));
}

/* Scores of tokens [lo, hi) for the NR queries from `column` on. */
INLINE void score_panel(const space_t *space, int64_t lo, int64_t hi, int64_t column, int64_t dim) {
    int step = tile_rows(hi - lo);
    for (int64_t t = lo; t < hi; t += step) {
        int rows = hi - t < step ? (int)(hi - t) : step;
        const float *a = space->keys + t * dim, *b = space->q + column;
        vf acc[MR][2];
        for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = splat(0.0f);
#define SCORE_TILE(R) tile_f32(R, dim, a, dim, 1, b, QUERIES, acc, (const char *)b, 0)
        WITH_ROWS(rows, SCORE_TILE)
        for (int r = 0; r < rows; r++) {
            float *score = space->scores + (t + r) * QUERIES + column;
            store_f32(score, acc[r][0]), store_f32(score + VL, acc[r][1]);
        }
    }
}

/* Masks what the VL queries from `column` on, of which the first is at `position`, do not see of
 * tokens [lo, hi) of the block that starts at `start`. */
static void mask(const space_t *space, const attention_t *s, int64_t start, int64_t lo, int64_t hi,
                 int64_t column, int64_t position) {
    vi own;
    for (int i = 0; i < VL; i++) own[i] = (int32_t)(position - start) + i;
    for (int64_t t = lo; t < hi; t++) {
        float *score = space->scores + t * QUERIES + column;
        vi is_seen = own >= (int32_t)t;
        if (s->window > 0) is_seen &= own - (int32_t)s->window < (int32_t)t;
        store_f32(score, select_f32(is_seen, load_f32(score), splat(MASKED)));
    }
}

/* Turns scores of tokens [lo, hi) into weights relative to the running maximum, for VL queries;
 * rescales what was summed of them before. */
static void soften(const space_t *space, int64_t lo, int64_t hi, int64_t column) {
    float *scores = space->scores + column;
    vf old = load_f32(space->top + column), top = old, added = splat(0.0f);
    for (int64_t t = lo; t < hi; t++) top = vmax(top, load_f32(scores + t * QUERIES));
    store_f32(space->top + column, top);
    /* Who has seen nothing yet has -inf for a maximum, and -inf - -inf is no number. */
    vf base = select_f32(top == MASKED, splat(0.0f), top);
    for (int64_t t = lo; t < hi; t++) {
        vf weight = vexp(load_f32(scores + t * QUERIES) - base);
        store_f32(scores + t * QUERIES, weight);
        added += weight;
    }
    vf factor = vexp(old - base);
    store_f32(space->total + column, load_f32(space->total + column) * factor + added);
    for (int r = 0; r < VL; r++) {
        if (factor[r] == 1.0f) continue;
        float *out = space->out + (column + r) * space->width;
        for (int64_t d = 0; d < space->width; d += VL)
            store_f32(out + d, load_f32(out + d) * factor[r]);
    }
}

/* Adds the values of tokens [lo, hi), weighed, to the NR queries from `column` on. */
INLINE void add_values(const space_t *space, int64_t lo, int64_t hi, int64_t column,
                       int64_t width) {
    int step = tile_rows(NR);
    for (int64_t row = 0; row < NR; row += step) {
        int rows = NR - row < step ? (int)(NR - row) : step;
        const float *a = space->scores + lo * QUERIES + column + row;
        for (int64_t d = 0; d < width; d += NR) {
            float *out = space->out + (column + row) * width + d;
            const float *b = space->values + lo * width + d;
            vf acc[MR][2];
            for (int r = 0; r < rows; r++) load_row_f32(out + r * width, acc[r]);
#define VALUE_TILE(R) tile_f32(R, hi - lo, a, 1, QUERIES, b, width, acc, (const char *)b, 0)
            WITH_ROWS(rows, VALUE_TILE)
            for (int r = 0; r < rows; r++)
                store_f32(out + r * width, acc[r][0]), store_f32(out + r * width + VL, acc[r][1]);
        }
    }
}

/* One block, whose first `held` tokens are there, for the queries at [lo, hi). */
INLINE void attend_block(const space_t *space, const attention_t *s, const char *keys,
                         int64_t start, int64_t held, int64_t lo, int64_t hi, int64_t dim) {
    int64_t first = first_seen(s, lo) - start;
    if (first < 0) first = 0;
    widen(space->keys, dim, keys, held, dim, s->cache_dtype);
    widen(space->values, space->width, keys + s->block_size * dim * item_bytes(s->cache_dtype),
          held, dim, s->cache_dtype);
    for (int64_t column = 0; lo + column < hi; column += NR) {
        int64_t end = lo + column + NR - start; /* what the last query of the panel sees */
        if (end > held) end = held;
        if (end <= first) continue;
        score_panel(space, first, end, column, dim);
        for (int64_t part = column; part < column + NR; part += VL) {
            int64_t position = lo + part;
            if (position < start + end - 1 || s->window > 0)
                mask(space, s, start, first, end, part, position);
            soften(space, first, end, part);
        }
        add_values(space, first, end, column, round_up(dim, NR));
    }
}

/* Queries at positions [lo, hi) of one head against its KV head. */
static void attend_rows(const job_t *job, int64_t seq, int64_t head, int64_t lo, int64_t hi,
                        float *floats) {
    const attention_t *s = job->shape;
    space_t space = divide(s, floats);
    int64_t kv_head = head / (s->num_heads / s->num_kv_heads);
    int64_t context = job->batch->context_lens[seq];
    int64_t row = job->batch->cu_seqlens_q[seq + 1] - (context - lo);
    load_queries(job, &space, row, hi - lo, head);
    for (int64_t i = 0; i < QUERIES * space.width; i += VL) store_f32(space.out + i, splat(0.0f));
    for (int64_t i = 0; i < QUERIES; i += VL) {
        store_f32(space.top + i, splat(MASKED));
        store_f32(space.total + i, splat(0.0f));
    }
    for (int64_t start = first_seen(s, lo) / s->block_size * s->block_size; start < hi;
         start += s->block_size) {
        const char *keys = block_keys(job, seq, start / s->block_size, kv_head);
        /* The tail of the last block may hold anything, NaN too, which 0 * NaN would spread. */
        int64_t held = context - start < s->block_size ? context - start : s->block_size;
        if (s->head_dim == 64)
            attend_block(&space, s, keys, start, held, lo, hi, 64);
        else if (s->head_dim == 128)
            attend_block(&space, s, keys, start, held, lo, hi, 128);
        else
            attend_block(&space, s, keys, start, held, lo, hi, s->head_dim);
    }
    for (int64_t r = 0; r < hi - lo; r++)
        for (int64_t d = 0; d < s->head_dim; d += VL)
            store_any(job->output, (row + r) * job->o_stride + head * s->head_dim + d,
                      load_f32(space.out + r * space.width + d) / space.total[r],
                      s->activation_dtype);
}

void attend_prefill(const job_t *job, int64_t seq, int64_t part, float *space) {
    const attention_t *s = job->shape;
    const batch_t *batch = job->batch;
    int64_t context = batch->context_lens[seq];
    int64_t first = context - (batch->cu_seqlens_q[seq + 1] - batch->cu_seqlens_q[seq]);
    int64_t lo = first + part / s->num_heads * QUERIES;
    attend_rows(job, seq, part % s->num_heads, lo, lo + QUERIES < context ? lo + QUERIES : context,
                space);
}
