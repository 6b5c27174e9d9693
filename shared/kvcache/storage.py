"""Memory whose end can be given back and be had again."""

import contextlib
import mmap
import sys
from typing import Protocol

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000
"""Of Linux; Python has a name for it from 3.13 on."""


class Storage(Protocol):
    """A run of bytes on one device."""

    def resize(self, num_bytes: int) -> Tensor:
        """Keep the first ``num_bytes`` bytes; those that are new are zero.

        Returns them as one dimension of uint8. Tensors returned before must not be used any more.
        Raises ``torch.OutOfMemoryError`` or ``MemoryError`` and changes nothing.
        """
        ...


def make_storage(device: torch.device, capacity_bytes: int) -> Storage:
    """Empty storage on ``device`` that is expected to grow up to ``capacity_bytes``."""
    if device.type == "cpu" and sys.platform == "linux":
        return MappedStorage(capacity_bytes)
    return CopiedStorage(device)


class MappedStorage:
    """Host memory on Linux: addresses for ``capacity_bytes``, pages for what has been written.

    Resizing copies nothing unless it goes beyond the capacity.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = 0
        self._num_bytes = 0
        self._map(max(capacity_bytes, mmap.PAGESIZE))

    def resize(self, num_bytes: int) -> Tensor:
        """See ``Storage``."""
        if num_bytes > self._capacity_bytes:
            kept = self._data[: self._num_bytes]
            self._map(num_bytes)
            self._data[: kept.nbytes] = kept
        elif num_bytes < self._num_bytes:
            first_page = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            self._data[num_bytes:first_page] = 0
            if first_page < self._num_bytes:
                # Private and anonymous: such pages are zero when they are touched again.
                self._memory.madvise(mmap.MADV_DONTNEED, first_page, self._num_bytes - first_page)
        self._num_bytes = num_bytes
        return self._data[:num_bytes]

    def _map(self, num_bytes: int) -> None:
        """Reserve fresh addresses. The system takes pages for them when they are written."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, num_bytes, flags=flags)
        except OSError as exc:
            raise MemoryError(f"no addresses for {num_bytes} bytes: {exc}") from exc
        with contextlib.suppress(OSError):  # faster with huge pages, but a kernel may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memory
        self._capacity_bytes = num_bytes
        self._data = torch.frombuffer(memory, dtype=torch.uint8)


class CopiedStorage:
    """Memory of any device by torch's allocator: resizing copies what stays."""

    def __init__(self, device: torch.device) -> None:
        self._data = torch.zeros(0, dtype=torch.uint8, device=device)

    def resize(self, num_bytes: int) -> Tensor:
        """See ``Storage``; for the time of the copy both sizes are taken."""
        resized = torch.zeros(num_bytes, dtype=torch.uint8, device=self._data.device)
        num_kept = min(num_bytes, self._data.nbytes)
        resized[:num_kept] = self._data[:num_kept]
        had_bytes = self._data.nbytes > 0
        self._data = resized
        if had_bytes and resized.device.type == "cuda":
            # Pieces of the old size would fit nobody: torch must not keep them.
            torch.cuda.empty_cache()
        return resized
