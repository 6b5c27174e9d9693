import random
from collections.abc import Hashable

import pytest

from shared.core.block_manager import BlockManager
from shared.errors import LifecycleError, OutOfBlocks


def _manager(num_blocks: int = 8) -> BlockManager:
    return BlockManager(num_blocks, block_size=4)


def test_blocks_have_one_owner_and_come_back_once() -> None:
    blocks = _manager()
    blocks.create("a")
    blocks.create("b")
    blocks.allocate("a", 3)
    blocks.allocate("b", 2)
    assert not set(blocks.block_table("a")) & set(blocks.block_table("b"))
    assert blocks.num_free_blocks == 3
    blocks.free("a")
    assert blocks.num_free_blocks == 6
    with pytest.raises(LifecycleError, match="freed already"):
        blocks.free("a")
    assert blocks.num_free_blocks == 6
    blocks.check_integrity()


def test_allocation_is_all_or_nothing() -> None:
    blocks = _manager()
    blocks.create("a")
    with pytest.raises(OutOfBlocks) as caught:
        blocks.allocate("a", 9)
    assert (caught.value.needed, caught.value.free) == (9, 8)
    assert blocks.block_table("a") == []
    assert blocks.num_free_blocks == 8


def test_a_freed_prefix_is_found_again_and_its_tail_is_evicted_first() -> None:
    blocks = _manager(num_blocks=4)
    blocks.create("a")
    table = list(blocks.allocate("a", 3))
    for index, key in enumerate((b"k0", b"k1", b"k2")):
        blocks.register("a", index, key)
    blocks.free("a")
    assert (blocks.num_free_blocks, blocks.num_cached_blocks) == (4, 3)
    assert blocks.count_cached([b"k0", b"k1", b"x"]) == (2, 2)

    blocks.create("b")
    blocks.allocate("b", 2)  # the free one and one cached: the end of the prefix
    assert blocks.count_cached([b"k0", b"k1", b"k2"]) == (2, 2)
    blocks.create("c")
    assert blocks.adopt("c", [b"k0", b"k1", b"k2"]) == 2
    assert blocks.block_table("c") == table[:2]
    blocks.check_integrity()


def test_a_cached_block_in_use_is_not_evicted() -> None:
    blocks = _manager(num_blocks=2)
    blocks.create("a")
    blocks.allocate("a", 1)
    blocks.register("a", 0, b"k")
    blocks.create("b")
    assert blocks.adopt("b", [b"k"]) == 1
    blocks.free("a")
    blocks.allocate("b", 1)
    with pytest.raises(OutOfBlocks):
        blocks.allocate("b", 1)
    assert blocks.count_cached([b"k"]) == (1, 0)


def test_a_key_names_the_first_block_registered_under_it() -> None:
    blocks = _manager()
    for owner in ("a", "b"):
        blocks.create(owner)
        blocks.allocate(owner, 1)
        blocks.register(owner, 0, b"same")
    first = blocks.block_table("a")[0]
    blocks.free("b")
    assert blocks.num_cached_blocks == 0  # b's copy was a duplicate
    blocks.free("a")
    blocks.create("c")
    blocks.adopt("c", [b"same"])
    assert blocks.block_table("c") == [first]


def test_writing_to_a_shared_block_copies_it() -> None:
    blocks = _manager()
    blocks.create("a")
    blocks.allocate("a", 2)
    before = list(blocks.block_table("a"))
    blocks.fork("a", "child", 2)
    assert blocks.is_shared("a", 1)
    copied = blocks.make_writable("child", 1)
    assert copied == (before[1], blocks.block_table("child")[1])
    assert blocks.block_table("a") == before
    assert blocks.make_writable("a", 1) is None
    blocks.free("a")
    blocks.free("child")
    assert blocks.num_free_blocks == 8
    blocks.check_integrity()


def test_a_registered_block_that_will_be_written_is_no_longer_found() -> None:
    blocks = _manager()
    blocks.create("a")
    blocks.allocate("a", 1)
    blocks.register("a", 0, b"k")
    assert blocks.make_writable("a", 0) is None
    assert blocks.count_cached([b"k"]) == (0, 0)


def test_discarded_content_is_forgotten_unless_somebody_else_relies_on_it() -> None:
    blocks = _manager()
    blocks.create("a")
    blocks.allocate("a", 2)
    blocks.register("a", 0, b"k0")
    blocks.register("a", 1, b"k1")
    blocks.create("b")
    blocks.adopt("b", [b"k0"])
    own = blocks.block_table("a")[1]
    assert blocks.free("a", discard=True) == [own]
    assert blocks.count_cached([b"k0"]) == (1, 0)
    assert blocks.count_cached([b"k1"]) == (0, 0)
    blocks.check_integrity()


