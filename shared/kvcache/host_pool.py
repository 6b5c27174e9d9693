"""Host memory for the KV of requests that are swapped out."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shared.errors import OutOfMemory
from shared.kvcache.pool import KVPool
from shared.kvcache.storage import make_storage

NUM_PROBE_BLOCKS = 8
NUM_PROBES = 3


class HostPool:
    """``num_blocks`` host blocks of all layers of ``pool``, with ids of their own.

    A block is stored as it is in ``pool``; beside a GPU the memory is pinned. Copies run on the
    current stream of the pool's device, in order with what is computed there; the host does not
    wait for them. ``block_swap_s`` is what a block takes out and in again, measured at the start.
    Raises ``OutOfMemory`` if the host cannot hold it.
    """

    def __init__(self, pool: KVPool, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._pool = pool
        try:
            self._layers = [_host_tensor(layer.tensor, num_blocks) for layer in pool.layers]
        except (RuntimeError, MemoryError) as exc:  # pinning fails with a RuntimeError
            num_bytes = num_blocks * pool.layout.block_bytes_all_layers
            raise OutOfMemory(
                f"{num_blocks} KV blocks for swapping are {num_bytes} bytes, "
                f"which the host does not have: {exc}"
            ) from exc
        self.block_swap_s = min(self._probe_s() for _ in range(NUM_PROBES))

    def copy_out(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy ``(block of the pool, host block)`` pairs; no host block may be in two of them."""
        for blocks, first, stop in _runs([(host, block) for block, host in copies]):
            for source, target in self._attached():
                ids = torch.tensor(blocks, device=source.device)
                target[first:stop].copy_(source.index_select(0, ids), non_blocking=True)

    def copy_in(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy ``(host block, block of the pool)`` pairs; no block may be in two of them."""
        for blocks, first, stop in _runs(copies):
            for target, source in self._attached():
                ids = torch.tensor(blocks, device=target.device)
                target.index_copy_(0, ids, source[first:stop].to(target.device, non_blocking=True))

    def _attached(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of the pool and of the host, for each layer that is there."""
        for index, host in enumerate(self._layers):
            if self._pool.is_attached(index):
                yield self._pool.layers[index].tensor, host

    def _probe_s(self) -> float:
        """Seconds a block takes out and in again; what is in the pool stays as it is."""
        count = min(NUM_PROBE_BLOCKS, self.num_blocks, self._pool.num_blocks)
        same = [(block, block) for block in range(count)]
        started_s = time.perf_counter()
        self.copy_out(same)
        self.copy_in(same)
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
        return (time.perf_counter() - started_s) / count


def _host_tensor(blocks: Tensor, num_blocks: int) -> Tensor:
    size = (num_blocks, *blocks.shape[1:])
    if blocks.device.type == "cuda":
        return torch.empty(size, dtype=blocks.dtype, pin_memory=True)
    num_bytes = num_blocks * blocks[:1].nbytes
    data = make_storage(blocks.device, num_bytes).resize(num_bytes)
    return data.view(blocks.dtype).view(size)


def _runs(copies: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], int, int]]:
    """``(host block, block)`` pairs joined to runs of host blocks ``[first, stop)``."""
    blocks: list[int] = []
    first = 0
    for host, block in sorted(copies):
        if blocks and host != first + len(blocks):
            yield blocks, first, first + len(blocks)
            blocks = []
        if not blocks:
            first = host
        blocks.append(block)
    if blocks:
        yield blocks, first, first + len(blocks)
