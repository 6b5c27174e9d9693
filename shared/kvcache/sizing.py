"""How many blocks a KV pool gets."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.errors import OutOfMemory
from shared.kvcache.layout import KVLayout

DEFAULT_FRACTION = {"cuda": 0.9, "cpu": 0.3}
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


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
    limit_bytes = _cgroup_limit_bytes(CGROUP)
    return total if limit_bytes is None else min(total, limit_bytes)


def available_host_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Memory of the host that can be had now without swapping, or what its container has left.

    Pages of files that the kernel would drop count as available. ``None`` where the system (macOS)
    does not say.
    """
    if not meminfo.is_file():
        return None
    available = _numbers(meminfo).get("MemAvailable:")
    if available is None:
        return None
    available *= 1024
    limit_bytes, current = _cgroup_limit_bytes(cgroup), cgroup / "memory.current"
    if limit_bytes is not None and current.is_file():
        stat = cgroup / "memory.stat"
        cached_bytes = _numbers(stat).get("inactive_file", 0) if stat.is_file() else 0
        used_bytes = int(current.read_text()) - cached_bytes
        available = min(available, max(0, limit_bytes - used_bytes))
    return available


def _cgroup_limit_bytes(cgroup: Path) -> int | None:
    file = cgroup / "memory.max"
    limit = file.read_text().strip() if file.is_file() else ""
    return int(limit) if limit.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line of a file of ``name number`` lines."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


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

    The weights are loaded by now. Of the pool ``migration_reserve`` is left unallocated, but for
    one block. Raises ``OutOfMemory``, naming the numbers, if it is less than one block, if all of
    it together is more than the device, or for swapping the host, has at all, or if the pool and
    the swap space are more than the host has left: their pages are taken when they are first
    written, long after the start.
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
    is_on_host = device.type == "cpu"
    num_swap_blocks = _swap_blocks(swap_bytes, block_bytes, needed_bytes if is_on_host else 0)
    _check_available(num_blocks * block_bytes if is_on_host else 0, swap_bytes)
    return PoolSize(
        num_blocks=max(1, int(num_blocks * (1.0 - migration_reserve))),
        capacity_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
    )


def _check_available(kv_bytes: int, swap_bytes: int) -> None:
    available_bytes = available_host_bytes()
    if available_bytes is not None and kv_bytes + swap_bytes > available_bytes:
        raise OutOfMemory(
            f"a KV pool of {kv_bytes} bytes and swap_bytes {swap_bytes} do not fit into the "
            f"{available_bytes} bytes of the host that are available now; others have the rest"
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