def test_truncating_gives_back_the_end() -> None:
    blocks = _manager()
    blocks.create("a")
    table = list(blocks.allocate("a", 3))
    blocks.truncate("a", 1)
    assert blocks.block_table("a") == table[:1]
    assert blocks.num_free_blocks == 7


def test_given_up_blocks_move_to_lower_ids_with_their_keys_and_owners() -> None:
    blocks = _manager(num_blocks=8)
    blocks.create("low")
    blocks.allocate("low", 3)
    blocks.create("a")
    table = list(blocks.allocate("a", 3))
    blocks.register("a", 0, b"k")
    blocks.fork("a", "child", 2)
    blocks.free("low")
    moves = blocks.shrink(3)
    assert blocks.num_blocks == 5
    assert [source for source, _ in moves] == [block for block in table if block >= 5]
    moved = [dict(moves).get(block, block) for block in table]
    assert list(blocks.block_table("a")) == moved
    assert list(blocks.block_table("child")) == moved[:2]
    assert blocks.num_free_blocks == 2
    blocks.check_integrity()
    blocks.create("b")
    assert blocks.adopt("b", [b"k"]) == 1
    assert blocks.block_table("b") == moved[:1]
    blocks.grow(3)
    assert (blocks.num_blocks, blocks.num_free_blocks) == (8, 5)
    blocks.check_integrity()


def test_only_what_is_free_is_given_up() -> None:
    blocks = _manager(num_blocks=4)
    blocks.create("a")
    blocks.allocate("a", 2)
    with pytest.raises(OutOfBlocks) as caught:
        blocks.shrink(3)
    assert (caught.value.needed, caught.value.free) == (3, 2)
    with pytest.raises(ValueError, match="4 of 4"):
        blocks.shrink(4)
    assert blocks.num_blocks == 4
    blocks.check_integrity()


def test_cached_content_makes_way_for_what_somebody_owns() -> None:
    blocks = _manager(num_blocks=4)
    blocks.create("a")
    blocks.allocate("a", 2)
    blocks.register("a", 0, b"k0")
    blocks.register("a", 1, b"k1")
    blocks.free("a")
    blocks.create("b")
    blocks.allocate("b", 2)
    assert blocks.shrink(2) == [(2, 1), (3, 0)]
    assert blocks.count_cached([b"k0"]) == (0, 0)
    blocks.check_integrity()


def test_ten_thousand_random_operations_keep_every_invariant() -> None:
    rng = random.Random(7)
    blocks = BlockManager(12, block_size=4)
    owners: list[Hashable] = []
    keys = [bytes([i]) for i in range(40)]
    names = iter(range(100_000))

    def resize() -> None:
        if blocks.num_blocks < 12:
            blocks.grow(12 - blocks.num_blocks)
            return
        count = rng.randint(1, 4)
        tables = {owner: list(blocks.block_table(owner)) for owner in owners}
        moves = dict(blocks.shrink(count))
        assert all(source >= blocks.num_blocks > target for source, target in moves.items())
        for owner, table in tables.items():
            assert list(blocks.block_table(owner)) == [moves.get(b, b) for b in table]

    def operate() -> None:
        choice = rng.randrange(10)
        if choice == 9:
            resize()
            return
        if choice <= 1 or not owners:
            newcomer = next(names)
            blocks.create(newcomer)
            owners.append(newcomer)
            blocks.adopt(newcomer, rng.sample(keys, 3))
            return
        owner = rng.choice(owners)
        size = len(blocks.block_table(owner))
        if choice == 2:
            blocks.allocate(owner, rng.randrange(5))
        elif choice == 3 and size:
            blocks.register(owner, rng.randrange(size), rng.choice(keys))
        elif choice == 4 and size:
            index = rng.randrange(size)
            blocks.make_writable(owner, index)
            assert not blocks.is_shared(owner, index)
        elif choice == 5:
            child = next(names)
            blocks.fork(owner, child, rng.randint(0, size))
            owners.append(child)
        elif choice == 6:
            blocks.truncate(owner, rng.randint(0, size))
        else:
            owners.remove(owner)
            blocks.free(owner, discard=rng.random() < 0.2)
            with pytest.raises(LifecycleError):
                blocks.free(owner)

    num_refused = 0
    for _ in range(10_000):
        free_before = blocks.num_free_blocks
        try:
            operate()
        except OutOfBlocks:
            num_refused += 1
            assert blocks.num_free_blocks == free_before
        blocks.check_integrity()
    assert 100 < num_refused < 5_000  # the pool was full at times, and was not always
    for owner in owners:
        blocks.free(owner)
    blocks.check_integrity()
    assert blocks.num_free_blocks == blocks.num_blocks
