"""Who owns which KV block: ids, reference counts and the prefix cache; no bytes.

::

    FREE ──allocate──→ OWNED ──last owner frees──→ FREE          (content not registered)
      ↑                  │ └────────────────────→ CACHED        (full block under its key)
      └──── evicted ─────│───────────────────────────┤ least recently used first
                         └←──────── adopted ─────────┘
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from shared.errors import LifecycleError, OutOfBlocks


class BlockManager:
    """Block tables of named owners over a pool of ``num_blocks`` block ids.

    An owner is any hashable name; its table is freed as a whole, exactly once. A block may be in
    several tables; a block about to be written must be in one only and under no key, which
    ``make_writable`` sees to. Not thread-safe: owned by the engine's thread.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks}, block_size {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        # Taken from the end, so that low ids go first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unowned, oldest first
        self._by_key: dict[bytes, int] = {}
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now: free ones and cached ones nobody owns."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody owns and whose content can be adopted."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def owns(self, owner: Hashable) -> bool:
        """Whether ``owner`` has a table (maybe an empty one)."""
        return owner in self._tables

    def block_table(self, owner: Hashable) -> Sequence[int]:
        """The block ids of ``owner`` in token order: a live view, not to be changed.

        Raises ``LifecycleError`` for an unknown owner.
        """
        return self._table(owner)

    def count_cached(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """How many leading ``keys`` are cached, and how many of those blocks nobody owns."""
        num_hits = num_unowned = 0
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            num_hits += 1
            num_unowned += self._ref_counts[block] == 0
        return num_hits, num_unowned

    def create(self, owner: Hashable) -> None:
        """Give ``owner`` an empty table; ``LifecycleError`` if it has one."""
        if owner in self._tables:
            raise LifecycleError(f"{owner} already owns blocks")
        self._tables[owner] = []

    def rename(self, owner: Hashable, name: Hashable) -> None:
        """Call ``owner`` ``name`` from now on; ``LifecycleError`` if that has a table."""
        table = self._table(owner)
        self.create(name)
        self._tables[name] = table
        del self._tables[owner]

    def adopt(self, owner: Hashable, keys: Sequence[bytes]) -> int:
        """Append the cached blocks of the longest known run of leading ``keys``; their number."""
        table = self._table(owner)
        for count, key in enumerate(keys):
            block = self._by_key.get(key)
            if block is None:
                return count
            self._share(block)
            table.append(block)
        return len(keys)

    def allocate(self, owner: Hashable, count: int) -> Sequence[int]:
        """Append ``count`` fresh blocks to the table of ``owner`` and return them.

        Takes all or nothing: ``OutOfBlocks`` if there are too few.
        """
        table = self._table(owner)
        if count > self.num_free_blocks:
            raise OutOfBlocks(count, self.num_free_blocks)
        fresh = [self._take() for _ in range(count)]
        table.extend(fresh)
        return fresh

    def register(self, owner: Hashable, index: int, key: bytes) -> None:
        """Make the full block at ``index`` findable under ``key``.

        If another block has the key already, or the block has one, nothing changes: one copy of
        equal content is enough.
        """
        block = self._table(owner)[index]
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def fork(self, owner: Hashable, child: Hashable, count: int) -> None:
        """Make ``child`` an owner of the first ``count`` blocks of ``owner`` too."""
        table = self._table(owner)
        if count > len(table):
            raise LifecycleError(f"{owner} has {len(table)} blocks, {count} were to be shared")
        self.create(child)
        for block in table[:count]:
            self._share(block)
            self._tables[child].append(block)

    def is_shared(self, owner: Hashable, index: int) -> bool:
        """Whether the block at ``index`` is in another table too."""
        return self._ref_counts[self._table(owner)[index]] > 1

    def writable_table(self, owner: Hashable, index: int) -> Sequence[int] | None:
        """The table of ``owner`` if the block at ``index`` may be written as it is.

        It exists then, in no other table and under no key; see ``make_writable``.
        """
        table = self._table(owner)
        if index >= len(table):
            return None
        block = table[index]
        is_writable = self._ref_counts[block] == 1 and self._keys[block] is None
        return table if is_writable else None

    def count_missing(self, owner: Hashable, first: int, stop: int) -> int:
        """Free blocks it takes to make ``[first, stop)`` exist and be this owner's alone."""
        table = self._table(owner)
        shared = sum(self._ref_counts[block] > 1 for block in table[first:stop])
        return max(0, stop - len(table)) + shared

    def make_writable(self, owner: Hashable, index: int) -> tuple[int, int] | None:
        """Make the block at ``index`` this owner's alone and unregistered.

        Returns ``(source, copy)`` if the block was shared: the owner's table now names the copy,
        and the caller has to copy the bytes before they are used. Raises ``OutOfBlocks`` if a copy
        is needed and no block is free.
        """
        table = self._table(owner)
        block = table[index]
        if self._ref_counts[block] == 1:
            self._forget(block)
            return None
        if self.num_free_blocks == 0:
            raise OutOfBlocks(1, 0)
        copy = self._take()
        self._drop(block)
        table[index] = copy
        return block, copy

    def truncate(self, owner: Hashable, count: int) -> None:
        """Keep the first ``count`` blocks of ``owner`` and give back the others."""
        table = self._table(owner)
        while len(table) > count:
            self._drop(table.pop())

    def free(self, owner: Hashable, *, discard: bool = False) -> list[int]:
        """Give back all blocks of ``owner``, who ceases to exist; freeing twice raises.

        Registered blocks that nobody else owns stay cached. With ``discard`` their content is
        distrusted instead: those owned by ``owner`` alone lose their key and are returned.
        """
        table = self._table(owner)
        del self._tables[owner]
        discarded = []
        # Tails first: a prefix is useless to the cache once a block before it is gone.
        for block in reversed(table):
            if discard and self._ref_counts[block] == 1:
                self._forget(block)
                discarded.append(block)
            self._drop(block)
        return discarded

    def shrink(self, count: int) -> list[tuple[int, int]]:
        """Give up the ``count`` highest block ids, at least one id staying.

        Returns ``(source, target)`` pairs to be copied before the sources are gone: owned blocks
        move to lower ids, in their tables and under their keys. Of the cached blocks the given up
        ones are forgotten, and the oldest where room for the owned ones is short. Raises
        ``OutOfBlocks`` and changes nothing if fewer than ``count`` blocks are free.
        """
        stop = self.num_blocks - count
        if count < 0 or stop < 1:
            raise ValueError(f"{count} of {self.num_blocks} blocks cannot be given up")
        if count > self.num_free_blocks:
            raise OutOfBlocks(count, self.num_free_blocks)
        self._free = [block for block in self._free if block < stop]
        for block in [block for block in self._cached if block >= stop]:
            del self._cached[block]
            self._forget(block)
        owned = [block for block in range(stop, self.num_blocks) if self._ref_counts[block]]
        moves = {block: self._take() for block in owned}
        for source, target in moves.items():
            self._ref_counts[target] = self._ref_counts[source]
            key = self._keys[target] = self._keys[source]
            if key is not None:
                self._by_key[key] = target
        if moves:
            for table in self._tables.values():
                table[:] = [moves.get(block, block) for block in table]
        del self._ref_counts[stop:], self._keys[stop:]
        self.num_blocks = stop
        return list(moves.items())

    def grow(self, count: int) -> None:
        """Add ``count`` free blocks behind the highest id."""
        if count < 0:
            raise ValueError(f"{count} blocks cannot be added")
        added = range(self.num_blocks + count - 1, self.num_blocks - 1, -1)
        self._free = [*added, *self._free]
        self._ref_counts += [0] * count
        self._keys += [None] * count
        self.num_blocks += count

    def check_integrity(self) -> None:
        """Verify every invariant; raises ``AssertionError`` naming the first that is broken."""
        counts = [0] * self.num_blocks
        assert len(self._ref_counts) == len(self._keys) == self.num_blocks, "sizes differ"
        for owner, table in self._tables.items():
            assert len(set(table)) == len(table), f"{owner} has a block twice: {table}"
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the tables"
        unowned = {block for block, count in enumerate(counts) if count == 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is both free and cached"
        assert free | cached == unowned, "unowned blocks are neither free nor cached, or owned ones"
        assert all(self._keys[block] is None for block in free), "a free block has a key"
        assert all(self._keys[block] is not None for block in cached), "a cached block has no key"
        by_key = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert by_key == self._by_key, "the key index differs from the blocks' keys"

    def _table(self, owner: Hashable) -> list[int]:
        table = self._tables.get(owner)
        if table is None:
            raise LifecycleError(f"{owner} owns no blocks: never allocated, or freed already")
        return table

    def _take(self) -> int:
        """An unowned block, now owned once and without a key; there must be one."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._ref_counts[block] = 1
        return block

    def _share(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def _drop(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
