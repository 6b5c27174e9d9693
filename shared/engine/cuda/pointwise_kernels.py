# mypy: ignore-errors
"""What lies between the products of a layer, as Triton kernels; sums and angles are fp32.

Sizes in capitals are powers of two and known when a kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def gate(x, ACTIVATION: tl.constexpr):
    """``silu`` or ``gelu_tanh`` of fp32 ``x``.

    Both are ``x * sigmoid(z)``: with ``z = x``, and with ``z = 2u`` because
    ``1 + tanh(u) = 2 * sigmoid(2u)``.
    """
    z = x
    if ACTIVATION == "gelu_tanh":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-z))


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, row_stride, width, eps, BLOCK: tl.constexpr):
    """One row of ``x`` to one of the contiguous ``out``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    factor = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    y = x * factor * weight
    tl.store(out_ptr + row * width + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    heads_ptr,
    cos_sin_ptr,
    norm_ptr,
    token_stride,
    head_stride,
    num_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Rotate ``HEADS`` heads of one token in place, after an RMS norm of each if there is one.

    ``PAIRS`` holds ``ROTARY_HALF`` pairs, ``REST`` what is not rotated (0 if nothing is left).
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    inside = (heads < num_heads)[:, None] & (pairs < ROTARY_HALF)[None, :]
    start = heads_ptr + token * token_stride + heads[:, None] * head_stride
    left_at = start + pairs[None, :]
    right_at = left_at + ROTARY_HALF
    left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(right_at, mask=inside, other=0.0).to(tl.float32)
    angles_at = cos_sin_ptr + token * (2 * ROTARY_HALF) + pairs
    cosines = tl.load(angles_at, mask=pairs < ROTARY_HALF, other=0.0)[None, :]
    sines = tl.load(angles_at + ROTARY_HALF, mask=pairs < ROTARY_HALF, other=0.0)[None, :]
    if HAS_NORM:
        squares = tl.sum(left * left + right * right, axis=1)
        if REST > 0:
            columns = 2 * ROTARY_HALF + tl.arange(0, REST)
            in_rest = (heads < num_heads)[:, None] & (columns < HEAD_DIM)[None, :]
            rest_at = start + columns[None, :]
            rest = tl.load(rest_at, mask=in_rest, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1)
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight_at = norm_ptr + pairs
        weight = tl.load(weight_at, mask=pairs < ROTARY_HALF, other=0.0)
        left = left * factor * weight[None, :]
        weight = tl.load(weight_at + ROTARY_HALF, mask=pairs < ROTARY_HALF, other=0.0)
        right = right * factor * weight[None, :]
        if REST > 0:
            weight = tl.load(norm_ptr + columns, mask=columns < HEAD_DIM, other=0.0)
            rest = rest * factor * weight[None, :]
            tl.store(rest_at, rest.to(heads_ptr.dtype.element_ty), mask=in_rest)
    rotated = left * cosines - right * sines
    tl.store(left_at, rotated.to(heads_ptr.dtype.element_ty), mask=inside)
    rotated = right * cosines + left * sines
    tl.store(right_at, rotated.to(heads_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_mul_kernel(
    both_ptr, out_ptr, row_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """``BLOCK`` columns of a row: the gate's left half times the right half."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    left_at = both_ptr + row * row_stride + columns
    left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(left_at + width, mask=inside, other=0.0).to(tl.float32)
    y = gate(left, ACTIVATION) * right
    tl.store(out_ptr + row * width + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
