"""Slabs, layers that come and go, and host memory for swapping."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import OutOfMemory
from shared.kvcache.host_pool import HostPool
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.pool import KVPool
from shared.kvcache.storage import CopiedStorage, MappedStorage, Storage, make_storage

CPU = torch.device("cpu")
LAYOUT = KVLayout(layers=(LayerKV(2, 8), LayerKV(1, 16)), block_size=4, dtype="fp32")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="mapped storage is Linux's")


def _pool(num_blocks: int = 6, capacity_blocks: int | None = None) -> KVPool:
    pool = KVPool(LAYOUT, num_blocks, CPU, capacity_blocks=capacity_blocks)
    for layer in pool.layers:
        layer.tensor.copy_(torch.arange(layer.tensor.numel()).view(layer.tensor.shape))
    return pool


def _blocks(pool: KVPool, layer: int, ids: Sequence[int]) -> bytes:
    return pool.export_blocks(layer, ids).tobytes()


@pytest.mark.parametrize(
    "storage",
    [pytest.param(MappedStorage(1 << 20), marks=ON_LINUX), CopiedStorage(CPU)],
    ids=["mapped", "copied"],
)
def test_storage_keeps_its_beginning_and_zeroes_what_is_new(storage: Storage) -> None:
    data = storage.resize(100_000)
    assert not data.any()
    data.fill_(7)
    data = storage.resize(50_001)
    assert data.shape == (50_001,)
    assert bool((data == 7).all())
    data = storage.resize(300_000)
    assert bool((data[:50_001] == 7).all())
    assert not data[50_001:].any()
    data.fill_(9)
    assert storage.resize(0).numel() == 0
    data = storage.resize(5 << 20)  # more than was reckoned with
    assert not data.any()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@ON_LINUX
def test_what_is_given_back_goes_to_the_system() -> None:
    size = 64 << 20
    storage = make_storage(CPU, size)
    storage.resize(size).fill_(1)
    full = _resident_bytes()
    storage.resize(size // 4)
    assert full - _resident_bytes() > size // 2


@ON_LINUX
def test_touching_takes_the_memory_of_all_blocks() -> None:
    layout = _pool().layout
    pool = KVPool(layout, (32 << 20) // layout.block_bytes_all_layers, CPU)
    before = _resident_bytes()
    pool.touch()
    assert _resident_bytes() - before > 0.9 * pool.allocated_bytes
    assert not any(layer.tensor.any() for layer in pool.layers)


def test_growing_and_giving_back_keep_what_is_in_the_other_blocks() -> None:
    pool = _pool(6, capacity_blocks=8)
    kept = [_blocks(pool, layer, range(4)) for layer in (0, 1)]
    version = pool.version
    pool.give_back(2)
    assert pool.version != version
    assert pool.num_blocks == 4
    assert pool.allocated_bytes == 4 * LAYOUT.block_bytes_all_layers
    with pytest.raises(ValueError, match="block ids 5"):
        pool.export_blocks(0, [5])
    pool.grow(4)
    assert [_blocks(pool, layer, range(4)) for layer in (0, 1)] == kept
    assert [tuple(layer.tensor.shape) for layer in pool.layers] == [
        (8, 2, 2, 4, 8),
        (8, 1, 2, 4, 16),
    ]
    assert not any(layer.tensor[4:].any() for layer in pool.layers)


def test_more_than_was_set_aside_is_refused_by_the_numbers() -> None:
    pool = _pool(6, capacity_blocks=7)
    block_bytes = LAYOUT.block_bytes_all_layers
    with pytest.raises(OutOfMemory, match=rf"{8 * block_bytes} bytes; {7 * block_bytes} are set"):
        pool.grow(2)
    assert pool.num_blocks == 6
    assert pool.layers[0].tensor.shape[0] == 6
    with pytest.raises(ValueError, match="6 of 6"):
        pool.give_back(6)


def test_a_layer_that_migrates_away_makes_room_for_others() -> None:
    pool = _pool(6)
    kept = _blocks(pool, 0, range(6))
    assert pool.layers[1].tensor.any()
    pool.release_layer(1)
    assert not pool.is_attached(1)
    assert pool.allocated_bytes == 6 * LAYOUT.block_bytes(0)
    assert pool.layers[1].tensor.shape == (0, 1, 2, 4, 16)
    for use in (
        lambda: pool.export_blocks(1, [0]),
        lambda: pool.import_blocks(1, [], 0, 1, b""),
        lambda: pool.release_layer(1),
    ):
        with pytest.raises(ValueError, match="layer 1 has been released"):
            use()
    pool.copy_blocks([(0, 5)])
    pool.zero_blocks([4])
    pool.grow(3)  # in the room of the released layer
    with pytest.raises(OutOfMemory):
        pool.attach_layer(1)
    assert not pool.is_attached(1)
    pool.give_back(3)
    pool.attach_layer(1)
    assert not pool.layers[1].tensor.any()
    assert _blocks(pool, 0, range(4)) == kept[: 4 * LAYOUT.block_bytes(0)]
    assert _blocks(pool, 0, [5]) == _blocks(pool, 0, [0])
    with pytest.raises(ValueError, match="is attached"):
        pool.attach_layer(1)


@pytest.mark.parametrize("copies", [[(0, 3), (1, 4)], [(0, 1), (1, 2)], [(0, 1), (2, 1)], []])
def test_copies_are_made_as_if_one_after_the_other(copies: list[tuple[int, int]]) -> None:
    pool = _pool()
    expected = [list(layer.tensor.clone()) for layer in pool.layers]
    for source, target in copies:
        for blocks in expected:
            blocks[target] = blocks[source].clone()
    pool.copy_blocks(copies)
    for layer, blocks in zip(pool.layers, expected, strict=True):
        assert torch.equal(layer.tensor, torch.stack(blocks))


def test_swapped_blocks_come_back_elsewhere_as_they_were() -> None:
    pool = _pool(8)
    host = HostPool(pool, 5)
    kept = [_blocks(pool, layer, [6, 1, 3]) for layer in (0, 1)]
    host.copy_out([(6, 4), (1, 0), (3, 1)])
    pool.zero_blocks(range(8))
    host.copy_in([(4, 0), (0, 7), (1, 2)])
    assert [_blocks(pool, layer, [0, 7, 2]) for layer in (0, 1)] == kept
    assert host.block_swap_s > 0
    assert not np.frombuffer(_blocks(pool, 0, [1, 3, 4, 5, 6]), dtype=np.uint8).any()


def test_of_a_released_layer_nothing_is_swapped() -> None:
    pool = _pool(4)
    host = HostPool(pool, 2)
    kept = _blocks(pool, 0, [2])
    pool.release_layer(1)
    host.copy_out([(2, 1)])
    host.copy_in([(1, 0)])
    assert _blocks(pool, 0, [0]) == kept
