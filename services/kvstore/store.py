"""The blocks themselves behind their index: one owner, so that the two never disagree."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from services.kvstore.blocks import StoredBlock
from services.kvstore.counters import KVStoreCounters
from services.kvstore.index import BlockId, BlockIndex, Pin
from shared.transport.piece import MAX_PIECE_BYTES


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of one shape from the start of a chain, pinned until ``BlockStore.close_run``."""

    ids: tuple[BlockId, ...]
    blocks: tuple[StoredBlock, ...]
    pin: Pin


class BlockStore:
    """Holds complete blocks in memory. Used from one event loop; does no I/O itself."""

    def __init__(self, capacity_bytes: int, counters: KVStoreCounters) -> None:
        self.index = BlockIndex(capacity_bytes)
        self._blocks: dict[BlockId, StoredBlock] = {}
        self._counters = counters

    def lookup(self, chain: Sequence[BlockId], *, now_s: float, pin_s: float) -> int:
        """Length of the longest prefix of ``chain`` that is here; it is kept for ``pin_s``."""
        found = self.index.longest_prefix(chain)
        prefix = chain[:found]
        self.index.touch(prefix)
        self.index.pin(prefix, now_s=now_s, ttl_s=pin_s)
        self._counters.hits.add(found)
        self._counters.misses.add(len(chain) - found)
        return found

    def open_run(self, chain: Sequence[BlockId], *, now_s: float, ttl_s: float) -> BlockRun:
        """The longest prefix of ``chain`` that can be sent, one piece a layer.

        That is what is here, of the first block's shape, and no longer than fits into a piece.
        """
        ids = chain[: self.index.longest_prefix(chain)]
        if ids:
            shape = self._blocks[ids[0]].shape
            ids = ids[: MAX_PIECE_BYTES // max(nbytes for nbytes, _ in shape)]
            ids = tuple(takewhile(lambda block: self._blocks[block].shape == shape, ids))
        self.index.touch(ids)
        pin = self.index.pin(ids, now_s=now_s, ttl_s=ttl_s)
        return BlockRun(tuple(ids), tuple(self._blocks[block] for block in ids), pin)

    def close_run(self, run: BlockRun) -> None:
        """The run is sent, or will not be."""
        self.index.release(run.pin)

    def admit(self, chain: Sequence[BlockId], nbytes: int, now_s: float) -> tuple[int, ...]:
        """Indices of those of an offered chain that are wanted; room is set aside for them."""
        self.index.touch(chain)
        admission = self.index.admit(chain, nbytes, now_s)
        for block in admission.evicted:
            del self._blocks[block]
        self._counters.evicted.add(len(admission.evicted))
        return admission.wanted

    def commit(self, block: BlockId, stored: StoredBlock) -> None:
        """An admitted block has arrived as a whole and is visible from now on."""
        self.index.commit(block)
        self._blocks[block] = stored
        self._counters.stored.add()

    def abandon(self, block: BlockId) -> None:
        """An admitted block will not come."""
        self.index.abandon(block)

    def drop_corrupt(self, run: BlockRun, position: int) -> None:
        """A block's bytes are no longer those that were put.

        What has been put anew under the same key meanwhile stays.
        """
        block = run.ids[position]
        if self._blocks.get(block) is run.blocks[position]:
            self.index.remove(block)
            del self._blocks[block]
        self._counters.corrupt.add()
