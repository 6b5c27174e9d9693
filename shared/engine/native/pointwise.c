/* What stands between the products of a layer: norms, rotary positions, gates. */
#include <math.h>

#include "ops.h"

/* Below so many numbers starting threads costs more than they save. */
#define SERIAL_ITEMS (1 << 14)

INLINE float get(const void *p, int64_t i, int32_t dtype) {
    return dtype == BF16 ? bf16_to_f32(((const bf16 *)p)[i]) : ((const float *)p)[i];
}

INLINE void put(void *p, int64_t i, float x, int32_t dtype) {
    if (dtype == BF16)
        ((bf16 *)p)[i] = f32_to_bf16(x);
    else
        ((float *)p)[i] = x;
}

INLINE void *advance(const void *p, int64_t count, int32_t dtype) {
    return (char *)p + count * (dtype == BF16 ? 2 : 4);
}

/* 1 / rms of `width` numbers, with `residual` added to them first if there is one. */
INLINE float inverse_rms(const void *x, void *residual, int64_t width, float eps, int32_t dtype) {
    vf squares = splat(0.0f);
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + VL <= width; i += VL) {
        vf v = load_any(x, i, dtype);
        if (residual) {
            store_any(residual, i, v + load_any(residual, i, dtype), dtype);
            v = load_any(residual, i, dtype); /* as rounded */
        }
        squares += v * v;
    }
    for (; i < width; i++) {
        float v = get(x, i, dtype);
        if (residual) {
            put(residual, i, v + get(residual, i, dtype), dtype);
            v = get(residual, i, dtype);
        }
        rest += v * v;
    }
    return 1.0f / sqrtf((sum(squares) + rest) / (float)width + eps);
}

INLINE void norm_row(const void *x, const float *weight, void *y, int64_t width, float factor,
                     int32_t dtype) {
    int64_t i = 0;
    for (; i + VL <= width; i += VL)
        store_any(y, i, load_any(x, i, dtype) * factor * load_f32(weight + i), dtype);
    for (; i < width; i++) put(y, i, get(x, i, dtype) * factor * weight[i], dtype);
}

/* Calls FUNCTION with the dtype as a constant, so that its loops are specialised. */
#define BY_DTYPE(dtype, FUNCTION, ...)                                                            \
    if (dtype == BF16)                                                                            \
        FUNCTION(__VA_ARGS__, BF16);                                                              \
    else                                                                                          \
        FUNCTION(__VA_ARGS__, F32);

INLINE void rms_norm_row(const void *x, void *residual, const float *weight, void *y,
                         int64_t width, float eps, int32_t dtype) {
    float factor = inverse_rms(x, residual, width, eps, dtype);
    norm_row(residual ? residual : x, weight, y, width, factor, dtype);
}

void rms_norm(const void *x, void *residual, const float *weight, void *y, int64_t num_rows,
              int64_t width, int64_t x_stride, float eps, int32_t dtype, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > SERIAL_ITEMS)
    for (int64_t row = 0; row < num_rows; row++) {
        void *own = residual ? advance(residual, row * width, dtype) : NULL;
        BY_DTYPE(dtype, rms_norm_row, advance(x, row * x_stride, dtype), own, weight,
                 advance(y, row * width, dtype), width, eps)
    }
}

INLINE void rotate_head(void *head, const float *cos_sin, int64_t rotary_dim, int32_t dtype) {
    int64_t half = rotary_dim / 2, i = 0;
    const float *cosines = cos_sin, *sines = cos_sin + half;
    for (; i + VL <= half; i += VL) {
        vf a = load_any(head, i, dtype), b = load_any(head, half + i, dtype);
        vf c = load_f32(cosines + i), s = load_f32(sines + i);
        store_any(head, i, a * c - b * s, dtype);
        store_any(head, half + i, b * c + a * s, dtype);
    }
    for (; i < half; i++) {
        float a = get(head, i, dtype), b = get(head, half + i, dtype);
        put(head, i, a * cosines[i] - b * sines[i], dtype);
        put(head, half + i, b * cosines[i] + a * sines[i], dtype);
    }
}

INLINE void rope_token(void *heads, const float *cos_sin, int64_t num_heads, int64_t head_dim,
                       int64_t rotary_dim, const float *norm_weight, float eps, int32_t dtype) {
    for (int64_t h = 0; h < num_heads; h++) {
        void *head = advance(heads, h * head_dim, dtype);
        if (norm_weight) rms_norm_row(head, NULL, norm_weight, head, head_dim, eps, dtype);
        rotate_head(head, cos_sin, rotary_dim, dtype);
    }
}

void rope(void *x, int64_t x_stride, const float *cos_sin, int64_t num_tokens, int64_t num_heads,
          int64_t head_dim, int64_t rotary_dim, const float *norm_weight, float eps, int32_t dtype,
          int32_t num_threads) {
    int is_large = num_tokens * num_heads * head_dim > SERIAL_ITEMS;
#pragma omp parallel for num_threads(num_threads) if (is_large)
    for (int64_t token = 0; token < num_tokens; token++)
        BY_DTYPE(dtype, rope_token, advance(x, token * x_stride, dtype),
                 cos_sin + token * rotary_dim, num_heads, head_dim, rotary_dim, norm_weight, eps)
}

INLINE void gate_row(const void *x, void *y, int64_t width, int32_t epilogue, int32_t dtype) {
    int64_t i = 0;
    for (; i + VL <= width; i += VL)
        store_any(y, i, gate(load_any(x, i, dtype), epilogue) * load_any(x, width + i, dtype),
                  dtype);
    for (; i < width; i++) {
        float g = gate(splat(get(x, i, dtype)), epilogue)[0];
        put(y, i, g * get(x, width + i, dtype), dtype);
    }
}

void gate_mul(const void *x, void *y, int64_t num_rows, int64_t width, int32_t epilogue,
              int32_t dtype, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * width > SERIAL_ITEMS)
    for (int64_t row = 0; row < num_rows; row++)
        BY_DTYPE(dtype, gate_row, advance(x, row * 2 * width, dtype), advance(y, row * width, dtype),
                 width, epilogue)
}
