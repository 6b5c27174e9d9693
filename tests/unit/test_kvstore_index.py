from collections import OrderedDict

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.kvstore.index import BlockId, BlockIndex, Pin, block_ids


def chain(*names: str) -> tuple[BlockId, ...]:
    return block_ids("bf16", [name.encode() for name in names])


def fill(index: BlockIndex, blocks: tuple[BlockId, ...], nbytes: int = 10) -> None:
    """Put a whole chain, with room for it or by evicting."""
    for position in index.admit(blocks, nbytes, 0.0).wanted:
        index.commit(blocks[position])
    index.touch(blocks)


def test_a_block_counts_as_there_only_when_it_is_committed() -> None:
    index = BlockIndex(100)
    blocks = chain("a", "b", "c")
    assert index.admit(blocks, 10, 0.0).wanted == (0, 1, 2)
    assert index.longest_prefix(blocks) == 0
    assert (index.used_bytes, index.arriving_bytes) == (0, 30)
    index.commit(blocks[0])
    index.commit(blocks[2])
    assert index.longest_prefix(blocks) == 1, "there is a gap at b"
    index.commit(blocks[1])
    assert index.longest_prefix(blocks) == 3
    assert (index.used_bytes, index.arriving_bytes, len(index)) == (30, 0, 3)


def test_only_what_is_neither_here_nor_on_its_way_is_wanted() -> None:
    index = BlockIndex(100)
    fill(index, chain("a"))
    assert index.admit(chain("a", "b"), 10, 0.0).wanted == (1,)
    assert index.admit(chain("a", "b", "c"), 10, 0.0).wanted == (2,)
    assert index.admit(chain("d", "d"), 10, 0.0).wanted == (0,)


def test_blocks_of_another_layout_are_other_blocks() -> None:
    index = BlockIndex(100)
    fill(index, chain("a"))
    assert index.longest_prefix(block_ids("fp32", [b"a"])) == 0


def test_what_was_abandoned_leaves_its_room_and_can_be_offered_again() -> None:
    index = BlockIndex(10)
    (block,) = chain("a")
    assert index.admit((block,), 10, 0.0).wanted == (0,)
    assert index.admit(chain("b"), 10, 0.0).wanted == (), "the room is taken"
    index.abandon(block)
    assert index.admit((block,), 10, 0.0).wanted == (0,)


def test_the_least_recently_used_goes_first() -> None:
    index = BlockIndex(30)
    for name in "abc":
        fill(index, chain(name))
    index.touch(chain("a"))
    admission = index.admit(chain("d", "e"), 10, 0.0)
    assert admission.wanted == (0, 1)
    assert admission.evicted == chain("b", "c")
    assert chain("a")[0] in index


def test_a_chain_is_given_up_from_its_end() -> None:
    index = BlockIndex(30)
    fill(index, chain("a", "b", "c"))
    assert index.admit(chain("x"), 10, 0.0).evicted == chain("c")
    assert index.longest_prefix(chain("a", "b", "c")) == 2


def test_no_block_of_an_offer_is_evicted_for_the_rest_of_it() -> None:
    index = BlockIndex(30)
    fill(index, chain("a", "b"))
    fill(index, chain("z"))
    admission = index.admit(chain("a", "b", "c", "d"), 10, 0.0)
    assert admission.evicted == chain("z")
    assert admission.wanted == (2,), "d does not fit"


def test_an_offer_larger_than_the_store_is_taken_from_its_start() -> None:
    index = BlockIndex(25)
    assert index.admit(chain("a", "b", "c"), 10, 0.0).wanted == (0, 1)
    assert index.admit(chain("q"), 26, 0.0).wanted == ()


def test_pinned_blocks_stay_until_released() -> None:
    index = BlockIndex(10)
    fill(index, chain("a"))
    pin = index.pin(chain("a"), now_s=0.0, ttl_s=5.0)
    assert index.admit(chain("b"), 10, 1.0).wanted == ()
    assert chain("a")[0] in index
    index.release(pin)
    index.release(pin)
    assert index.admit(chain("b"), 10, 1.0).wanted == (0,)


def test_pins_end_by_themselves() -> None:
    index = BlockIndex(10)
    fill(index, chain("a"))
    pin = index.pin(chain("a"), now_s=0.0, ttl_s=5.0)
    assert index.admit(chain("b"), 10, 4.9).wanted == ()
    assert index.admit(chain("b"), 10, 5.0).wanted == (0,)
    index.release(pin)
    index.check_integrity()


