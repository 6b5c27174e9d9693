"""Paged attention by Triton kernels, with metadata on the device and no wait for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.engine.attention import AttentionBatch
from shared.engine.cuda import attention_kernels as kernels
from shared.engine.cuda.batch import Decodes, DeviceBatch, Prefills, padded_batch_size, to_device
from shared.engine.cuda.prefill_kernel import prefill_kernel
from shared.engine.cuda.shapes import ceil_div, next_power_of_2
from shared.engine.cuda.timing import fastest
from shared.kvcache.pool import KVPool

MIN_TILE = 16
"""What a product of tiles needs at least."""
MAX_DIMS = 256
MAX_SPLITS = 64
PREFILL_WARPS = 8
WRITTEN_NUMBERS = 2048
"""Keys of so many numbers are written by one program."""

TUNED_CONTEXT_TOKENS = 1024
MIN_TUNED_BLOCKS = 64
"""A smaller pool is a test's or a probe's."""

# cuDNN's attention builds a plan for every new length of a prompt.
WHOLE_PROMPT_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """How a decode is laid out: ``programs_per_sm`` says how finely sequences are split.

    ``by_group``: one program takes all query heads of a KV head, else each a program of its own.
    """

    by_group: bool
    tile: int
    num_warps: int
    num_stages: int = 1
    programs_per_sm: int = 8


ROW_CONFIGS = (
    DecodeConfig(by_group=False, tile=32, num_warps=4),
    DecodeConfig(by_group=False, tile=16, num_warps=4),
    DecodeConfig(by_group=False, tile=16, num_warps=2, programs_per_sm=16),
    DecodeConfig(by_group=False, tile=64, num_warps=8),
)
GROUP_CONFIGS = (
    DecodeConfig(by_group=True, tile=64, num_warps=4, num_stages=2),
    DecodeConfig(by_group=True, tile=64, num_warps=4, num_stages=3, programs_per_sm=4),
    DecodeConfig(by_group=True, tile=32, num_warps=2, num_stages=3),
)
EXACT_CONFIGS = (DecodeConfig(by_group=True, tile=16, num_warps=4),)
"""fp32: products are made of single multiplications, whose tiles have to be small."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of ``forward`` is about."""

    layer: int
    query: Tensor
    cache: Tensor
    output: Tensor
    scaling: float
    window: int
    softcap: float | None
    sinks: Tensor | None

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.cache.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[2]

    @property
    def dims(self) -> int:
        return max(MIN_TILE, next_power_of_2(self.head_dim))

    @property
    def precision(self) -> str:
        """fp32 is multiplied as fp32, not as tf32; other types have one way only."""
        return "ieee" if self.query.dtype is torch.float32 else "tf32"


