"""Paged attention by the CPU kernels: every key and value is read once, where it lies."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.engine.attention import AttentionBatch, TorchAttention
from shared.engine.native.library import (
    DTYPE_CODES,
    AttentionStruct,
    BatchStruct,
    NativeLibrary,
    Operation,
)
from shared.kvcache.pool import KVPool


class NativeBatch(NamedTuple):
    """A batch as the kernels want it; of its backend's batches only the newest is valid."""

    address: int  # of a BatchStruct
    seqs: Tensor  # [num_seqs] int32: the requests that the kernels attend for
    prefills: Any  # the others, as TorchAttention wants them; None if there are none
    num_threads: int


class _BatchMemory:
    """Where the kernels read a batch. Of one and the next, only what differs is written.

    From decode to decode that is little: a table changes once in a block of tokens.
    """

    def __init__(self, max_seqs: int, max_blocks: int) -> None:
        self.max_seqs = max_seqs
        self.max_blocks = max_blocks
        self._cu_seqlens_q = (ctypes.c_int32 * (max_seqs + 1))()
        self._context_lens = (ctypes.c_int32 * max_seqs)()
        self._block_tables = (ctypes.c_int32 * (max_seqs * max_blocks))()
        self._all_seqs = torch.arange(max_seqs, dtype=torch.int32)
        self._seqs = self._all_seqs
        self._written_cu_seqlens_q: Sequence[int] = ()
        self._written_tables: list[list[int]] = [[] for _ in range(max_seqs)]
        self._struct = BatchStruct(
            max_blocks=max_blocks,
            cu_seqlens_q=ctypes.addressof(self._cu_seqlens_q),
            context_lens=ctypes.addressof(self._context_lens),
            block_tables=ctypes.addressof(self._block_tables),
        )
        self.address = ctypes.addressof(self._struct)

    def write(self, batch: AttentionBatch) -> Tensor:
        """Take over ``batch``, which must fit; the indices of its requests."""
        num_seqs = len(batch.context_lens)
        self._struct.num_seqs = num_seqs
        self._struct.num_tokens = batch.cu_seqlens_q[-1]
        self._struct.slot_mapping = batch.slot_mapping.data_ptr()
        self._context_lens[:num_seqs] = list(batch.context_lens)
        if batch.cu_seqlens_q != self._written_cu_seqlens_q:
            self._cu_seqlens_q[: num_seqs + 1] = list(batch.cu_seqlens_q)
            self._written_cu_seqlens_q = batch.cu_seqlens_q
            self._seqs = self._all_seqs[:num_seqs]
        start = 0
        for table, written in zip(batch.block_tables, self._written_tables, strict=False):
            if table != written:
                written[:] = table
                self._block_tables[start : start + len(table)] = list(written)
            start += self.max_blocks
        return self._seqs


class NativeAttention:
    """``AttentionBackend`` on the CPU.

    Decodes run in the kernels, which read keys and values in place. So do prefills of fp32
    activations; those of bf16 are torch's, whose kernels use the CPU's matrix instructions.
    """

    def __init__(
        self,
        library: NativeLibrary,
        pool: KVPool,
        sliding_windows: Sequence[int | None],
        activation_dtype: torch.dtype,
    ) -> None:
        self.library = library
        self.pool = pool
        self._prefills_by_torch = activation_dtype is torch.bfloat16
        self._windows = tuple(sliding_windows)
        self._torch = TorchAttention(pool, sliding_windows)
        self._shapes: dict[tuple[int, int, torch.dtype, float], AttentionStruct] = {}
        self._memory = _BatchMemory(max_seqs=16, max_blocks=16)

    @staticmethod
    def supports(library: NativeLibrary, pool: KVPool) -> bool:
        """Whether the kernels can work on this pool."""
        layout = pool.layout
        return (
            pool.device.type == "cpu"
            and layout.dtype in ("bf16", "fp32")
            and layout.block_size % library.panel_width == 0
            and all(layer.head_dim % library.vector_width == 0 for layer in layout.layers)
        )

    def prepare(self, batch: AttentionBatch) -> NativeBatch:
        """See ``AttentionBackend``."""
        num_seqs = len(batch.context_lens)
        memory = self._memory_for(num_seqs, max(map(len, batch.block_tables), default=0))
        seqs, prefills = memory.write(batch), None
        if self._prefills_by_torch:
            decodes = [index for index in range(num_seqs) if batch.query_len(index) == 1]
            if len(decodes) < num_seqs:
                seqs = torch.tensor(decodes, dtype=torch.int32)
                prefills = self._torch.prepare(batch, with_decodes=False)
        return NativeBatch(memory.address, seqs, prefills, torch.get_num_threads())

    def _memory_for(self, num_seqs: int, num_blocks: int) -> _BatchMemory:
        memory = self._memory
        if num_seqs > memory.max_seqs or num_blocks > memory.max_blocks:
            # Twice of what there was, so that a batch that grows token by token is rarely copied.
            memory = self._memory = _BatchMemory(
                max(num_seqs, 2 * memory.max_seqs), max(num_blocks, 2 * memory.max_blocks)
            )
        return memory

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
        prepared: NativeBatch = batch.state
        query, key, value = _packed_heads(query), _packed_heads(key), _packed_heads(value)
        num_tokens, num_heads, head_dim = query.shape
        if value.stride(0) != key.stride(0):
            value = value.contiguous()
            key = key.contiguous()
        if prepared.prefills is None:
            output = self.library.empty(num_tokens, num_heads, head_dim, dtype=query.dtype)
        else:
            output = self._torch.attend(layer, query, key, value, scaling, batch, prepared.prefills)
        shape = self._shape(layer, num_heads, query.dtype, scaling)
        self.library.call(
            Operation.ATTENTION,
            ctypes.addressof(shape),
            prepared.address,
            prepared.seqs.data_ptr(),
            prepared.seqs.shape[0],
            self.pool.layers[layer].tensor.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            value.data_ptr(),
            key.stride(0),
            output.data_ptr(),
            output.stride(0),
            prepared.num_threads,
        )
        return output

    def _shape(
        self, layer: int, num_heads: int, dtype: torch.dtype, scaling: float
    ) -> AttentionStruct:
        key = (layer, num_heads, dtype, scaling)
        shape = self._shapes.get(key)
        if shape is None:
            kv = self.pool.layout.layers[layer]
            shape = self._shapes[key] = AttentionStruct(
                num_heads,
                kv.num_kv_heads,
                kv.head_dim,
                self.pool.layout.block_size,
                self._windows[layer] or 0,
                DTYPE_CODES[self.pool.layers[layer].tensor.dtype],
                DTYPE_CODES[dtype],
                scaling,
            )
        return shape


def _packed_heads(x: Tensor) -> Tensor:
    """``x`` ``[num_tokens, num_heads, head_dim]`` with the heads of a token side by side."""
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
