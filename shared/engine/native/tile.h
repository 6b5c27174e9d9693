/* The register tile all matrix products here are made of. */
#ifndef BANYAN_TILE_H
#define BANYAN_TILE_H

#include "simd.h"

/* One column of A times one row of B. */
#define TILE_STEP(LOAD_ROW)                                                                       \
    {                                                                                             \
        vf row[2];                                                                                \
        LOAD_ROW(b, row);                                                                         \
        for (int r = 0; r < rows; r++) {                                                          \
            vf x = splat(a[r * a_row]);                                                           \
            c[r][0] += x * row[0];                                                                \
            c[r][1] += x * row[1];                                                                \
        }                                                                                         \
        a += a_column;                                                                            \
        b += b_stride;                                                                            \
    }

/* acc[rows][2] += A B for A [rows, depth], its rows a_row and its columns a_column apart, and B
 * [depth] rows of NR numbers, b_stride apart. `rows` is a constant at every call, so that the
 * accumulators stay in registers. While it computes it asks for memory: from `ahead` on,
 * `ahead_step` bytes a step, every second step. */
#define DEFINE_TILE(NAME, TYPE, LOAD_ROW)                                                         \
    INLINE void NAME(int rows, int64_t depth, const float *a, int64_t a_row, int64_t a_column,    \
                     const TYPE *b, int64_t b_stride, vf acc[][2], const char *ahead,             \
                     int64_t ahead_step) {                                                        \
        vf c[MR][2];                                                                              \
        for (int r = 0; r < rows; r++) c[r][0] = acc[r][0], c[r][1] = acc[r][1];                  \
        for (int64_t k = 1; k < depth; k += 2) {                                                  \
            __builtin_prefetch(ahead, 0, 2);                                                      \
            if (2 * ahead_step > 64) __builtin_prefetch(ahead + 64, 0, 2);                        \
            ahead += 2 * ahead_step;                                                              \
            TILE_STEP(LOAD_ROW)                                                                   \
            TILE_STEP(LOAD_ROW)                                                                   \
        }                                                                                         \
        if (depth % 2) TILE_STEP(LOAD_ROW)                                                        \
        for (int r = 0; r < rows; r++) acc[r][0] = c[r][0], acc[r][1] = c[r][1];                  \
    }

DEFINE_TILE(tile_f32, float, load_row_f32)
DEFINE_TILE(tile_bf16, bf16, load_row_bf16)

/* Rows of each tile when `rows` are divided into as few, and as equal ones, as can be. */
INLINE int tile_rows(int64_t rows) {
    int64_t tiles = (rows + MR - 1) / MR;
    return (int)((rows + tiles - 1) / tiles);
}

/* Calls `CALL(rows)` with `rows` as a constant in 1..MR. */
#if MR == 14
#define MORE_ROWS(CALL)                                                                           \
    case 7: CALL(7); break;                                                                       \
    case 8: CALL(8); break;                                                                       \
    case 9: CALL(9); break;                                                                       \
    case 10: CALL(10); break;                                                                     \
    case 11: CALL(11); break;                                                                     \
    case 12: CALL(12); break;                                                                     \
    case 13: CALL(13); break;                                                                     \
    case 14: CALL(14); break;
#else
#define MORE_ROWS(CALL)
#endif
#define WITH_ROWS(rows, CALL)                                                                     \
    switch (rows) {                                                                               \
    case 1: CALL(1); break;                                                                       \
    case 2: CALL(2); break;                                                                       \
    case 3: CALL(3); break;                                                                       \
    case 4: CALL(4); break;                                                                       \
    case 5: CALL(5); break;                                                                       \
    case 6: CALL(6); break;                                                                       \
        MORE_ROWS(CALL)                                                                           \
    }

/* Rows [0, rows) of x, `depth` columns, to [depth][rows]. */
INLINE void pack_rows(float *packed, const float *x, int64_t x_stride, int rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k++)
        for (int r = 0; r < rows; r++) packed[k * rows + r] = x[r * x_stride + k];
}

#endif
