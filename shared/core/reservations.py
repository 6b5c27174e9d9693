"""Blocks set aside for requests whose KV is computed elsewhere."""

from collections.abc import Sequence

from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineEvent, EngineState, transition
from shared.core.request import RequestKey
from shared.errors import LifecycleError


class Reservations:
    """Attempts in state ``RESERVED``: they own blocks that somebody else fills.

    ======================================= ==========================================
    blocks of a reservation (half-open)     content
    ======================================= ==========================================
    ``[0, num_cached_blocks)``              adopted from the prefix cache, never written
    ``[num_cached_blocks, num_blocks)``     fresh, to be imported
    ======================================= ==========================================
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._num_cached_blocks: dict[RequestKey, int] = {}

    def __len__(self) -> int:
        return len(self._num_cached_blocks)

    def __contains__(self, key: object) -> bool:
        return key in self._num_cached_blocks

    def make(self, key: RequestKey, count: int, cached: Sequence[bytes]) -> int:
        """Give ``key`` ``count`` blocks, first those found under the keys ``cached``.

        Returns how many were found; raises ``OutOfBlocks`` and changes nothing.
        """
        self._blocks.create(key)
        try:
            num_found = self._blocks.adopt(key, cached)
            self._blocks.allocate(key, count - num_found)
        except BaseException:
            self._blocks.free(key)
            raise
        self._num_cached_blocks[key] = num_found
        return num_found

    def table(self, key: RequestKey) -> Sequence[int]:
        """All blocks of ``key``; raises ``LifecycleError`` unless it is reserved."""
        if key not in self._num_cached_blocks:
            raise LifecycleError(f"{key} is not reserved")
        return self._blocks.block_table(key)

    def importable(self, key: RequestKey, block_lo: int, block_hi: int) -> Sequence[int]:
        """The blocks ``[block_lo, block_hi)`` of ``key``, which may be written.

        Raises ``LifecycleError`` unless ``key`` is reserved, ``ValueError`` for a bad range.
        """
        table = self.table(key)
        first = self._num_cached_blocks[key]
        if not first <= block_lo <= block_hi <= len(table):
            raise ValueError(
                f"blocks [{block_lo}, {block_hi}) of {key}: "
                f"[{first}, {len(table)}) are to be imported"
            )
        return table[block_lo:block_hi]

    def start(self, key: RequestKey) -> EngineState:
        """End the reservation in favour of a request of the same name, which has the blocks now."""
        state = transition(EngineState.RESERVED, EngineEvent.START)
        del self._num_cached_blocks[key]
        return state

    def release(self, key: RequestKey) -> bool:
        """Free the blocks of ``key``; ``False`` if it is not reserved."""
        if key not in self._num_cached_blocks:
            return False
        transition(EngineState.RESERVED, EngineEvent.RELEASE)
        del self._num_cached_blocks[key]
        self._blocks.free(key)
        return True
