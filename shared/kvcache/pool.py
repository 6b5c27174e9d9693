"""The bytes of KV blocks: one pool a layer, and copies of blocks in and out."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import OutOfMemory
from shared.kvcache.layout import KVLayout, LayerKV

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LayerPool:
    """KV of one layer: ``tensor`` ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``.

    Starts zeroed, for whatever is in a block must be finite: masked or not, a NaN spreads.
    """

    def __init__(
        self, shape: LayerKV, num_blocks: int, block_size: int, dtype: str, device: torch.device
    ) -> None:
        size = (num_blocks, shape.num_kv_heads, 2, block_size, shape.head_dim)
        self.shape = shape
        self.num_blocks = num_blocks
        self.tensor = _zeros(size, TORCH_DTYPES[dtype], device)

    def export_blocks(self, block_ids: Sequence[int], head_lo: int, head_hi: int) -> Tensor:
        """Copy on the device: ``[len(block_ids), num_heads, 2, block_size, head_dim]``."""
        ids = self._ids(block_ids, head_lo, head_hi)
        return self.tensor[:, head_lo:head_hi].index_select(0, ids)

    def import_blocks(
        self, block_ids: Sequence[int], head_lo: int, head_hi: int, blocks: Tensor
    ) -> None:
        """Overwrite blocks with what ``export_blocks`` gives, from any device."""
        ids = self._ids(block_ids, head_lo, head_hi)
        self.tensor[:, head_lo:head_hi].index_copy_(0, ids, blocks.to(self.tensor.device))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Overwrite whole blocks by others of this pool; all are read before any is written."""
        self.tensor[list(targets)] = self.tensor[list(sources)]

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Overwrite whole blocks by zeros."""
        self.tensor[list(block_ids)] = 0

    def _ids(self, block_ids: Sequence[int], head_lo: int, head_hi: int) -> Tensor:
        if not 0 <= head_lo <= head_hi <= self.shape.num_kv_heads:
            raise ValueError(f"heads [{head_lo}, {head_hi}) of {self.shape.num_kv_heads}")
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise ValueError(f"block ids {min(block_ids)}..{max(block_ids)} of {self.num_blocks}")
        return torch.tensor(list(block_ids), dtype=torch.int64, device=self.tensor.device)


class KVPool:
    """The KV of all layers of one engine, in ``layout``, for ``num_blocks`` block ids.

    Layers are pools of their own, so that one can be given away without the others. Owned by the
    engine's thread. Raises ``OutOfMemory`` if the device cannot hold it.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        try:
            self.layers = [
                LayerPool(layer, num_blocks, layout.block_size, layout.dtype, device)
                for layer in layout.layers
            ]
        except (torch.OutOfMemoryError, MemoryError) as exc:
            raise OutOfMemory(
                f"{num_blocks} KV blocks are {num_blocks * layout.block_bytes_all_layers} bytes, "
                f"which {device} does not have: {exc}"
            ) from exc

    def export_blocks(
        self, layer: int, block_ids: Sequence[int], head_lo: int = 0, head_hi: int | None = None
    ) -> NDArray[np.uint8]:
        """A fresh contiguous copy in host memory: one dimension, blocks in the order given.

        ``head_hi`` ``None`` means all heads. Raises ``ValueError`` for heads, layers or ids that
        do not exist.
        """
        pool = self._layer(layer)
        head_hi = pool.shape.num_kv_heads if head_hi is None else head_hi
        blocks = pool.export_blocks(block_ids, head_lo, head_hi)
        data: NDArray[np.uint8] = blocks.flatten().view(torch.uint8).cpu().numpy()
        return data

    def import_blocks(
        self,
        layer: int,
        block_ids: Sequence[int],
        head_lo: int,
        head_hi: int,
        data: bytes | memoryview | NDArray[np.uint8],
    ) -> None:
        """Write bytes made by ``export_blocks`` of a pool with the same layout.

        ``data`` is not kept. Raises ``ValueError`` if sizes or ranges do not fit.
        """
        pool = self._layer(layer)
        source = np.frombuffer(data, dtype=np.uint8)
        expected = len(block_ids) * (head_hi - head_lo) * self.layout.head_bytes(layer)
        if source.nbytes != expected:
            raise ValueError(
                f"{source.nbytes} bytes for {len(block_ids)} blocks of heads "
                f"[{head_lo}, {head_hi}) of layer {layer}, which have {expected}"
            )
        if not source.flags.writeable:
            source = source.copy()  # torch shares memory only where it could write
        _, _, *inner = pool.tensor.shape
        blocks = torch.from_numpy(source).view(pool.tensor.dtype)
        pool.import_blocks(
            block_ids, head_lo, head_hi, blocks.view(len(block_ids), head_hi - head_lo, *inner)
        )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy ``(source, target)`` blocks in all layers, one pair after the other."""
        for source, target in copies:
            for layer in self.layers:
                layer.copy_blocks([source], [target])

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks by zeros in all layers."""
        if block_ids:
            for layer in self.layers:
                layer.zero_blocks(block_ids)

    def _layer(self, layer: int) -> LayerPool:
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer {layer} of {len(self.layers)}")
        return self.layers[layer]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # Zero pages straight from the system, which takes them when they are first written; torch's
    # own zeros would touch the whole pool at once.
    num_bytes = int(np.prod(size)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(size)
