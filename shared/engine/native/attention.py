"""Paged attention by the CPU kernels: every key and value is read once, where it lies."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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

INT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """A batch as the kernels want it, and the array behind its addresses."""

    struct: BatchStruct
    address: int
    array: Tensor
    seqs: Tensor  # [num_seqs] int32: the requests that the kernels attend for
    prefills: Any  # the others, as TorchAttention wants them; None if there are none
    num_threads: int


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
        seqs: Sequence[int] = range(num_seqs)
        prefills = None
        if self._prefills_by_torch:
            decodes = [index for index in seqs if batch.query_len(index) == 1]
            if len(decodes) < num_seqs:
                seqs, prefills = decodes, self._torch.prepare(batch, with_decodes=False)
        max_blocks = max(map(len, batch.block_tables), default=0)
        numbers = [*batch.cu_seqlens_q, *batch.context_lens]
        for table in batch.block_tables:
            numbers += table
            numbers += [0] * (max_blocks - len(table))
        numbers += seqs
        # One array for all: making an array takes longer than filling it.
        array = torch.from_numpy(np.array(numbers, dtype=np.int32))
        lens = array.data_ptr() + (num_seqs + 1) * INT32_BYTES
        tables = lens + num_seqs * INT32_BYTES
        struct = BatchStruct(
            num_seqs,
            batch.positions.shape[0],
            max_blocks,
            array.data_ptr(),
            lens,
            tables,
            batch.slot_mapping.data_ptr(),
        )
        return NativeBatch(
            struct=struct,
            address=ctypes.addressof(struct),
            array=array,
            seqs=array[len(numbers) - len(seqs) :],
            prefills=prefills,
            num_threads=torch.get_num_threads(),
        )

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