class CudaAttention:
    """``AttentionBackend`` on NVIDIA GPUs (and on CPU tensors in Triton's interpreter).

    Decodes read keys and values where they lie, split along the sequence where there are too few
    requests to fill the device. Prefills read them there too, but whole prompts of some length go
    through torch's flash attention. Nothing here waits for the device or depends on a value that
    is on it, so a pure decode can be captured in a graph.
    """

    def __init__(self, pool: KVPool, sliding_windows: Sequence[int | None]) -> None:
        self._pool = pool
        self._windows = tuple(window or 0 for window in sliding_windows)
        self._device = pool.device
        self._num_sms = _num_sms(pool.device)
        self._configs: dict[tuple[Any, ...], DecodeConfig] = {}
        widest = max(layer.head_dim for layer in pool.layout.layers)
        is_exact = pool.layout.dtype == "fp32"
        self._prefill_rows = 32 if is_exact else 128 if widest <= MAX_DIMS // 2 else 64
        self._prefill_tile = 16 if is_exact else 64
        self._prefill_stages = 1 if is_exact else 3 if widest <= MAX_DIMS // 2 else 2

    @staticmethod
    def supports(pool: KVPool) -> bool:
        """Whether the kernels can work on this pool."""
        layout = pool.layout
        return not layout.has_scales and all(kv.head_dim <= MAX_DIMS for kv in layout.layers)

    @property
    def pool(self) -> KVPool:
        """The pool it works on."""
        return self._pool

    def prepare(self, batch: AttentionBatch) -> DeviceBatch:
        """See ``AttentionBackend``."""
        return to_device(batch, self._device, self._prefill_rows)

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
        prepared: DeviceBatch = batch.state
        query, key, value = _dense(query), _dense(key), _dense(value)
        call = _Call(
            layer=layer,
            query=query,
            cache=self._pool.layers[layer].tensor,
            output=torch.empty(query.shape, dtype=query.dtype, device=query.device),
            scaling=scaling,
            window=self._windows[layer],
            softcap=softcap,
            sinks=sinks,
        )
        self._write(call.cache, key, value, batch.slot_mapping)
        if prepared.decodes is not None:
            self._decode(call, prepared.decodes)
        if prepared.prefills is not None:
            self._prefill(call, prepared.prefills, key, value)
        return call.output

    def _write(self, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        num_tokens, num_kv_heads, head_dim = key.shape
        dims = next_power_of_2(head_dim)
        heads = min(next_power_of_2(num_kv_heads), max(1, WRITTEN_NUMBERS // dims))
        kernels.write_kv_kernel[(num_tokens, ceil_div(num_kv_heads, heads))](
            key,
            value,
            cache,
            slots,
            key.stride(0),
            value.stride(0),
            key.stride(1),
            value.stride(1),
            num_kv_heads,
            BLOCK_SIZE=cache.shape[3],
            HEAD_DIM=head_dim,
            HEADS=heads,
            DIMS=dims,
            num_warps=4,
        )

    # -- decodes

    def _decode(self, call: _Call, decodes: Decodes) -> None:
        size = padded_batch_size(decodes.num_seqs)
        key = (call.num_heads, *call.cache.shape[1:], call.query.dtype, size)
        config = self._configs.get(key)
        if config is None:
            config = self._configs[key] = self._fastest(call, size)
        self._run_decode(call, decodes, config)

    def _fastest(self, call: _Call, size: int) -> DecodeConfig:
        """The best way for decodes of ``size`` requests, as timed here on requests made up."""
        configs: Sequence[DecodeConfig] = GROUP_CONFIGS
        if call.group_size == 1:
            configs = ROW_CONFIGS
        elif call.query.dtype is torch.float32:
            configs = EXACT_CONFIGS
        if self._pool.num_blocks < MIN_TUNED_BLOCKS or self._device.type != "cuda":
            return configs[0]
        made_up = self._made_up_decodes(size)
        query = call.query[:1].expand(size, -1, -1).contiguous()
        timed = _Call(
            call.layer,
            query,
            call.cache,
            torch.empty_like(query),
            call.scaling,
            call.window,
            call.softcap,
            call.sinks,
        )

        def run(config: DecodeConfig) -> Callable[[], None]:
            return lambda: self._run_decode(timed, made_up, config)

        return configs[fastest([run(config) for config in configs], self._device)]

    def _made_up_decodes(self, size: int) -> Decodes:
        """Requests of ``TUNED_CONTEXT_TOKENS`` tokens, in blocks all over the pool."""
        block_size = self._pool.layout.block_size
        num_blocks = min(-(-TUNED_CONTEXT_TOKENS // block_size), self._pool.num_blocks)
        seqs = torch.arange(size, dtype=torch.int32, device=self._device)
        ids = torch.arange(size * num_blocks, dtype=torch.int32, device=self._device)
        return Decodes(
            num_seqs=size,
            rows=seqs,
            lengths=torch.full_like(seqs, num_blocks * block_size),
            starts=seqs * num_blocks,
            block_ids=ids % self._pool.num_blocks,
        )

    def _num_splits(self, num_seqs: int, programs_a_seq: int, config: DecodeConfig) -> int:
        """In how many parts each request is computed; it depends on nothing but sizes."""
        wanted = self._num_sms * config.programs_per_sm
        count = wanted // (padded_batch_size(num_seqs) * programs_a_seq)
        longest = self._pool.num_blocks * self._pool.layout.block_size
        count = max(1, min(count, MAX_SPLITS, longest // config.tile))
        return 1 << (count.bit_length() - 1)

    def _run_decode(self, call: _Call, decodes: Decodes, config: DecodeConfig) -> None:
        num_seqs, num_heads, num_kv_heads = decodes.num_seqs, call.num_heads, call.cache.shape[1]
        programs = num_kv_heads if config.by_group else num_heads
        num_splits = self._num_splits(num_seqs, programs, config)
        parts, peaks = call.output, call.output  # not used
        if num_splits > 1:
            numbers = (num_seqs, num_heads, num_splits)
            parts = torch.empty((*numbers, call.head_dim), device=self._device)
            peaks = torch.empty((2, *numbers), device=self._device)
        sums = peaks[1] if num_splits > 1 else peaks
        sinks = call.query if call.sinks is None else call.sinks
        grid = (num_seqs, programs, num_splits)
        kernel: Any = kernels.decode_rows_kernel
        extra: dict[str, Any] = {"NUM_STAGES": config.num_stages}
        if config.by_group:
            kernel = kernels.decode_groups_kernel
            extra |= {
                "GROUP": call.group_size,
                "ROWS": max(MIN_TILE, next_power_of_2(call.group_size)),
                "PRECISION": call.precision,
            }
        kernel[grid](
            call.query,
            call.cache,
            call.output,
            parts,
            peaks,
            sums,
            sinks,
            decodes.rows,
            decodes.lengths,
            decodes.starts,
            decodes.block_ids,
            call.query.stride(0),
            call.query.stride(1),
            num_heads,
            num_kv_heads,
            call.scaling,
            call.window,
            call.softcap or 0.0,
            HEAD_DIM=call.head_dim,
            DIMS=call.dims,
            BLOCK_SIZE=call.cache.shape[3],
            TILE=config.tile,
            NUM_SPLITS=num_splits,
            HAS_SOFTCAP=call.softcap is not None,
            HAS_SINKS=call.sinks is not None,
            num_warps=config.num_warps,
            **extra,
        )
        if num_splits > 1:
            kernels.merge_kernel[(num_seqs, num_heads)](
                call.output,
                parts,
                peaks,
                sums,
                sinks,
                decodes.rows,
                num_heads,
                HEAD_DIM=call.head_dim,
                DIMS=call.dims,
                NUM_SPLITS=num_splits,
                HAS_SINKS=call.sinks is not None,
                num_warps=4,
            )

    # -- prefills

    def _prefill(self, call: _Call, prefills: Prefills, key: Tensor, value: Tensor) -> None:
        is_plain = call.window == 0 and call.softcap is None and call.sinks is None
        num_tiles = prefills.num_chunk_tiles if is_plain else prefills.num_tiles
        if is_plain and prefills.wholes:
            _attend_whole(call, prefills.wholes, key, value)
        if num_tiles == 0:
            return
        prefill_kernel[(num_tiles, call.num_heads)](
            call.query,
            call.cache,
            call.output,
            call.query if call.sinks is None else call.sinks,
            prefills.tile_seqs,
            prefills.tile_starts,
            prefills.rows,
            prefills.query_lengths,
            prefills.lengths,
            prefills.starts,
            prefills.block_ids,
            call.query.stride(0),
            call.query.stride(1),
            call.num_heads,
            call.cache.shape[1],
            call.scaling,
            call.window,
            call.softcap or 0.0,
            HEAD_DIM=call.head_dim,
            DIMS=call.dims,
            BLOCK_SIZE=call.cache.shape[3],
            ROWS=self._prefill_rows,
            TILE=self._prefill_tile,
            HAS_SOFTCAP=call.softcap is not None,
            HAS_SINKS=call.sinks is not None,
            PRECISION=call.precision,
            NUM_STAGES=self._prefill_stages,
            num_warps=PREFILL_WARPS,
        )


def _attend_whole(
    call: _Call, wholes: Sequence[tuple[int, int]], key: Tensor, value: Tensor
) -> None:
    """Prompts from their first token on: causal attention to nothing but themselves."""
    with sdpa_kernel(WHOLE_PROMPT_BACKENDS):
        for lo, hi in wholes:
            output = functional.scaled_dot_product_attention(
                call.query[lo:hi].transpose(0, 1).unsqueeze(0),
                key[lo:hi].transpose(0, 1).unsqueeze(0),
                value[lo:hi].transpose(0, 1).unsqueeze(0),
                is_causal=True,
                scale=call.scaling,
                enable_gqa=call.group_size > 1,
            )
            call.output[lo:hi] = output[0].transpose(0, 1)


def _dense(x: Tensor) -> Tensor:
    """``x`` with the numbers of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
