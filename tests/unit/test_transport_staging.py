"""Landing memory: reused, but never while somebody can see it."""

import numpy as np

from shared.transport.staging import StagingPool

MIB = 1 << 20


def test_memory_is_reused_only_when_nobody_refers_to_it() -> None:
    pool = StagingPool(max_idle_bytes=64 * MIB)
    first = pool.take(MIB)
    part = np.frombuffer(first, dtype=np.uint16)[100:200]
    part[:] = 7
    del first
    assert pool.idle_bytes == 0
    second = pool.take(MIB)
    second[:] = bytes(MIB)
    assert (part == 7).all()
    del part, second
    assert pool.idle_bytes == 2 * MIB
    third = pool.take(MIB)
    assert third.nbytes == MIB
    assert pool.idle_bytes == MIB


def test_a_slice_keeps_the_memory() -> None:
    pool = StagingPool(max_idle_bytes=64 * MIB)
    part = pool.take(3 * MIB)[5:6]
    assert pool.idle_bytes == 0
    del part
    assert pool.idle_bytes == 4 * MIB


def test_what_is_kept_is_bounded() -> None:
    pool = StagingPool(max_idle_bytes=5 * MIB)
    views = [pool.take(2 * MIB) for _ in range(4)]
    del views
    assert pool.idle_bytes == 4 * MIB
    large = pool.take(64 * MIB)
    del large
    assert pool.idle_bytes == 4 * MIB
    pool.clear()
    assert pool.idle_bytes == 0


def test_views_have_the_size_asked_for_and_can_be_written() -> None:
    pool = StagingPool(max_idle_bytes=MIB)
    for nbytes in (0, 1, 1000, 300_000, 256 << 10):
        view = pool.take(nbytes)
        assert view.nbytes == nbytes
        assert not view.readonly
