"""What the attention kernels have to know about a batch, brought to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.engine.attention import AttentionBatch

ALIGNMENT = 4
"""Arrays begin at multiples of 16 bytes; for pointers that do not Triton compiles once more."""

MIN_WHOLE_TOKENS = 256
"""Shorter prompts are computed together by one kernel rather than each by a call of its own."""

SMALL_BATCHES = (1, 2, 4)
BATCH_STEP = 8


def padded_batch_size(num_seqs: int) -> int:
    """The number of rows that a decode of ``num_seqs`` requests is padded to: 1, 2, 4, 8, 16, …"""
    for size in SMALL_BATCHES:
        if num_seqs <= size:
            return size
    return -(-num_seqs // BATCH_STEP) * BATCH_STEP


@dataclass(frozen=True, slots=True)
class Decodes:
    """Requests with one row each; all arrays int32.

    ``rows`` ``[size]`` are the rows of the query, ``lengths`` ``[size]`` the tokens each sees (0
    for one that only pads), ``starts`` ``[size]`` where its block ids begin in ``block_ids``.
    """

    num_seqs: int
    rows: Tensor
    lengths: Tensor
    starts: Tensor
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class Prefills:
    """Requests with several rows, and the tiles of rows they are cut into; all arrays int32.

    ``[num_tiles]``: ``tile_seqs``, the request, and ``tile_starts``, its first row among the
    request's. ``[num_seqs]``: ``rows``, its first row; ``query_lengths``; ``lengths``, all its
    tokens; ``starts`` as in ``Decodes``. The first ``num_chunk_tiles`` tiles are those of requests
    that are not in ``wholes``: the rows ``[lo, hi)`` of whole prompts.
    """

    num_tiles: int
    num_chunk_tiles: int
    tile_seqs: Tensor
    tile_starts: Tensor
    rows: Tensor
    query_lengths: Tensor
    lengths: Tensor
    starts: Tensor
    block_ids: Tensor
    wholes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch on the device. ``packed`` has all arrays one after the other."""

    packed: Tensor
    decodes: Decodes | None
    prefills: Prefills | None

    @property
    def is_pure_decode(self) -> bool:
        """Whether every request has one row."""
        return self.prefills is None


def to_device(batch: AttentionBatch, device: torch.device, tile_rows: int) -> DeviceBatch:
    """Describe ``batch``; prefills are cut into tiles of ``tile_rows`` rows.

    A pure decode is padded to ``padded_batch_size``. The host does not wait for the copy.
    """
    num_seqs = len(batch.context_lens)
    decodes = [index for index in range(num_seqs) if batch.query_len(index) == 1]
    prefills = [index for index in range(num_seqs) if batch.query_len(index) != 1]
    tables = [len(table) for table in batch.block_tables]
    starts = [0, *np.cumsum(tables).tolist()]
    block_ids = np.fromiter(chain.from_iterable(batch.block_tables), np.int32, starts[-1])
    arrays = _decode_arrays(batch, decodes, starts, is_padded=not prefills)
    wholes = [
        index
        for index in prefills
        if batch.query_len(index) == batch.context_lens[index] >= MIN_WHOLE_TOKENS
    ]
    tiles, num_chunk_tiles = _tiles(batch, prefills, wholes, tile_rows)
    arrays += _prefill_arrays(batch, prefills, starts, tiles)
    packed, views = _copy_together([*arrays, block_ids], device)
    ids = views[-1]
    described = None
    if prefills:
        tile_seqs, tile_starts, rows, query_lengths, lengths, offsets = views[3:9]
        described = Prefills(
            num_tiles=len(tiles),
            num_chunk_tiles=num_chunk_tiles,
            tile_seqs=tile_seqs,
            tile_starts=tile_starts,
            rows=rows,
            query_lengths=query_lengths,
            lengths=lengths,
            starts=offsets,
            block_ids=ids,
            wholes=tuple((batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1]) for i in wholes),
        )
    return DeviceBatch(
        packed=packed,
        decodes=Decodes(len(decodes), views[0], views[1], views[2], ids) if decodes else None,
        prefills=described,
    )


def static_decodes(packed: Tensor, num_seqs: int) -> DeviceBatch:
    """A pure decode of ``num_seqs`` requests, a padded size, whose ``packed`` is filled later.

    ``packed`` int32 may be longer than it has to be.
    """
    stride = -(-num_seqs // ALIGNMENT) * ALIGNMENT
    rows, lengths, starts = (packed[index * stride :][:num_seqs] for index in range(3))
    return DeviceBatch(packed, Decodes(num_seqs, rows, lengths, starts, packed[3 * stride :]), None)


def packed_size(num_seqs: int, num_block_ids: int) -> int:
    """Numbers in ``packed`` for a pure decode of a padded size with so many block ids."""
    return 3 * -(-num_seqs // ALIGNMENT) * ALIGNMENT + num_block_ids


def _decode_arrays(
    batch: AttentionBatch, seqs: Sequence[int], starts: Sequence[int], *, is_padded: bool
) -> list[NDArray[np.int32]]:
    size = padded_batch_size(len(seqs)) if is_padded and seqs else len(seqs)
    arrays = [np.arange(size, dtype=np.int32), *np.zeros((2, size), np.int32)]
    arrays[0][: len(seqs)] = [batch.cu_seqlens_q[index] for index in seqs]
    arrays[1][: len(seqs)] = [batch.context_lens[index] for index in seqs]
    arrays[2][: len(seqs)] = [starts[index] for index in seqs]
    return arrays


def _tiles(
    batch: AttentionBatch, prefills: Sequence[int], wholes: Sequence[int], tile_rows: int
) -> tuple[list[tuple[int, int]], int]:
    """``(number among prefills, first row)`` of each tile, and how many are not of ``wholes``.

    Tiles that see the most come first: what is started last should end soon.
    """
    chunks: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for number, index in enumerate(prefills):
        rows = range(0, batch.query_len(index), tile_rows)
        (others if index in wholes else chunks).extend((number, row) for row in rows)

    def length(tile: tuple[int, int]) -> int:
        index = prefills[tile[0]]
        return batch.context_lens[index] - batch.query_len(index) + tile[1]

    chunks.sort(key=length, reverse=True)
    others.sort(key=length, reverse=True)
    return chunks + others, len(chunks)


def _prefill_arrays(
    batch: AttentionBatch,
    seqs: Sequence[int],
    starts: Sequence[int],
    tiles: Sequence[tuple[int, int]],
) -> list[NDArray[np.int32]]:
    if not seqs:
        return []
    columns = [
        [number for number, _ in tiles],
        [row for _, row in tiles],
        [batch.cu_seqlens_q[index] for index in seqs],
        [batch.query_len(index) for index in seqs],
        [batch.context_lens[index] for index in seqs],
        [starts[index] for index in seqs],
    ]
    return [np.array(column, np.int32) for column in columns]


def _copy_together(
    arrays: Sequence[NDArray[np.int32]], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """All ``arrays`` in one tensor on ``device``, and a view of it for each."""
    spans, end = [], 0
    for array in arrays:
        spans.append((end, end + array.size))
        end += -(-array.size // ALIGNMENT) * ALIGNMENT
    host = torch.empty(end, dtype=torch.int32, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for array, (lo, hi) in zip(arrays, spans, strict=True):
        flat[lo:hi] = array
    packed = host.to(device, non_blocking=True)
    return packed, [packed[lo:hi] for lo, hi in spans]
