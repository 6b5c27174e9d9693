"""How large a pool becomes, and what is said when it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import OutOfMemory
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.sizing import (
    PoolSize,
    available_host_bytes,
    device_memory_bytes,
    resolve_pool_size,
)

CPU = torch.device("cpu")
LAYOUT = KVLayout(layers=(LayerKV(2, 64),) * 4, block_size=64, dtype="bf16")
BLOCK_BYTES = 4 * 2 * 2 * 64 * 64 * 2
TOTAL_BYTES = device_memory_bytes(CPU)


def _resolve(*, param_bytes: int = 1000, **settings: Any) -> PoolSize:
    return resolve_pool_size(LAYOUT, CPU, param_bytes=param_bytes, **settings)


def test_the_first_size_that_is_given_counts() -> None:
    assert LAYOUT.block_bytes_all_layers == BLOCK_BYTES
    by_fraction = (TOTAL_BYTES // 4 - 1000) // BLOCK_BYTES
    assert _resolve(memory_fraction=0.25).num_blocks == by_fraction
    assert _resolve(memory_fraction=0.25, kv_cache_bytes=3 * BLOCK_BYTES + 5).num_blocks == 3
    assert _resolve(kv_cache_bytes=3 * BLOCK_BYTES, num_blocks=7).num_blocks == 7
    assert 0 < _resolve().num_blocks < TOTAL_BYTES // BLOCK_BYTES


def test_a_reserve_is_left_unallocated() -> None:
    size = _resolve(num_blocks=10, migration_reserve=0.25)
    assert (size.num_blocks, size.capacity_blocks) == (7, 10)
    assert _resolve(num_blocks=1, migration_reserve=0.9).num_blocks == 1


def test_swap_bytes_become_host_blocks() -> None:
    assert _resolve(num_blocks=1).num_swap_blocks == 0
    assert _resolve(num_blocks=1, swap_bytes=3 * BLOCK_BYTES + 1).num_swap_blocks == 3


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"kv_cache_bytes": BLOCK_BYTES - 1}, (BLOCK_BYTES, BLOCK_BYTES - 1)),
        ({"memory_fraction": 0.5, "param_bytes": TOTAL_BYTES // 2}, (TOTAL_BYTES, BLOCK_BYTES)),
        ({"num_blocks": 1 + TOTAL_BYTES // BLOCK_BYTES}, (TOTAL_BYTES, 1000)),
        ({"kv_cache_bytes": 2 * TOTAL_BYTES}, (TOTAL_BYTES, 1000)),
        ({"num_blocks": 1, "param_bytes": TOTAL_BYTES}, (TOTAL_BYTES, TOTAL_BYTES + BLOCK_BYTES)),
        ({"num_blocks": 1, "swap_bytes": 5}, (BLOCK_BYTES, 5)),
        (
            {"num_blocks": 1, "swap_bytes": TOTAL_BYTES},
            (TOTAL_BYTES, 1000 + BLOCK_BYTES),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_numbers(
    settings: dict[str, Any], numbers: tuple[int, ...]
) -> None:
    with pytest.raises(OutOfMemory) as caught:
        _resolve(**settings)
    assert all(str(number) in str(caught.value) for number in numbers)


@pytest.mark.parametrize("as_swap", [False, True])
def test_what_others_have_taken_is_refused_by_the_numbers(as_swap: bool) -> None:
    available_bytes = available_host_bytes()
    if available_bytes is None:
        pytest.skip("this system does not say what is available")
    # Less than there is in all, but more than is left by what runs here.
    num_blocks = (available_bytes + TOTAL_BYTES) // 2 // BLOCK_BYTES
    num_bytes = num_blocks * BLOCK_BYTES
    with pytest.raises(OutOfMemory, match=r"\d+ bytes of the host that are available") as caught:
        if as_swap:
            _resolve(num_blocks=1, param_bytes=0, swap_bytes=num_bytes - BLOCK_BYTES)
        else:
            _resolve(num_blocks=num_blocks, param_bytes=0)
    assert str(num_bytes - BLOCK_BYTES if as_swap else num_bytes) in str(caught.value)


def _write(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_available_is_what_the_host_or_its_container_has_left(tmp_path: Path) -> None:
    _write(tmp_path, meminfo="MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_host_bytes(meminfo, cgroup) == 4000 * 1024
    _write(cgroup, memory__max="max\n", memory__current="3000000\n")
    assert available_host_bytes(meminfo, cgroup) == 4000 * 1024
    _write(cgroup, memory__max="5000000\n")
    assert available_host_bytes(meminfo, cgroup) == 2_000_000
    # Pages of files that nobody has used for a while are as good as free.
    _write(cgroup, memory__stat="anon 1\ninactive_file 500000\nactive_file 7\n")
    assert available_host_bytes(meminfo, cgroup) == 2_500_000
    _write(cgroup, memory__current="9000000\n")
    assert available_host_bytes(meminfo, cgroup) == 0
    assert available_host_bytes(tmp_path / "nowhere", cgroup) is None
