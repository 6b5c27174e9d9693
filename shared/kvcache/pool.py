"""The bytes of KV blocks: one pool a layer, and copies of blocks in and out."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import OutOfMemory
from shared.kvcache.codec import KVCodec, make_codec, storage_dtype
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.storage import make_storage


class LayerPool:
    """KV of one layer: ``tensor`` ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``.

    With scales it is ``[num_blocks, num_kv_heads, head_bytes]`` uint8, for the codec to read.
    New blocks are zeroed, for whatever is in a block must be finite: masked or not, a NaN spreads.
    ``tensor`` is another one after ``resize``; ``capacity_blocks`` is what that is made cheap for.
    """

    def __init__(
        self,
        shape: LayerKV,
        codec: KVCodec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capacity_blocks: int,
    ) -> None:
        self.shape = shape
        self.num_blocks = 0
        self._inner = codec.block_shape(shape)
        self._dtype = dtype
        self.block_bytes = int(np.prod(self._inner)) * self._dtype.itemsize
        self._storage = make_storage(device, capacity_blocks * self.block_bytes)
        self.tensor = self._view(self._storage.resize(0))

    def resize(self, num_blocks: int) -> None:
        """Keep the first ``num_blocks`` blocks, and add zeroed ones if there are fewer.

        Raises ``torch.OutOfMemoryError`` or ``MemoryError`` and changes nothing.
        """
        self.tensor = self._view(self._storage.resize(num_blocks * self.block_bytes))
        self.num_blocks = num_blocks

    def export_blocks(self, block_ids: Sequence[int], head_lo: int, head_hi: int) -> Tensor:
        """Copy on the device: ``[len(block_ids), num_heads, 2, block_size, head_dim]``."""
        ids = self._ids(block_ids, head_lo, head_hi)
        return self.tensor[:, head_lo:head_hi].index_select(0, ids)

    def import_blocks(
        self, block_ids: Sequence[int], head_lo: int, head_hi: int, blocks: Tensor
    ) -> None:
        """Overwrite blocks with what ``export_blocks`` gives, from any device."""
        ids = self._ids(block_ids, head_lo, head_hi)
        blocks = _to_device(blocks, self.tensor.device)
        self.tensor[:, head_lo:head_hi].index_copy_(0, ids, blocks)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Overwrite whole blocks by others of this pool; all are read before any is written."""
        self.tensor[list(targets)] = self.tensor[list(sources)]

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Overwrite whole blocks by zeros."""
        self.tensor[list(block_ids)] = 0

    def _view(self, data: Tensor) -> Tensor:
        return data.view(self._dtype).view(-1, *self._inner)

    def _ids(self, block_ids: Sequence[int], head_lo: int, head_hi: int) -> Tensor:
        if not 0 <= head_lo <= head_hi <= self.shape.num_kv_heads:
            raise ValueError(f"heads [{head_lo}, {head_hi}) of {self.shape.num_kv_heads}")
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise ValueError(f"block ids {min(block_ids)}..{max(block_ids)} of {self.num_blocks}")
        return _to_device(torch.tensor(list(block_ids), dtype=torch.int64), self.tensor.device)


class KVPool:
    """The KV of all layers of one engine, in ``layout``, for ``num_blocks`` block ids.

    Layers are pools of their own, so that one can be given away without the others. All that are
    attached have the same block ids; a released one has none. Memory is given back and taken in
    slabs: the highest ids in all layers, or all ids of one layer. Together the layers never take
    more than ``capacity_bytes``, which is ``capacity_blocks`` blocks in all layers; what is not
    taken is the reserve. ``version`` changes whenever some layer's ``tensor`` does. Owned by the
    engine's thread. Raises ``OutOfMemory`` if the device cannot hold it.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        *,
        capacity_blocks: int | None = None,
    ) -> None:
        capacity_blocks = num_blocks if capacity_blocks is None else capacity_blocks
        self.layout = layout
        self.num_blocks = 0
        self.device = device
        self.capacity_bytes = capacity_blocks * layout.block_bytes_all_layers
        self.version = 0
        self.codec = make_codec(layout)
        dtype = storage_dtype(layout)
        self.layers = [
            LayerPool(layer, self.codec, dtype, device, capacity_blocks=capacity_blocks)
            for layer in layout.layers
        ]
        self._attached = set(range(layout.num_layers))
        self.grow(num_blocks)

    @property
    def allocated_bytes(self) -> int:
        """What the blocks of all attached layers take."""
        return sum(layer.num_blocks * layer.block_bytes for layer in self.layers)

    def is_attached(self, layer: int) -> bool:
        """Whether ``layer`` has its blocks here."""
        return layer in self._attached

    # -- slabs

    def grow(self, num_blocks: int) -> None:
        """Add ``num_blocks`` zeroed blocks behind the highest id, in every attached layer.

        Raises ``OutOfMemory``, naming the numbers, and changes nothing.
        """
        self._resize(self._attached, self.num_blocks + num_blocks)
        self.num_blocks += num_blocks

    def touch(self) -> None:
        """Have the system find memory for all blocks now instead of when each is first written.

        What is in them is lost.
        """
        for layer in self._attached:
            self.layers[layer].tensor.zero_()

    def give_back(self, num_blocks: int) -> None:
        """Return the memory of the ``num_blocks`` highest ids, in every attached layer."""
        if not 0 <= num_blocks < self.num_blocks:
            raise ValueError(f"{num_blocks} of {self.num_blocks} blocks cannot be given back")
        self._resize(self._attached, self.num_blocks - num_blocks)
        self.num_blocks -= num_blocks

    def release_layer(self, layer: int) -> None:
        """Return the memory of ``layer``, whose KV is somewhere else from now on."""
        self._layer(layer)
        self._resize({layer}, 0)
        self._attached.remove(layer)

    def attach_layer(self, layer: int) -> None:
        """Give ``layer``, which was released, zeroed blocks again; raises ``OutOfMemory``."""
        if not 0 <= layer < len(self.layers) or layer in self._attached:
            raise ValueError(f"layer {layer} of {len(self.layers)} is attached or does not exist")
        self._resize({layer}, self.num_blocks)
        self._attached.add(layer)

    # -- copies

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
        """Copy ``(source, target)`` blocks in all layers, as if one pair after the other."""
        sources, targets = {source for source, _ in copies}, {target for _, target in copies}
        # Where no copy reads or writes what another writes, their order does not matter.
        is_free = len(targets) == len(copies) and not sources & targets
        for batch in [copies] if is_free and copies else [[pair] for pair in copies]:
            for layer in self._attached_layers():
                layer.copy_blocks([source for source, _ in batch], [target for _, target in batch])

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks by zeros in all layers."""
        if block_ids:
            for layer in self._attached_layers():
                layer.zero_blocks(block_ids)

    def _attached_layers(self) -> list[LayerPool]:
        return [self.layers[layer] for layer in sorted(self._attached)]

    def _layer(self, layer: int) -> LayerPool:
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer {layer} of {len(self.layers)}")
        if layer not in self._attached:
            raise ValueError(f"layer {layer} has been released")
        return self.layers[layer]

    def _resize(self, layers: Iterable[int], num_blocks: int) -> None:
        """Make all of ``layers`` that size, or none."""
        pools = [self.layers[layer] for layer in layers]
        sizes = [pool.num_blocks for pool in pools]
        needed_bytes = self.allocated_bytes + sum(
            (num_blocks - size) * pool.block_bytes for pool, size in zip(pools, sizes, strict=True)
        )
        if needed_bytes > max(self.capacity_bytes, self.allocated_bytes):
            raise OutOfMemory(
                f"{num_blocks} KV blocks in {len(pools)} layers make {needed_bytes} bytes; "
                f"{self.capacity_bytes} are set aside for KV on {self.device}"
            )
        try:
            for pool in pools:
                pool.resize(num_blocks)
        except (torch.OutOfMemoryError, MemoryError) as exc:
            for pool, size in zip(pools, sizes, strict=True):
                if pool.num_blocks != size:
                    pool.resize(size)
            raise OutOfMemory(
                f"{num_blocks} KV blocks make {needed_bytes} bytes, "
                f"which {self.device} does not have: {exc}"
            ) from exc
        finally:
            self.version += 1


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, which may still be busy: the host does not wait for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
