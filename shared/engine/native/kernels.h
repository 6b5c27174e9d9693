/* What `shared/engine/native/library.py` calls; kept in step with its ctypes structures.
 *
 * All matrices are row-major, strides count elements. Every function uses at most `num_threads`
 * OpenMP threads and returns when all of its work is done. Nothing is checked here: the caller
 * has checked shapes and types. */
#ifndef BANYAN_KERNELS_H
#define BANYAN_KERNELS_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum dtype { F32 = 0, BF16 = 1 };
enum epilogue { STORE = 0, SILU_MUL = 1, GELU_TANH_MUL = 2 };

/* One packed weight matrix: panels of `panel_width()` columns, see pack_linear. */
typedef struct {
    const void *weights;
    const float *bias; /* [out_features] in packed order, or NULL */
    int64_t in_features;
    int64_t out_features; /* columns before a gated epilogue halves them */
    int32_t dtype;        /* of the weights */
    int32_t epilogue;
} linear_t;

/* The requests of one iteration. Request i owns rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]), the
 * last ones of its context_lens[i] tokens, and blocks block_tables[i * max_blocks ...]. */
typedef struct {
    int64_t num_seqs;
    int64_t num_tokens;
    int64_t max_blocks;
    const int32_t *cu_seqlens_q;
    const int32_t *context_lens;
    const int32_t *block_tables;
    const int64_t *slot_mapping; /* [num_tokens] */
} batch_t;

typedef struct {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int64_t window; /* tokens seen, own included; 0 = all */
    int32_t cache_dtype;
    int32_t activation_dtype;
    float scale;
} attention_t;

EXPORT int64_t panel_width(void);

/* [out_features, in_features] (row-major, `source_dtype`) to panels [ceil(out / NR)][in][NR] of
 * `linear->dtype`, the last one filled with zeros. With a gated epilogue the first half of the rows
 * is the gate and the second what it multiplies: a panel has VL of one beside VL of the other. */
EXPORT void pack_linear(const linear_t *linear, void *packed, const void *source,
                        int32_t source_dtype, int32_t num_threads);

/* y = x W^T + bias, gated if that is the epilogue, or added to what y holds. x, y are fp32. */
EXPORT void run_linear(const linear_t *linear, int32_t is_added, const float *x, int64_t x_stride,
                       float *y, int64_t y_stride, int64_t num_rows, int32_t num_threads);

/* y = x / rms(x) * weight; all of `dtype` but weight fp32; sums in fp32. With `residual` x is added
 * to it first (in place) and the sum is what is normed. */
EXPORT void rms_norm(const void *x, void *residual, const float *weight, void *y, int64_t num_rows,
                     int64_t width, int64_t x_stride, float eps, int32_t dtype,
                     int32_t num_threads);

/* Rotates, in place, the first `rotary_dim` numbers of every head (halves paired, as in Llama).
 * x is [num_tokens, num_heads, head_dim] with a stride per token; cos_sin is
 * [num_tokens, rotary_dim] fp32, cosines before sines. With `norm_weight` every head is
 * rms-normed first (Qwen3). */
EXPORT void rope(void *x, int64_t x_stride, const float *cos_sin, int64_t num_tokens,
                 int64_t num_heads, int64_t head_dim, int64_t rotary_dim, const float *norm_weight,
                 float eps, int32_t dtype, int32_t num_threads);

/* y[:, i] = act(x[:, i]) * x[:, width + i] */
EXPORT void gate_mul(const void *x, void *y, int64_t num_rows, int64_t width, int32_t epilogue,
                     int32_t dtype, int32_t num_threads);

/* The highest number of each row of x, NaN if one is, and where it is first. */
EXPORT void argmax(const float *x, int64_t x_stride, int64_t num_rows, int64_t num_columns,
                   int64_t *indices, float *values, int32_t num_threads);

/* Attention of one layer: puts the rows' keys and values into their slots of the cache
 * [num_blocks, num_kv_heads, 2, block_size, head_dim], then attends over it for the requests in
 * `seqs` (indices into the batch; the others' rows of `output` are left alone). key and value have
 * the query's stride per token or another, head_dim must be a multiple of a vector and block_size
 * of panel_width(). */
EXPORT void attention(const attention_t *shape, const batch_t *batch, const int32_t *seqs,
                      int64_t num_seqs, void *cache, const void *query, int64_t q_stride,
                      const void *key, const void *value, int64_t kv_stride, void *output,
                      int64_t o_stride, int32_t num_threads);

/* -- recorded calls */

enum operation { RUN_LINEAR = 0, RMS_NORM = 1, ROPE = 2, ATTENTION = 3 };

typedef union {
    int64_t integer;
    void *pointer;
    float number;
} argument_t;

/* A call of one of the functions above, its arguments in their order. */
typedef struct {
    int64_t operation;
    argument_t arguments[13];
} call_t;

/* Makes the calls one after another, for the first `num_rows` rows of their matrices, whatever
 * number of rows they were recorded with; of attention these are requests with one row each. */
EXPORT void run_calls(const call_t *calls, int64_t count, int64_t num_rows);

#endif
