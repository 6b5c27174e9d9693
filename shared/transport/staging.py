"""Memory in which payloads land."""

import weakref
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt

_SMALLEST_POOLED_BYTES = 256 << 10
"""Below this a fresh allocation costs no page faults worth saving."""

_Block = npt.NDArray[np.uint8]


class StagingPool:
    """Buffers for payloads, used again when nobody refers to them any more.

    A buffer is handed out as a memoryview; numpy arrays, torch tensors and slices made from the
    view keep the buffer, so it can never be reused under somebody's eyes, and nobody has to give
    it back. Fresh memory halves the speed of a 64 MiB transfer (page faults), hence the pool.

    ``take`` and ``clear`` belong to one thread; the last reference to a buffer may go away on any.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: dict[int, list[_Block]] = {}
        self._idle_bytes = 0
        # A finalizer may run on any thread and in the middle of anything, this class included:
        # it only drops the block here, and the owner's thread does the bookkeeping.
        self._returned: SimpleQueue[_Block] = SimpleQueue()

    @property
    def idle_bytes(self) -> int:
        """Memory kept for reuse; at most ``max_idle_bytes``."""
        self._collect()
        return self._idle_bytes

    def take(self, nbytes: int) -> memoryview:
        """A writable view of exactly ``nbytes`` bytes of undefined content."""
        if nbytes < _SMALLEST_POOLED_BYTES:
            return np.empty(nbytes, dtype=np.uint8).data
        self._collect()
        size_class = 1 << (nbytes - 1).bit_length()
        idle = self._idle.get(size_class)
        if idle:
            block = idle.pop()
            self._idle_bytes -= size_class
        else:
            block = np.empty(size_class, dtype=np.uint8)
        # The view handed out refers to `lease`, never to `block`: when the lease dies, nobody
        # can reach the memory any more.
        lease = block[:nbytes]
        weakref.finalize(lease, self._returned.put, block).atexit = False
        return lease.data

    def clear(self) -> None:
        """Give the memory kept for reuse back to the system."""
        self._collect()
        self._idle.clear()
        self._idle_bytes = 0

    def _collect(self) -> None:
        while True:
            try:
                block = self._returned.get_nowait()
            except Empty:
                return
            if self._idle_bytes + block.nbytes <= self._max_idle_bytes:
                self._idle.setdefault(block.nbytes, []).append(block)
                self._idle_bytes += block.nbytes
