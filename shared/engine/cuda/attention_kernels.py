# mypy: ignore-errors
"""Attention over paged keys and values as Triton kernels.

A layer's cache is contiguous, ``[num_blocks, num_kv_heads, 2, BLOCK_SIZE, HEAD_DIM]``; the block
ids of all requests lie one after the other in ``ids``, those of a request from ``starts`` on.
Softmax is computed online (Milakov and Gimelshein, arXiv:1805.02867) over tiles as in
FlashAttention-2 (Dao, arXiv:2307.08691, section 3.1). A decode is split along the sequence as in
Flash-Decoding (https://pytorch.org/blog/flash-decoding/): each part leaves its unnormalised
output, its highest score and its sum of weights, and ``merge_kernel`` adds them up.

Scores are multiplied by log2(e), so that weights are powers of two. ``LOWEST`` stands for "no
score yet": other than an infinity it can be subtracted from itself. Sizes in capitals are known
when a kernel is compiled; ``TILE``, ``ROWS``, ``DIMS`` (``HEAD_DIM`` rounded up) are powers of two.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)


@triton.jit
def write_kv_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slots_ptr,
    key_stride,
    value_stride,
    key_head_stride,
    value_head_stride,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Put ``HEADS`` keys and values of one token into its slot; a negative slot is none."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    inside = (heads < num_kv_heads)[:, None] & (dims < HEAD_DIM)[None, :] & (slot >= 0)
    key_at = key_ptr + token * key_stride + heads[:, None] * key_head_stride + dims[None, :]
    value_at = value_ptr + token * value_stride + heads[:, None] * value_head_stride + dims[None, :]
    key = tl.load(key_at, mask=inside, other=0.0)
    value = tl.load(value_at, mask=inside, other=0.0)
    row = slot // BLOCK_SIZE * num_kv_heads * (2 * BLOCK_SIZE) + slot % BLOCK_SIZE
    at = cache_ptr + (row + heads[:, None] * (2 * BLOCK_SIZE)) * HEAD_DIM + dims[None, :]
    tl.store(at, key.to(cache_ptr.dtype.element_ty), mask=inside)
    at += BLOCK_SIZE * HEAD_DIM
    tl.store(at, value.to(cache_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _key_rows(
    ids_ptr,
    tile,
    length,
    kv_head,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Offsets ``[TILE]`` in the cache of the keys at positions from ``tile * TILE`` on."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(ids_ptr + tile * TILE // BLOCK_SIZE).to(tl.int64)
        row = (block * num_kv_heads + kv_head) * (2 * BLOCK_SIZE) + tile * TILE % BLOCK_SIZE
        rows = row + tl.arange(0, TILE)
    else:
        positions = tile * TILE + tl.arange(0, TILE)
        blocks = tl.load(ids_ptr + positions // BLOCK_SIZE, mask=positions < length, other=0)
        heads = blocks.to(tl.int64) * num_kv_heads + kv_head
        rows = heads * (2 * BLOCK_SIZE) + positions % BLOCK_SIZE
    return rows * HEAD_DIM


@triton.jit
def _load_tile(at, dims, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """Keys ``at`` ``[TILE, DIMS]``, and their values, seen or not.

    Whatever is in a block is finite, so it is enough that what is not seen has no weight; loads
    under a condition would be made one after the other.
    """
    if DIMS == HEAD_DIM:
        key = tl.load(at)
        value = tl.load(at + BLOCK_SIZE * HEAD_DIM)
    else:
        inside = (dims < HEAD_DIM)[None, :]
        key = tl.load(at, mask=inside, other=0.0)
        value = tl.load(at + BLOCK_SIZE * HEAD_DIM, mask=inside, other=0.0)
    return key, value


@triton.jit
def _capped(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """``softcap * tanh(scores / softcap)``."""
    if HAS_SOFTCAP:
        x = scores / softcap
        # Near zero the exponentials cancel each other; there the series is exact to fp32.
        square = x * x
        series = x * (1.0 - square * (0.33333333 - square * (0.13333333 - square * 0.05396825)))
        exact = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        scores = softcap * tl.where(square < 0.0625, series, exact)
    return scores


@triton.jit
def _tiles_of_split(length, window, split, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr):
    """First position that is seen, and tiles ``[first, stop)`` of this part of a decode."""
    low = 0
    if window > 0:
        low = tl.maximum(length - window, 0)
    lo, hi = low // TILE, tl.cdiv(length, TILE)
    count = tl.cdiv(hi - lo, NUM_SPLITS)
    first = lo + split * count
    return low, first, tl.minimum(first + count, hi)


@triton.jit
def decode_rows_kernel(
    query_ptr,
    cache_ptr,
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    sinks_ptr,
    rows_ptr,
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
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One query head of one request: for models whose query heads each have a KV head.

    Each of the ``TILE`` rows keeps a softmax of its own over every ``TILE``-th token until the
    end, so that in the loop nothing is exchanged between threads but the sums over a head.
    """
    seq, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // (num_heads // num_kv_heads)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    length = tl.load(lengths_ptr + seq)
    low, first, stop = _tiles_of_split(length, window, split, NUM_SPLITS, TILE)
    ids_ptr += tl.load(starts_ptr + seq)
    dims = tl.arange(0, DIMS)
    query_at = query_ptr + row * query_stride + head * query_head_stride + dims
    query = tl.load(query_at, mask=dims < HEAD_DIM, other=0.0).to(tl.float32) * scale
    peaks = tl.full([TILE], LOWEST, tl.float32)
    sums = tl.zeros([TILE], tl.float32)
    parts = tl.zeros([TILE, DIMS], tl.float32)
    for tile in tl.range(first, stop, num_stages=NUM_STAGES):
        positions = tile * TILE + tl.arange(0, TILE)
        is_seen = (positions >= low) & (positions < length)
        keys = _key_rows(ids_ptr, tile, length, kv_head, num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE)
        at = cache_ptr + keys[:, None] + dims[None, :]
        key, value = _load_tile(at, dims, BLOCK_SIZE, HEAD_DIM, DIMS)
        scores = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
        scores = _capped(scores, softcap, HAS_SOFTCAP) * LOG2_E
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(peaks, scores)
        factor = tl.exp2(peaks - higher)
        weights = tl.exp2(scores - higher)
        sums = sums * factor + weights
        parts = parts * factor[:, None] + weights[:, None] * value.to(tl.float32)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    factor = tl.exp2(peaks - peak)
    total = tl.sum(sums * factor, axis=0)
    part = tl.sum(parts * factor[:, None], axis=0)
    at = seq.to(tl.int64) * num_heads + head
    if NUM_SPLITS > 1:
        at = at * NUM_SPLITS + split
        tl.store(peaks_ptr + at, peak)
        tl.store(sums_ptr + at, total)
        tl.store(parts_ptr + at * HEAD_DIM + dims, part, mask=dims < HEAD_DIM)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
            higher = tl.maximum(peak, sink)
            part *= tl.exp2(peak - higher)
            total = total * tl.exp2(peak - higher) + tl.exp2(sink - higher)
        # Rows that only pad a batch have seen nothing.
        part = part / tl.where(total > 0.0, total, 1.0)
        out_at = out_ptr + (row * num_heads + head) * HEAD_DIM + dims
        tl.store(out_at, part.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def decode_groups_kernel(
    query_ptr,
    cache_ptr,
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    sinks_ptr,
    rows_ptr,
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
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """All ``GROUP`` query heads of one KV head of one request, padded to ``ROWS`` rows."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    length = tl.load(lengths_ptr + seq)
    low, first, stop = _tiles_of_split(length, window, split, NUM_SPLITS, TILE)
    ids_ptr += tl.load(starts_ptr + seq)
    dims = tl.arange(0, DIMS)
    members = tl.arange(0, ROWS)
    heads = kv_head * GROUP + members
    in_rows = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query_at = query_ptr + row * query_stride + heads[:, None] * query_head_stride + dims[None, :]
    query = tl.load(query_at, mask=in_rows, other=0.0)
    peaks = tl.full([ROWS], LOWEST, tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    parts = tl.zeros([ROWS, DIMS], tl.float32)
    for tile in tl.range(first, stop, num_stages=NUM_STAGES):
        positions = tile * TILE + tl.arange(0, TILE)
        is_seen = (positions >= low) & (positions < length)
        keys = _key_rows(ids_ptr, tile, length, kv_head, num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE)
        at = cache_ptr + keys[:, None] + dims[None, :]
        key, value = _load_tile(at, dims, BLOCK_SIZE, HEAD_DIM, DIMS)
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = _capped(scores, softcap, HAS_SOFTCAP) * LOG2_E
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peaks, tl.max(scores, axis=1))
        factor = tl.exp2(peaks - higher)
        weights = tl.exp2(scores - higher[:, None])
        sums = sums * factor + tl.sum(weights, axis=1)
        parts = tl.dot(
            weights.to(value.dtype), value, parts * factor[:, None], input_precision=PRECISION
        )
        peaks = higher
    in_group = members < GROUP
    at = seq.to(tl.int64) * num_heads + heads
    if NUM_SPLITS > 1:
        at = at * NUM_SPLITS + split
        tl.store(peaks_ptr + at, peaks, mask=in_group)
        tl.store(sums_ptr + at, sums, mask=in_group)
        tl.store(parts_ptr + at[:, None] * HEAD_DIM + dims[None, :], parts, mask=in_rows)
    else:
        if HAS_SINKS:
            sinks = tl.load(sinks_ptr + heads, mask=in_group, other=0.0).to(tl.float32) * LOG2_E
            higher = tl.maximum(peaks, sinks)
            parts *= tl.exp2(peaks - higher)[:, None]
            sums = sums * tl.exp2(peaks - higher) + tl.exp2(sinks - higher)
        parts = parts / tl.where(sums > 0.0, sums, 1.0)[:, None]
        out_at = out_ptr + (row * num_heads + heads[:, None]) * HEAD_DIM + dims[None, :]
        tl.store(out_at, parts.to(out_ptr.dtype.element_ty), mask=in_rows)


@triton.jit
def merge_kernel(
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    sinks_ptr,
    rows_ptr,
    num_heads,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The parts of one head of one request to its output."""
    seq, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    dims = tl.arange(0, DIMS)
    at = (seq.to(tl.int64) * num_heads + head) * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    peaks = tl.load(peaks_ptr + at)
    sums = tl.load(sums_ptr + at)
    parts_at = parts_ptr + at[:, None] * HEAD_DIM + dims[None, :]
    parts = tl.load(parts_at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    peak = tl.max(peaks, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, sink)
    factor = tl.exp2(peaks - peak)
    total = tl.sum(sums * factor, axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    output = tl.sum(parts * factor[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    out_at = out_ptr + (row * num_heads + head) * HEAD_DIM + dims
    tl.store(out_at, output.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
