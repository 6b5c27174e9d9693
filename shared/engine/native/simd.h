/* Vectors of the widest registers this file is compiled for, in the compilers' portable notation
 * (GCC and Clang); the same source gives AVX-512, AVX2 and NEON code. */
#ifndef BANYAN_SIMD_H
#define BANYAN_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16 /* floats in a vector */
#define MR 14 /* rows of a register tile: MR * 2 accumulators and 2 vectors of weights */
#elif defined(__AVX2__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 6
#endif
#define NR (2 * VL) /* columns of a register tile */

#define INLINE static inline __attribute__((always_inline))
/* Before loops over arrays of vectors that are to stay in registers. */
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

typedef uint16_t bf16;

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load_f32(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* GCC widens 16-bit numbers in halves, which takes twice as long as the one instruction for it. */
#if defined(__AVX512F__)
INLINE vf load_bf16(const bf16 *p) {
    return (vf)(vu)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#elif defined(__AVX2__)
INLINE vf load_bf16(const bf16 *p) {
    return (vf)(vu)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#else
INLINE vf load_bf16(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
#endif

/* Round to nearest, ties to even, as torch does. */
INLINE void store_bf16(bf16 *p, vf v) {
    vu bits = (vu)v;
    bits += 0x7fff + ((bits >> 16) & 1);
    vh h = __builtin_convertvector(bits >> 16, vh);
    memcpy(p, &h, sizeof h);
}

/* Weights lie in rows of NR. Those of bf16 alternate between the two halves of a row, so that one
 * load and one instruction a half widen them. */
INLINE void load_row_f32(const float *p, vf row[2]) {
    row[0] = load_f32(p);
    row[1] = load_f32(p + VL);
}

INLINE void load_row_bf16(const bf16 *p, vf row[2]) {
    vu pairs;
    memcpy(&pairs, p, sizeof pairs);
    row[0] = (vf)(pairs << 16);
    row[1] = (vf)(pairs & 0xffff0000u);
}

INLINE float bf16_to_f32(bf16 h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE bf16 f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Numbers 0, 2, 4 ... and 1, 3, 5 ... of a and then b, added: sums of neighbours. */
INLINE vf add_pairs(vf a, vf b) {
    vi even, odd;
    for (int i = 0; i < VL; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

/* The sums of VL vectors, one beside the other. */
INLINE vf sums(vf v[VL]) {
    UNROLL
    for (int count = VL; count > 1; count /= 2)
        UNROLL
        for (int i = 0; i < count / 2; i++) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
    return v[0];
}

INLINE float sum(vf v) {
    for (int width = VL; width > 1; width /= 2) v = add_pairs(v, v);
    return v[0];
}

INLINE vf select_f32(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf vmax(vf a, vf b) { return select_f32(a > b, a, b); }

INLINE float max_of(vf v) {
    for (int width = VL / 2; width > 0; width /= 2) {
        vi other;
        for (int i = 0; i < VL; i++) other[i] = i ^ width;
        v = vmax(v, __builtin_shuffle(v, other));
    }
    return v[0];
}

/* e^x, relative error below 2e-7; 0 below -87, so that masked scores vanish. */
INLINE vf vexp(vf x) {
    vi is_tiny = x < -87.0f;
    x = select_f32(x > 88.0f, splat(88.0f), select_f32(is_tiny, splat(-87.0f), x));
    vf t = x * 1.44269504088896341f;
    vi n = __builtin_convertvector(t + select_f32(t < 0.0f, splat(-0.5f), splat(0.5f)), vi);
    vf nf = __builtin_convertvector(n, vf);
    vf r = x - nf * 0.693359375f + nf * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf result = p * (vf)((n + 127) << 23);
    return select_f32(is_tiny, splat(0.0f), result);
}

#endif
