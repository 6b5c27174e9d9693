"""How KV is laid out in blocks: pure arithmetic on shapes and bytes."""

from dataclasses import dataclass

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8": 1}
SCALE_BYTES = {"int8": 2, "fp8": 2}
"""Of a token's key or value in one head, where numbers are stored with scales."""


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Shape of one layer's keys and values; layers of one model may differ.

    Both have ``head_dim`` numbers: values narrower than the keys (multi-head latent attention) are
    stored with zeros behind them.
    """

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """Layout of a KV pool: per layer ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``.

    A block is head-major (head, then key or value, then token, then dimension), so the bytes of
    a range of heads of one block are contiguous. Blocks of several ids are exported one after the
    other in the order asked for. ``dtype`` is ``bf16``, ``fp16`` or ``fp32``, or with scales, which
    lie behind the numbers of each head of a block (``shared.kvcache.codec``), ``int8`` or ``fp8``.
    All ranges are half-open.
    """

    layers: tuple[LayerKV, ...]
    block_size: int = 64
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        """Refuse layouts that name no bytes."""
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is none of {sorted(DTYPE_BYTES)}")
        if self.block_size < 1 or not self.layers:
            raise ValueError(f"block_size {self.block_size}, {len(self.layers)} layers")

    @property
    def name(self) -> str:
        """The layout as a string; two engines with equal names can exchange KV bytes.

        Example: ``bf16-b64-8x3x64`` is blocks of 64 tokens and 8 layers of 3 heads of 64.
        """
        runs: list[tuple[LayerKV, int]] = []
        for layer in self.layers:
            if runs and runs[-1][0] == layer:
                runs[-1] = (layer, runs[-1][1] + 1)
            else:
                runs.append((layer, 1))
        shapes = "+".join(f"{n}x{kv.num_kv_heads}x{kv.head_dim}" for kv, n in runs)
        return f"{self.dtype}-b{self.block_size}-{shapes}"

    @property
    def num_layers(self) -> int:
        """Number of layers that keep KV."""
        return len(self.layers)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def has_scales(self) -> bool:
        """Whether blocks have scales, and are read by a codec instead of as plain tensors."""
        return self.dtype in SCALE_BYTES

    def head_bytes(self, layer: int) -> int:
        """Bytes of one KV head of one block of ``layer`` (keys and values)."""
        token_bytes = self.layers[layer].head_dim * self.itemsize + SCALE_BYTES.get(self.dtype, 0)
        return 2 * self.block_size * token_bytes

    def block_bytes(self, layer: int) -> int:
        """Bytes of one block of ``layer``, all heads."""
        return self.layers[layer].num_kv_heads * self.head_bytes(layer)

    @property
    def block_bytes_all_layers(self) -> int:
        """Bytes one block id stands for over all layers."""
        return sum(self.block_bytes(layer) for layer in range(self.num_layers))

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.block_bytes_all_layers // self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)
