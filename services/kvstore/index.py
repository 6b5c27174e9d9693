"""Which blocks the store holds, what may be evicted, and how much room there is: ids and numbers.

A block's life::

    unknown ── admit ──▶ arriving ── commit ──▶ present ── evicted or removed ──▶ unknown
                            └─────── abandon ──────────────────────────────────▶ unknown

Room is taken when a block is admitted, so that what arrives can never exceed the capacity. Present
blocks are evicted least recently used first, never while pinned.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class BlockId(NamedTuple):
    """A block's content key; blocks of different layouts are different blocks."""

    kv_layout: str
    key: bytes


def block_ids(kv_layout: str, keys: Sequence[bytes]) -> tuple[BlockId, ...]:
    """The ids of a chain of keys, in its order."""
    return tuple(BlockId(kv_layout, key) for key in keys)


@dataclass(slots=True, eq=False)
class _Entry:
    nbytes: int
    num_pins: int = 0


@dataclass(slots=True, eq=False)
class Pin:
    """Keeps blocks from being evicted until it is released or ``expires_s`` has come.

    It holds entries, not ids: a block that was removed and put again is not the one pinned.
    """

    expires_s: float
    entries: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """What becomes of an offer: indices of the blocks wanted, and the blocks given up for them.

    The ``evicted`` blocks have left the index already; their bytes are to be dropped.
    """

    wanted: tuple[int, ...]
    evicted: tuple[BlockId, ...]


class BlockIndex:
    """The books of a store of ``capacity_bytes``; told the time, owns no bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"a capacity of {capacity_bytes} bytes")
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        """Bytes of the blocks that are present."""
        self.arriving_bytes = 0
        """Room taken by blocks that were admitted and are not there yet."""
        self._present: OrderedDict[BlockId, _Entry] = OrderedDict()
        self._arriving: dict[BlockId, int] = {}
        self._pins: list[tuple[float, int, Pin]] = []
        self._pin_order = itertools.count()

    def __len__(self) -> int:
        """Blocks present."""
        return len(self._present)

    def __contains__(self, block: BlockId) -> bool:
        """Whether ``block`` is present; one that is arriving is not."""
        return block in self._present

    @property
    def num_arriving(self) -> int:
        """Blocks admitted and neither committed nor abandoned yet."""
        return len(self._arriving)

    # Reading

    def longest_prefix(self, blocks: Iterable[BlockId]) -> int:
        """How many of ``blocks``, from the first on, are present without a gap."""
        return sum(1 for _ in itertools.takewhile(self._present.__contains__, blocks))

    def touch(self, blocks: Sequence[BlockId]) -> None:
        """Note a use of those of ``blocks`` that are present.

        The first of a chain becomes the most recently used one: without it the others are of no
        use, so that it has to be the last to go.
        """
        for block in reversed(blocks):
            if block in self._present:
                self._present.move_to_end(block)

    def pin(self, blocks: Iterable[BlockId], *, now_s: float, ttl_s: float) -> Pin:
        """Keep present blocks until the pin is released, at the latest for ``ttl_s``.

        Raises ``KeyError`` for a block that is not present; then nothing is pinned.
        """
        self._expire_pins(now_s)
        pin = Pin(now_s + ttl_s, tuple(self._present[block] for block in blocks))
        for entry in pin.entries:
            entry.num_pins += 1
        heapq.heappush(self._pins, (pin.expires_s, next(self._pin_order), pin))
        return pin

    def release(self, pin: Pin) -> None:
        """End ``pin``; one that has ended already stays ended."""
        for entry in pin.entries:
            entry.num_pins -= 1
        pin.entries = ()

    # Writing

    def admit(self, blocks: Sequence[BlockId], nbytes: int, now_s: float) -> Admission:
        """Take room for those of an offered chain, ``nbytes`` each, that are neither here nor
        arriving; evict what has to go for them.

        What does not fit is left out from the end of the chain on. No block of the chain itself
        is evicted. Each wanted block is to be committed or abandoned by the caller.
        """
        self._expire_pins(now_s)
        chain = set(blocks)
        missing: list[int] = []
        seen: set[BlockId] = set()
        for index, block in enumerate(blocks):
            if block not in self._present and block not in self._arriving and block not in seen:
                missing.append(index)
                seen.add(block)
        fitting = min(len(missing), self.capacity_bytes // nbytes)
        evicted = self._make_room(fitting * nbytes, keep=chain)
        wanted = tuple(missing[: min(fitting, self._free_bytes // nbytes)])
        for index in wanted:
            self._arriving[blocks[index]] = nbytes
        self.arriving_bytes += len(wanted) * nbytes
        return Admission(wanted=wanted, evicted=evicted)

    def commit(self, block: BlockId) -> None:
        """An arriving block is complete: it is present from now on, as the latest used one."""
        nbytes = self._arriving.pop(block)
        self.arriving_bytes -= nbytes
        self.used_bytes += nbytes
        self._present[block] = _Entry(nbytes)

    def abandon(self, block: BlockId) -> None:
        """An arriving block will not come; its room is free again."""
        self.arriving_bytes -= self._arriving.pop(block)

    def remove(self, block: BlockId) -> bool:
        """Forget a present block, pinned or not; returns whether it was there."""
        entry = self._present.pop(block, None)
        if entry is None:
            return False
        self.used_bytes -= entry.nbytes
        return True

    def _expire_pins(self, now_s: float) -> None:
        while self._pins and self._pins[0][0] <= now_s:
            self.release(heapq.heappop(self._pins)[2])

    @property
    def _free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes - self.arriving_bytes

    def _make_room(self, nbytes: int, *, keep: Collection[BlockId]) -> tuple[BlockId, ...]:
        """Evict, oldest first, until ``nbytes`` are free or nothing more may go."""
        shortfall_bytes = nbytes - self._free_bytes
        evicted: list[BlockId] = []
        for block, entry in self._present.items():
            if shortfall_bytes <= 0:
                break
            if entry.num_pins == 0 and block not in keep:
                evicted.append(block)
                shortfall_bytes -= entry.nbytes
        for block in evicted:
            self.remove(block)
        return tuple(evicted)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the books do not add up."""
        assert self.used_bytes == sum(entry.nbytes for entry in self._present.values())
        assert self.arriving_bytes == sum(self._arriving.values())
        assert self._free_bytes >= 0, "more bytes than there is room for"
        assert self._present.keys().isdisjoint(self._arriving)
        pins = [entry for _, _, pin in self._pins for entry in pin.entries]
        for entry in self._present.values():
            assert entry.num_pins == sum(1 for pinned in pins if pinned is entry)
