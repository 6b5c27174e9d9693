/* The most likely token of each row of logits. */
#include <math.h>

#include "ops.h"

/* Numbers of a row at a time; where the highest is, is only looked for among these. */
#define CHUNK 2048
/* Comparisons at once: as many as hide how long one takes. */
#define LANES 4

/* The highest of `count` numbers, NaN if one is. */
static float highest(const float *x, int64_t count) {
    vf best[LANES];
    vi is_nan = {0};
    int64_t i = 0;
    for (int j = 0; j < LANES; j++) best[j] = splat(-INFINITY);
    for (; i + LANES * VL <= count; i += LANES * VL)
        UNROLL
        for (int j = 0; j < LANES; j++) {
            vf v = load_f32(x + i + j * VL);
            best[j] = select_f32(v > best[j], v, best[j]);
            is_nan |= v != v;
        }
    float result = -INFINITY;
    for (int lane = 0; lane < VL; lane++) {
        if (is_nan[lane]) return NAN;
        for (int j = 0; j < LANES; j++)
            if (best[j][lane] > result) result = best[j][lane];
    }
    for (; i < count; i++) {
        if (x[i] != x[i]) return NAN;
        if (x[i] > result) result = x[i];
    }
    return result;
}

void argmax(const float *x, int64_t x_stride, int64_t num_rows, int64_t num_columns,
            int64_t *indices, float *values, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t row = 0; row < num_rows; row++) {
        const float *own = x + row * x_stride;
        float best = -INFINITY;
        int64_t start = 0;
        for (int64_t i = 0; i < num_columns && best == best; i += CHUNK) {
            float value = highest(own + i, num_columns - i < CHUNK ? num_columns - i : CHUNK);
            if (!(value <= best)) best = value, start = i;
        }
        while (best == best && own[start] != best) start++;
        values[row] = best;
        indices[row] = start;
    }
}
