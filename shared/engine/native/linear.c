/* Linear layers over packed weights, for CPUs without matrix instructions of their own.
 *
 * The weights stay as they were trained, bf16 or fp32, and are widened in registers, so a decode
 * step reads half the bytes that an fp32 product would; activations and sums are fp32. Blocking as
 * in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 2008),
 * with the weights packed once at load. */
#include "ops.h"
#include "scratch.h"
#include "tile.h"

/* Bytes of packed activations that are to stay in the second-level cache. */
#define ROW_BLOCK_BYTES (384 << 10)
/* Columns of the weights at a time, where there are many rows. */
#define MAX_DEPTH 1024
/* From so many rows on a panel is widened once into memory rather than in registers per tile. */
#define WIDEN_ROWS (4 * MR)

int64_t panel_width(void) { return NR; }

static int is_gated(int32_t epilogue) { return epilogue >= SILU_MUL; }

static int64_t num_panels(const linear_t *l) { return (l->out_features + NR - 1) / NR; }

/* The row of the source that column `column` of panel `panel` is; -1 is padding. */
static int64_t source_row(const linear_t *l, int64_t panel, int column) {
    if (!is_gated(l->epilogue)) {
        int64_t row = panel * NR + column;
        return row < l->out_features ? row : -1;
    }
    int64_t half = l->out_features / 2, row = panel * VL + column % VL;
    if (row >= half) return -1;
    return column < VL ? row : half + row;
}

void pack_linear(const linear_t *l, void *packed, const void *source, int32_t source_dtype,
                 int32_t num_threads) {
    int64_t panels = is_gated(l->epilogue) ? (l->out_features / 2 + VL - 1) / VL : num_panels(l);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        for (int c = 0; c < NR; c++) {
            int64_t row = source_row(l, p, c);
            for (int64_t k = 0; k < l->in_features; k++) {
                float value = 0.0f;
                if (row >= 0 && source_dtype == BF16)
                    value = bf16_to_f32(((const bf16 *)source)[row * l->in_features + k]);
                else if (row >= 0)
                    value = ((const float *)source)[row * l->in_features + k];
                int64_t start = (p * l->in_features + k) * NR;
                if (l->dtype == BF16)
                    ((bf16 *)packed)[start + c % VL * 2 + c / VL] = f32_to_bf16(value);
                else
                    ((float *)packed)[start + c] = value;
            }
        }
    }
}

/* Writes `count` of the numbers in v. */
INLINE void store_some(float *y, vf v, int64_t count) {
    if (count >= VL)
        store_f32(y, v);
    else if (count > 0)
        memcpy(y, &v, (size_t)count * sizeof(float));
}

INLINE vf load_some(const float *y, int64_t count) {
    vf v = splat(0.0f);
    if (count >= VL) return load_f32(y);
    if (count > 0) memcpy(&v, y, (size_t)count * sizeof(float));
    return v;
}

/* The sums of a tile to their columns of y. */
static void finish_tile(const linear_t *l, int is_added, int64_t panel, vf acc[][2], int rows,
                        float *y, int64_t y_stride) {
    if (is_gated(l->epilogue)) {
        int64_t column = panel * VL, left = l->out_features / 2 - column;
        for (int r = 0; r < rows; r++) {
            vf product = gate(acc[r][0], l->epilogue) * acc[r][1];
            store_some(y + r * y_stride + column, product, left);
        }
        return;
    }
    int64_t column = panel * NR, left = l->out_features - column;
    y += column;
    if (left >= NR && !is_added) {
        for (int r = 0; r < rows; r++, y += y_stride)
            store_f32(y, acc[r][0]), store_f32(y + VL, acc[r][1]);
    } else if (left >= NR) {
        for (int r = 0; r < rows; r++, y += y_stride) {
            store_f32(y, load_f32(y) + acc[r][0]);
            store_f32(y + VL, load_f32(y + VL) + acc[r][1]);
        }
    } else {
        for (int r = 0; r < rows; r++, y += y_stride)
            for (int i = 0; i < 2; i++) {
                vf sum = is_added ? load_some(y + i * VL, left - i * VL) + acc[r][i] : acc[r][i];
                store_some(y + i * VL, sum, left - i * VL);
            }
    }
}

/* A product y (+)= x W^T of one block of rows and some columns of W, [first, first + depth). */
typedef struct {
    const linear_t *l;
    int is_added;
    int64_t first, depth;
    const float *packed; /* the rows, in tiles of [depth][rows] */
    int64_t num_rows;
    float *y;
    int64_t y_stride;
} block_t;

