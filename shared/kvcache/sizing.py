"""How many blocks a KV pool gets."""

import os
from pathlib import Path

import torch

from shared.errors import OutOfMemory
from shared.kvcache.layout import KVLayout

DEFAULT_FRACTION = {"cuda": 0.9, "cpu": 0.3}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device_memory_bytes(device: torch.device) -> int:
    """Memory of ``device`` as a whole; on a CPU the host's, or its container's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total


def resolve_num_blocks(
    layout: KVLayout,
    device: torch.device,
    *,
    param_bytes: int,
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
    memory_fraction: float | None = None,
) -> int:
    """Blocks of a pool beside ``param_bytes`` of weights: the first setting that is given counts.

    Raises ``OutOfMemory`` if that is less than one block, or more than the device has at all.
    """
    total_bytes = device_memory_bytes(device)
    block_bytes = layout.block_bytes_all_layers
    if num_blocks is None:
        if kv_cache_bytes is None:
            fraction = memory_fraction or DEFAULT_FRACTION[device.type]
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
    return num_blocks
