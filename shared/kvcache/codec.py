"""How keys and values are kept in a block: as they are, or in eight bits with scales.

In eight bits every token has, for each head, one scale for its key and one for its value. A block
of one head is ``2 * block_size * head_dim`` bytes of numbers (key or value, token, dimension)
followed by ``2 * block_size`` bf16 scales (key or value, token), so whoever copies heads of blocks
copies their scales too. One scale for a whole block would save three percent, but it would grow as
tokens come, and what a token reads would depend on how its prompt was cut into chunks. This way the
stored form of a token depends on that token only: prefilled in one piece or in many, moved, cached
or computed again, it is the same.
"""

from typing import Protocol

import torch
from torch import Tensor

from shared.kvcache.layout import KVLayout, LayerKV

PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE_DTYPE = torch.bfloat16


class KVCodec(Protocol):
    """Writes tokens into the cache of a layer and reads blocks of it."""

    def block_shape(self, layer: LayerKV) -> tuple[int, ...]:
        """Shape of one block of all heads as it is stored, heads first."""
        ...

    def write(
        self, cache: Tensor, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put tokens into ``cache`` ``[num_blocks, *block_shape]``; what reading gives of them.

        Token ``i`` goes to place ``offsets[i]`` of block ``blocks[i]``. ``key`` and ``value`` are
        ``[num_tokens, num_kv_heads, head_dim]``, and so is what is returned.
        """
        ...

    def gather(self, cache: Tensor, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy of blocks as ``[num_kv_heads, 2, len(block_ids) * block_size, head_dim]``.

        The numbers are of type ``dtype``.
        """
        ...


def make_codec(layout: KVLayout) -> KVCodec:
    """The codec for ``layout.dtype``."""
    eight_bits = EIGHT_BITS.get(layout.dtype)
    return PlainCodec(layout.block_size) if eight_bits is None else ScaledCodec(layout, eight_bits)


def storage_dtype(layout: KVLayout) -> torch.dtype:
    """The type of the numbers in a pool's tensors; bytes where a block has numbers and scales."""
    return PLAIN_DTYPES.get(layout.dtype, torch.uint8)


class PlainCodec:
    """``KVCodec`` that keeps numbers as they are: ``[num_kv_heads, 2, block_size, head_dim]``.

    Where activations are of a wider type than the cache, they are rounded to it.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def block_shape(self, layer: LayerKV) -> tuple[int, ...]:
        """See ``KVCodec``."""
        return (layer.num_kv_heads, 2, self._block_size, layer.head_dim)

    def write(
        self, cache: Tensor, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``KVCodec``."""
        stored_key, stored_value = key.to(cache.dtype), value.to(cache.dtype)
        cache[blocks, :, 0, offsets] = stored_key
        cache[blocks, :, 1, offsets] = stored_value
        return stored_key.to(key.dtype), stored_value.to(value.dtype)

    def gather(self, cache: Tensor, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``KVCodec``."""
        return cache.permute(1, 2, 0, 3, 4).index_select(2, block_ids).flatten(2, 3).to(dtype)


class EightBits(Protocol):
    """Numbers of eight bits, in bytes given as int8, which torch can copy about."""

    largest: float
    """The absolutely largest number there is."""
    factor: float
    """What ``decode`` gives is to be multiplied by."""

    def encode(self, scaled: Tensor) -> Tensor:
        """Round numbers in about ``[-largest, largest]``."""
        ...

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """A fresh tensor of the numbers, over ``factor``."""
        ...


class Int8:
    """Whole numbers."""

    largest = 127.0
    factor = 1.0

    def encode(self, scaled: Tensor) -> Tensor:
        """See ``EightBits``."""
        return scaled.round().clamp(-self.largest, self.largest).to(torch.int8)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``EightBits``."""
        return stored.to(dtype)


class Fp8:
    """e4m3: a sign, four bits of exponent, three of mantissa (Micikevicius et al., 2022)."""

    largest = 448.0
    factor = 256.0

    def encode(self, scaled: Tensor) -> Tensor:
        """See ``EightBits``."""
        clamped = scaled.clamp(-self.largest, self.largest)
        return clamped.to(torch.float8_e4m3fn).view(torch.int8)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``EightBits``.

        The bits moved to their places in fp16, whose exponents are 8 more: many times faster on a
        CPU than torch's conversion, and exact.
        """
        spread = stored.to(torch.int16).bitwise_left_shift_(7)
        return spread.bitwise_and_(~0x4000).view(torch.float16).to(dtype)


EIGHT_BITS: dict[str, EightBits] = {"int8": Int8(), "fp8": Fp8()}


class ScaledCodec:
    """``KVCodec`` of eight bits a number: ``[num_kv_heads, head_bytes]`` bytes.

    Symmetric, absolute maximum over the head's dimensions, as in LLM.int8() (Dettmers et al.,
    NeurIPS 2022, section 2.1, row-wise). A number that is not finite makes its whole head not
    finite when it is read, so a failed computation stays visible.
    """

    def __init__(self, layout: KVLayout, eight_bits: EightBits) -> None:
        self._block_size = layout.block_size
        self._eight_bits = eight_bits

    def block_shape(self, layer: LayerKV) -> tuple[int, ...]:
        """See ``KVCodec``."""
        num_tokens = 2 * self._block_size
        return (layer.num_kv_heads, num_tokens * (layer.head_dim + SCALE_DTYPE.itemsize))

    def write(
        self, cache: Tensor, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``KVCodec``."""
        numbers, scales = self._views(cache)
        read_back = []
        for part, source in enumerate((key, value)):
            encoded, scale = self._encode(source)
            numbers[blocks, :, part, offsets] = encoded
            scales[blocks, :, part, offsets] = scale
            read_back.append(self._decode(encoded, scale, source.dtype))
        return read_back[0], read_back[1]

    def gather(self, cache: Tensor, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``KVCodec``."""
        numbers, scales = self._views(cache)
        taken = numbers.permute(1, 2, 0, 3, 4).index_select(2, block_ids).flatten(2, 3)
        scale = scales.permute(1, 2, 0, 3).index_select(2, block_ids).flatten(2, 3)
        return self._decode(taken, scale, dtype)

    def _views(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers ``[…, 2, block_size, head_dim]`` and scales ``[…, 2, block_size]`` in place."""
        head_dim = cache.shape[-1] // (2 * self._block_size) - SCALE_DTYPE.itemsize
        num_numbers = 2 * self._block_size * head_dim
        numbers = cache[..., :num_numbers].view(torch.int8)
        scales = cache[..., num_numbers:].view(SCALE_DTYPE)
        each = (*cache.shape[:-1], 2, self._block_size)
        return numbers.view(*each, head_dim), scales.view(each)

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers like ``source`` ``[…, head_dim]`` and scales ``[…]``."""
        source = source.float()
        scale = (source.abs().amax(-1) / self._eight_bits.largest).to(SCALE_DTYPE)
        divisor = scale.float().unsqueeze(-1)
        scaled = torch.where(divisor == 0, 0.0, source / divisor)
        # What is not finite is in the scale; as a number it would have no defined bits.
        return self._eight_bits.encode(scaled.nan_to_num(0.0, 0.0, 0.0)), scale

    def _decode(self, numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        # Fresh memory of this size costs more than the multiplication: it is done in place.
        scale = (scale * self._eight_bits.factor).to(dtype).unsqueeze(-1)
        return self._eight_bits.decode(numbers, dtype).mul_(scale)