def test_the_pin_of_a_removed_block_does_not_hold_the_one_put_after_it() -> None:
    index = BlockIndex(10)
    fill(index, chain("a"))
    pin = index.pin(chain("a"), now_s=0.0, ttl_s=5.0)
    assert index.remove(chain("a")[0])
    assert not index.remove(chain("a")[0])
    fill(index, chain("a"))
    assert index.admit(chain("b"), 10, 1.0).wanted == (0,)
    index.release(pin)
    index.check_integrity()


def test_pinning_what_is_not_there_pins_nothing() -> None:
    index = BlockIndex(10)
    fill(index, chain("a"))
    with pytest.raises(KeyError):
        index.pin(chain("a", "b"), now_s=0.0, ttl_s=5.0)
    assert index.admit(chain("b"), 10, 0.0).wanted == (0,)


def test_a_store_without_room_for_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        BlockIndex(0)


NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)


class IndexMachine(RuleBasedStateMachine):
    """Any order of calls, against a model that only knows sets, sizes and recency."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(60)
        self.now_s = 0.0
        self.present: OrderedDict[BlockId, int] = OrderedDict()
        self.arriving: dict[BlockId, int] = {}
        self.pins: list[tuple[Pin, float, tuple[BlockId, ...]]] = []

    def pinned(self) -> set[BlockId]:
        return {b for _, until_s, blocks in self.pins if until_s > self.now_s for b in blocks}

    @rule(names=NAMES, nbytes=st.integers(1, 30))
    def admit(self, names: list[str], nbytes: int) -> None:
        blocks = chain(*names)
        pinned, old = self.pinned(), list(self.present)
        admission = self.index.admit(blocks, nbytes, self.now_s)
        evicted = set(admission.evicted)
        assert evicted.isdisjoint(pinned | set(blocks))
        may_go = [block for block in old if block not in pinned and block not in blocks]
        assert list(admission.evicted) == may_go[: len(evicted)], "not the oldest"
        for block in admission.evicted:
            del self.present[block]
        missing = list(
            dict.fromkeys(b for b in blocks if b not in self.present and b not in self.arriving)
        )
        wanted = [blocks[position] for position in admission.wanted]
        assert wanted == missing[: len(wanted)], "not the start of the chain"
        self.arriving |= dict.fromkeys(wanted, nbytes)
        if len(wanted) < len(missing):
            held = sum(self.present.values()) + sum(self.arriving.values())
            left = [block for block in may_go if block not in evicted]
            assert held + nbytes > 60, "there was room"
            assert not left or (len(wanted) + 1) * nbytes > 60, "more could have gone"

    @precondition(lambda self: self.arriving)
    @rule(data=st.data(), succeeds=st.booleans())
    def settle(self, data: st.DataObject, succeeds: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.arriving)))
        nbytes = self.arriving.pop(block)
        if succeeds:
            self.index.commit(block)
            self.present[block] = nbytes
        else:
            self.index.abandon(block)

    @rule(names=NAMES)
    def touch(self, names: list[str]) -> None:
        blocks = chain(*names)
        self.index.touch(blocks)
        for block in reversed(blocks):
            if block in self.present:
                self.present.move_to_end(block)

    @precondition(lambda self: self.present)
    @rule(data=st.data(), ttl_s=st.floats(0.5, 5.0))
    def pin(self, data: st.DataObject, ttl_s: float) -> None:
        blocks = tuple(data.draw(st.sets(st.sampled_from(sorted(self.present)), min_size=1)))
        pin = self.index.pin(blocks, now_s=self.now_s, ttl_s=ttl_s)
        self.pins.append((pin, self.now_s + ttl_s, blocks))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.pins) - 1))
        self.index.release(self.pins.pop(position)[0])

    @rule(seconds=st.floats(0.1, 3.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(name=st.sampled_from("abcdefgh"))
    def remove(self, name: str) -> None:
        (block,) = chain(name)
        assert self.index.remove(block) == (self.present.pop(block, None) is not None)
        self.pins = [
            (pin, until_s, tuple(b for b in blocks if b != block))
            for pin, until_s, blocks in self.pins
        ]

    @rule(names=NAMES)
    def look(self, names: list[str]) -> None:
        blocks = chain(*names)
        found = self.index.longest_prefix(blocks)
        assert all(block in self.present for block in blocks[:found])
        assert found == len(blocks) or blocks[found] not in self.present

    @invariant()
    def the_books_add_up(self) -> None:
        self.index.check_integrity()
        assert self.index.used_bytes == sum(self.present.values())
        assert self.index.arriving_bytes == sum(self.arriving.values())
        assert self.index.used_bytes + self.index.arriving_bytes <= 60
        assert len(self.index) == len(self.present)
        assert self.index.num_arriving == len(self.arriving)


TestIndexMachine = IndexMachine.TestCase
