"""How many blocks a KV pool gets."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.errors import OutOfMemory
from shared.kvcache.layout import KVLayout

DEFAULT_FRACTION = {"cuda": 0.9, "cpu": 0.3}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSize:
    """Blocks of a pool at its start, and what it may grow to; blocks of the host for swapping."""

    num_blocks: int
    capacity_blocks: int
    num_swap_blocks: int = 0


def device_memory_bytes(device: torch.device) -> int:
    """Memory of ``device`` as a whole; on a CPU the host's, or its container's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total


def resolve_pool_size(
    layout: KVLayout,
    device: torch.device,
    *,
    param_bytes: int,
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
    memory_fraction: float | None = None,
    migration_reserve: float = 0.0,
    swap_bytes: int = 0,
) -> PoolSize:
    """Size of a pool beside ``param_bytes`` of weights: the first size that is given counts.

    Of that ``migration_reserve`` is left unallocated, but for one block. Raises ``OutOfMemory``,
    naming the numbers, if that is less than one block, or if all of it together is more than the
    device, or for swapping the host, has at all.
    """
    total_bytes = device_memory_bytes(device)
    block_bytes = layout.block_bytes_all_layers
    if num_blocks is None:
        if kv_cache_bytes is None:
            fraction = memory_fraction
            if fraction is None:
                fraction = DEFAULT_FRACTION[device.type]
            kv_cache_bytes = int(total_bytes * fraction) - param_bytes
            origin = f"{fraction:.2f} of {total_bytes} bytes less {param_bytes} of weights"
        else:
            origin = f"kv_cache_bytes {kv_cache_bytes}"
        num_blocks = kv_cache_bytes // block_bytes
        if num_blocks < 1:
            raise OutOfMemory(f"no KV block of {block_bytes} bytes fits into {origin} on {device}")
    needed_bytes = num_blocks * block_bytes + param_bytes
    if needed_bytes > total_bytes:
        raise OutOfMemory(
            f"{num_blocks} KV blocks of {block_bytes} bytes and {param_bytes} bytes of weights "
            f"are {needed_bytes} bytes; {device} has {total_bytes}"
        )
    return PoolSize(
        num_blocks=max(1, int(num_blocks * (1.0 - migration_reserve))),
        capacity_blocks=num_blocks,
        num_swap_blocks=_swap_blocks(
            swap_bytes, block_bytes, needed_bytes if device.type == "cpu" else 0
        ),
    )


def _swap_blocks(swap_bytes: int, block_bytes: int, host_bytes: int) -> int:
    """Host blocks in ``swap_bytes``, beside ``host_bytes`` that the host has to hold anyway."""
    if 0 < swap_bytes < block_bytes:
        raise OutOfMemory(f"no KV block of {block_bytes} bytes fits into swap_bytes {swap_bytes}")
    total_bytes = device_memory_bytes(torch.device("cpu"))
    if swap_bytes + host_bytes > total_bytes:
        raise OutOfMemory(
            f"swap_bytes {swap_bytes} and {host_bytes} bytes of weights and KV are more than the "
            f"{total_bytes} bytes of the host"
        )
    return swap_bytes // block_bytes
