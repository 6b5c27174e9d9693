# mypy: ignore-errors
"""The product of one row with a matrix as a Triton kernel: bound by reading the matrix once."""

import triton
import triton.language as tl

from shared.engine.cuda.pointwise_kernels import gate


@triton.jit
def _products(
    x_ptr, rows, num_inputs, inside, ROWS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr
):
    """fp32 dot products of ``x`` with matrix rows that begin at ``rows`` ``[ROWS]``."""
    # Sums over a row stay apart until the end: reductions cost more than the additions.
    sums = tl.zeros([ROWS, INPUTS], tl.float32)
    for start in range(0, num_inputs, INPUTS):
        columns = start + tl.arange(0, INPUTS)
        if EVEN:
            x = tl.load(x_ptr + columns)
            weight = tl.load(
                rows[:, None] + columns[None, :],
                mask=inside[:, None],
                other=0.0,
                eviction_policy="evict_first",
            )
        else:
            in_row = columns < num_inputs
            x = tl.load(x_ptr + columns, mask=in_row, other=0.0)
            weight = tl.load(
                rows[:, None] + columns[None, :],
                mask=inside[:, None] & in_row[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_outputs,
    num_inputs,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``ROWS`` numbers of ``W x``, plus bias and residual where there are.

    With an ``ACTIVATION`` the contiguous ``W`` has ``2 * num_outputs`` rows, and the result is the
    gate of the first half's products times the second half's. ``EVEN``: ``INPUTS`` divides
    ``num_inputs``.
    """
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = outputs < num_outputs
    rows = weight_ptr + outputs.to(tl.int64) * num_inputs
    y = _products(x_ptr, rows, num_inputs, inside, ROWS, INPUTS, EVEN)
    if ACTIVATION != "none":
        # In a wider type: half of a matrix may be more than 2**31 numbers away.
        rows += tl.cast(num_outputs, tl.int64) * num_inputs
        y = gate(y, ACTIVATION) * _products(x_ptr, rows, num_inputs, inside, ROWS, INPUTS, EVEN)
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, y.to(out_ptr.dtype.element_ty), mask=inside)
