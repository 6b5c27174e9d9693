# mypy: ignore-errors
"""Attention of prompts and of later chunks over paged keys and values, as one Triton kernel.

For the layout and the method see ``shared.engine.cuda.attention_kernels``.
"""

import triton
import triton.language as tl

from shared.engine.cuda.attention_kernels import LOG2_E, LOWEST, _capped, _key_rows, _load_tile


@triton.jit
def _attend(
    query,
    peaks,
    sums,
    parts,
    first,
    stop,
    query_positions,
    length,
    cache_ptr,
    ids_ptr,
    kv_head,
    num_kv_heads,
    scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_MASKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Take keys and values of tiles ``[first, stop)`` into the softmax of each row of ``query``."""
    dims = tl.arange(0, DIMS)
    for tile in tl.range(first, stop, num_stages=NUM_STAGES):
        positions = tile * TILE + tl.arange(0, TILE)
        keys = _key_rows(ids_ptr, tile, length, kv_head, num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE)
        at = cache_ptr + keys[:, None] + dims[None, :]
        key, value = _load_tile(at, dims, BLOCK_SIZE, HEAD_DIM, DIMS)
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = _capped(scores, softcap, HAS_SOFTCAP) * LOG2_E
        if IS_MASKED:
            is_seen = positions[None, :] <= query_positions[:, None]
            if window > 0:
                is_seen = is_seen & (positions[None, :] > query_positions[:, None] - window)
            scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(peaks, tl.max(scores, axis=1))
        factor = tl.exp2(peaks - higher)
        weights = tl.exp2(scores - higher[:, None])
        sums = sums * factor + tl.sum(weights, axis=1)
        parts = tl.dot(
            weights.to(value.dtype), value, parts * factor[:, None], input_precision=PRECISION
        )
        peaks = higher
    return peaks, sums, parts


@triton.jit
def prefill_kernel(
    query_ptr,
    cache_ptr,
    out_ptr,
    sinks_ptr,
    tile_seqs_ptr,
    tile_starts_ptr,
    rows_ptr,
    query_lengths_ptr,
    lengths_ptr,
    starts_ptr,
    ids_ptr,
    query_stride,
    query_head_stride,
    num_heads,
    num_kv_heads,
    scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """``ROWS`` new tokens of one request in one query head.

    Request ``tile_seqs[i]`` has its new tokens in rows ``rows[..] + [0, query_lengths[..])`` of
    the query, of which this program takes those from ``tile_starts[i]`` on.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    seq = tl.load(tile_seqs_ptr + item)
    tile_start = tl.load(tile_starts_ptr + item)
    num_new = tl.load(query_lengths_ptr + seq)
    length = tl.load(lengths_ptr + seq)
    ids_ptr += tl.load(starts_ptr + seq)
    dims = tl.arange(0, DIMS)
    new = tile_start + tl.arange(0, ROWS)
    positions = length - num_new + new
    rows = tl.load(rows_ptr + seq).to(tl.int64) + new
    inside = (new < num_new)[:, None] & (dims < HEAD_DIM)[None, :]
    query_at = query_ptr + rows[:, None] * query_stride + head * query_head_stride + dims[None, :]
    query = tl.load(query_at, mask=inside, other=0.0)
    peaks = tl.full([ROWS], LOWEST, tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    parts = tl.zeros([ROWS, DIMS], tl.float32)
    # Keys [0, position of the first row] are seen by every row, those behind the last by none.
    first_position = length - num_new + tile_start
    stop = tl.cdiv(tl.minimum(first_position + ROWS, length), TILE)
    middle = (first_position + 1) // TILE
    first = 0
    if window > 0:
        first = tl.maximum(first_position + 1 - window, 0) // TILE
        middle = first
    peaks, sums, parts = _attend(
        query, peaks, sums, parts, first, middle, positions, length, cache_ptr, ids_ptr, kv_head,
        num_kv_heads, scale, window, softcap, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_SOFTCAP,
        PRECISION, False, NUM_STAGES,
    )  # fmt: skip
    peaks, sums, parts = _attend(
        query, peaks, sums, parts, middle, stop, positions, length, cache_ptr, ids_ptr, kv_head,
        num_kv_heads, scale, window, softcap, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_SOFTCAP,
        PRECISION, True, NUM_STAGES,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        higher = tl.maximum(peaks, sink)
        parts *= tl.exp2(peaks - higher)[:, None]
        sums = sums * tl.exp2(peaks - higher) + tl.exp2(sink - higher)
    # Rows behind the request's last one may have seen nothing; they are not stored.
    parts = parts / tl.where(sums > 0.0, sums, 1.0)[:, None]
    out_at = out_ptr + (rows[:, None] * num_heads + head) * HEAD_DIM + dims[None, :]
    tl.store(out_at, parts.to(out_ptr.dtype.element_ty), mask=inside)