/* Its part of panel `panel`, which is at `b` in the weights' type or fp32. */
static void run_panel(const block_t *block, int64_t panel, const void *b, int32_t b_dtype) {
    const linear_t *l = block->l;
    int64_t depth = block->depth, num_rows = block->num_rows;
    vf bias[2] = {splat(0.0f), splat(0.0f)};
    if (l->bias && block->first == 0) load_row_f32(l->bias + panel * NR, bias);
    int step = tile_rows(num_rows);
    /* Each tile asks for its share of the next panel, so that memory is never idle. */
    int64_t row_bytes = NR * item_bytes(l->dtype);
    const char *ahead = (const char *)l->weights +
                        ((panel + 1) * l->in_features + block->first) * row_bytes;
    int64_t ahead_step = row_bytes * step / num_rows;
    for (int64_t row = 0; row < num_rows; row += step) {
        int rows = num_rows - row < step ? (int)(num_rows - row) : step;
        const float *a = block->packed + row * depth;
        vf acc[MR][2];
        for (int r = 0; r < rows; r++) acc[r][0] = bias[0], acc[r][1] = bias[1];
#define RUN_F32(R) tile_f32(R, depth, a, 1, R, b, NR, acc, ahead, ahead_step)
#define RUN_BF16(R) tile_bf16(R, depth, a, 1, R, b, NR, acc, ahead, ahead_step)
        if (b_dtype == BF16) {
            WITH_ROWS(rows, RUN_BF16)
        } else {
            WITH_ROWS(rows, RUN_F32)
        }
        ahead += ahead_step * depth;
        finish_tile(l, block->is_added, panel, acc, rows, block->y + row * block->y_stride,
                    block->y_stride);
    }
}

static void widen_panel(float *wide, const bf16 *panel, int64_t count) {
    for (int64_t i = 0; i < count; i += NR) {
        vf row[2];
        load_row_bf16(panel + i, row);
        store_f32(wide + i, row[0]);
        store_f32(wide + i + VL, row[1]);
    }
}

/* Rows [0, num_rows) against panels [lo, hi), `depth` columns of W at a time. `packed` and `wide`
 * are the thread's own scratch. */
static void run_block(const linear_t *l, int is_added, const float *x, int64_t x_stride, float *y,
                      int64_t y_stride, int64_t num_rows, int64_t lo, int64_t hi, int64_t depth,
                      float *packed, float *wide) {
    int64_t row_bytes = NR * item_bytes(l->dtype);
    int step = tile_rows(num_rows);
    for (int64_t first = 0; first < l->in_features; first += depth) {
        int64_t k = l->in_features - first < depth ? l->in_features - first : depth;
        for (int64_t row = 0; row < num_rows; row += step) {
            int rows = num_rows - row < step ? (int)(num_rows - row) : step;
            pack_rows(packed + row * k, x + row * x_stride + first, x_stride, rows, k);
        }
        block_t block = {l, is_added || first > 0, first, k, packed, num_rows, y, y_stride};
        for (int64_t p = lo; p < hi; p++) {
            const char *panel = (const char *)l->weights + (p * l->in_features + first) * row_bytes;
            if (l->dtype == BF16 && num_rows >= WIDEN_ROWS) {
                widen_panel(wide, (const bf16 *)panel, k * NR);
                run_panel(&block, p, wide, F32);
            } else {
                run_panel(&block, p, panel, l->dtype);
            }
        }
    }
}

void run_linear(const linear_t *l, int32_t is_added, const float *x, int64_t x_stride, float *y,
                int64_t y_stride, int64_t num_rows, int32_t num_threads) {
    if (num_rows == 0) return;
    int64_t panels = is_gated(l->epilogue) ? (l->out_features / 2 + VL - 1) / VL : num_panels(l);
    /* A gate needs the whole sum; and few rows fit the cache however long they are. */
    int64_t k = l->in_features;
    if (!is_gated(l->epilogue) && num_rows >= WIDEN_ROWS && k > MAX_DEPTH)
        k = round_up(k / ((k + MAX_DEPTH - 1) / MAX_DEPTH) + 1, 2);
    int64_t most = ROW_BLOCK_BYTES / (k * (int64_t)sizeof(float));
    if (most < WIDEN_ROWS) most = WIDEN_ROWS;
    /* Many rows are divided among the threads, few share the panels. */
    int by_rows = num_rows >= num_threads * WIDEN_ROWS;
    int64_t blocks = (num_rows + most - 1) / most;
    if (by_rows) blocks = round_up(blocks, num_threads);
    int64_t block = (num_rows + blocks - 1) / blocks;
    blocks = (num_rows + block - 1) / block;
    int64_t panel_jobs = by_rows ? 1 : (num_threads < panels ? num_threads : panels);
    size_t packed_bytes = round_up(block * k * sizeof(float), 64);
    size_t wide_bytes = l->dtype == BF16 ? round_up(k * NR * sizeof(float), 64) : 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *packed = scratch(packed_bytes + wide_bytes);
        float *wide = (float *)((char *)packed + packed_bytes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < blocks * panel_jobs; job++) {
            int64_t row = job / panel_jobs * block, part = job % panel_jobs;
            int64_t rows = num_rows - row < block ? num_rows - row : block;
            run_block(l, is_added, x + row * x_stride, x_stride, y + row * y_stride, y_stride, rows,
                      panels * part / panel_jobs, panels * (part + 1) / panel_jobs, k, packed,
                      wide);
        }
    }
}
