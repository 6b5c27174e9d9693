"""Paged attention: the one seam behind which both the KV cache and its reading live."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shared.engine.plain_attention import attend
from shared.kvcache.pool import KVPool


class AttentionBackend(Protocol):
    """Writes a batch's keys and values into the cache and attends to what is there."""

    def prepare(self, batch: "AttentionBatch") -> object:
        """Build once a batch what all layers need; the result is kept in ``batch.state``."""
        ...

    def forward(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        batch: "AttentionBatch",
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer.

        ``query`` is ``[num_tokens, num_heads, head_dim]``, ``key`` and ``value``
        ``[num_tokens, num_kv_heads, head_dim]``; the result has the shape of ``query``. Each token
        sees those of its own request up to itself, within the layer's sliding window. ``softcap``
        and ``sinks`` (``shared.engine.plain_attention``) are passed only for models whose
        ``ModelSpec.attention_features`` name them, and a backend may do without.
        """
        ...


@dataclass(slots=True)
class AttentionBatch:
    """The requests of one iteration, flattened: tokens of request 0, then of request 1.

    ``positions`` and ``slot_mapping`` are ``[num_tokens]`` int64 on the device: the position of
    each token in its request, and ``block_id * block_size + offset`` where its KV goes. Request
    ``i`` owns rows ``[cu_seqlens_q[i], cu_seqlens_q[i + 1])``, which are the last ones of its
    ``context_lens[i]`` tokens, and keeps its KV in ``block_tables[i]``.
    """

    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    backend: AttentionBackend
    state: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Let the backend prepare."""
        self.state = self.backend.prepare(self)

    def query_len(self, index: int) -> int:
        """Number of rows of request ``index``."""
        return self.cu_seqlens_q[index + 1] - self.cu_seqlens_q[index]


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Requests with one row each, computed together over blocks padded to the longest."""

    rows: Tensor  # [num_seqs]
    block_ids: Tensor  # [num_seqs * max_blocks]
    mask: Tensor  # [num_seqs, 1, 1, max_blocks * block_size]


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One request with several rows. ``mask`` ``None`` means plainly causal from its start on."""

    row_lo: int
    row_hi: int
    block_ids: Tensor  # [num_blocks]
    mask: Tensor | None  # [num_rows, num_blocks * block_size]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Both kinds, for one sliding window."""

    decodes: tuple[_Decodes, ...]
    prefills: tuple[_Prefill, ...]


@dataclass(frozen=True, slots=True)
class _Extras:
    """What ``scaled_dot_product_attention`` cannot do."""

    softcap: float | None
    sinks: Tensor | None

    @property
    def are_there(self) -> bool:
        return self.softcap is not None or self.sinks is not None


PLAIN = _Extras(None, None)


class TorchAttention:
    """``AttentionBackend`` in plain torch, on CPU and CUDA alike.

    Blocks are gathered into contiguous keys and values for ``scaled_dot_product_attention``.
    """

    def __init__(self, pool: KVPool, sliding_windows: Sequence[int | None]) -> None:
        self._pool = pool
        self._codec = pool.codec
        self._block_size = pool.layout.block_size
        self._windows = tuple(sliding_windows)

    def prepare(
        self, batch: AttentionBatch, *, with_decodes: bool = True
    ) -> dict[int | None, _Prepared]:
        """What depends on the batch and a window but on no layer.

        Without decodes their rows of the result are left undefined, for another backend to fill.
        """
        return {window: self._prepare(batch, window, with_decodes) for window in set(self._windows)}

    def forward(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        batch: AttentionBatch,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See ``AttentionBackend``."""
        extras = _Extras(softcap, sinks)
        return self.attend(layer, query, key, value, scaling, batch, batch.state, extras)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        batch: AttentionBatch,
        state: dict[int | None, _Prepared],
        extras: _Extras = PLAIN,
    ) -> Tensor:
        """``forward`` on what ``prepare`` made of the batch."""
        cache = self._pool.layers[layer].tensor
        blocks = batch.slot_mapping // self._block_size
        offsets = batch.slot_mapping % self._block_size
        # What is attended to is what a later chunk or a resumed request will find in the cache.
        key, value = self._codec.write(cache, blocks, offsets, key, value)
        prepared = state[self._windows[layer]]
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for decodes in prepared.decodes:
            output[decodes.rows] = self._decode(
                cache, query[decodes.rows], decodes, scaling, extras
            )
        for prefill in prepared.prefills:
            rows = slice(prefill.row_lo, prefill.row_hi)
            output[rows] = self._prefill(
                cache, query[rows], key[rows], value[rows], prefill, scaling, extras
            )
        return output

    def _decode(
        self, cache: Tensor, query: Tensor, decodes: _Decodes, scaling: float, extras: _Extras
    ) -> Tensor:
        num_seqs, num_heads, head_dim = query.shape
        num_kv_heads = cache.shape[1]
        kv = self._codec.gather(cache, decodes.block_ids, query.dtype)
        kv = kv.view(num_kv_heads, 2, num_seqs, -1, head_dim)
        keys, values = kv.unbind(1)  # [num_kv_heads, num_seqs, length, head_dim]
        # The query heads that share a KV head become the rows of one small matrix.
        grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
        if extras.are_there:
            output = attend(
                grouped.unsqueeze(3),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                mask=decodes.mask.unsqueeze(1),
                scale=scaling,
                softcap=extras.softcap,
                sinks=extras.sinks,
            )
            return output.reshape(num_seqs, num_heads, head_dim)
        output = functional.scaled_dot_product_attention(
            grouped,
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=decodes.mask,
            scale=scaling,
        )
        return output.reshape(num_seqs, num_heads, head_dim)

    def _prefill(
        self,
        cache: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefill: _Prefill,
        scaling: float,
        extras: _Extras,
    ) -> Tensor:
        if prefill.mask is None:
            keys, values = key.transpose(0, 1), value.transpose(0, 1)
        else:
            keys, values = self._codec.gather(cache, prefill.block_ids, query.dtype).unbind(1)
        if extras.are_there:
            mask = prefill.mask
            if mask is None:
                mask = torch.ones(len(key), len(key), dtype=torch.bool, device=key.device).tril()
            output = attend(
                query.transpose(0, 1).reshape(1, keys.shape[0], -1, *query.shape[::2]),
                keys.unsqueeze(0),
                values.unsqueeze(0),
                mask=mask,
                scale=scaling,
                softcap=extras.softcap,
                sinks=extras.sinks,
            )
            return output.flatten(0, 2).transpose(0, 1)
        output = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[0],
        )
        return output[0].transpose(0, 1)

    def _prepare(self, batch: AttentionBatch, window: int | None, with_decodes: bool) -> _Prepared:
        by_size: dict[int, list[int]] = {}
        prefills = []
        for index in range(len(batch.context_lens)):
            if batch.query_len(index) > 1:
                prefills.append(self._prepare_prefill(batch, index, window))
            elif with_decodes:
                # Of similar length only, so that padding at most doubles the work.
                lo, hi = self._block_range(batch, index, window)
                by_size.setdefault((hi - lo).bit_length(), []).append(index)
        decodes = [self._prepare_decodes(batch, seqs, window) for seqs in by_size.values()]
        return _Prepared(tuple(decodes), tuple(prefills))

    def _block_range(
        self, batch: AttentionBatch, index: int, window: int | None
    ) -> tuple[int, int]:
        """Blocks ``[lo, hi)`` of request ``index`` that any of its rows can see."""
        context_len = batch.context_lens[index]
        first_seen = 0
        if window is not None:
            first_seen = max(0, context_len - batch.query_len(index) + 1 - window)
        return first_seen // self._block_size, -(-context_len // self._block_size)

    def _prepare_decodes(
        self, batch: AttentionBatch, seqs: Sequence[int], window: int | None
    ) -> _Decodes:
        device = batch.positions.device
        ranges = [self._block_range(batch, index, window) for index in seqs]
        longest = max(hi - lo for lo, hi in ranges)
        ids, lows, highs = [], [], []
        for index, (lo, hi) in zip(seqs, ranges, strict=True):
            table = list(batch.block_tables[index][lo:hi])
            # Padding repeats a block of the request itself: finite numbers, masked out.
            ids += table + table[-1:] * (longest - len(table))
            end = batch.context_lens[index] - lo * self._block_size
            lows.append(0 if window is None else max(0, end - window))
            highs.append(end)
        length = torch.arange(longest * self._block_size, device=device)
        low = torch.tensor(lows, device=device)[:, None]
        high = torch.tensor(highs, device=device)[:, None]
        return _Decodes(
            rows=torch.tensor([batch.cu_seqlens_q[index] for index in seqs], device=device),
            block_ids=torch.tensor(ids, device=device),
            mask=((length >= low) & (length < high))[:, None, None, :],
        )

    def _prepare_prefill(self, batch: AttentionBatch, index: int, window: int | None) -> _Prefill:
        device = batch.positions.device
        row_lo, row_hi = batch.cu_seqlens_q[index], batch.cu_seqlens_q[index + 1]
        context_len = batch.context_lens[index]
        lo, hi = self._block_range(batch, index, window)
        block_ids = torch.tensor(list(batch.block_tables[index][lo:hi]), device=device)
        if context_len == row_hi - row_lo and (window is None or window >= context_len):
            return _Prefill(row_lo, row_hi, block_ids, None)
        seen = torch.arange(lo * self._block_size, hi * self._block_size, device=device)
        position = batch.positions[row_lo:row_hi, None]
        mask = seen <= position
        if window is not None:
            mask &= seen > position - window
        return _Prefill(row_lo, row_hi, block_ids, mask)
