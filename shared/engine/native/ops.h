/* What several kernels have in common: numbers of either type, gates, sizes in whole steps. */
#ifndef BANYAN_OPS_H
#define BANYAN_OPS_H

#include "kernels.h"
#include "simd.h"

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

INLINE int64_t item_bytes(int32_t dtype) { return dtype == BF16 ? 2 : 4; }

INLINE vf load_any(const void *p, int64_t i, int32_t dtype) {
    return dtype == BF16 ? load_bf16((const bf16 *)p + i) : load_f32((const float *)p + i);
}

INLINE void store_any(void *p, int64_t i, vf v, int32_t dtype) {
    if (dtype == BF16)
        store_bf16((bf16 *)p + i, v);
    else
        store_f32((float *)p + i, v);
}

INLINE vf silu(vf x) { return x / (1.0f + vexp(-x)); }

/* 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)) */
INLINE vf gelu_tanh(vf x) {
    vf u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.0f + vexp(-2.0f * u));
}

INLINE vf gate(vf x, int32_t epilogue) { return epilogue == SILU_MUL ? silu(x) : gelu_tanh(x); }

#endif
