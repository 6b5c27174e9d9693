"""The checksum of a payload: row sums at memory speed, then a short hash over the row sums.

The payload is read as little-endian unsigned 64-bit words, its tail padded with zero bytes to whole
rows of ``ROW_WORDS`` words; each row is summed modulo 2**64; blake2b (8 bytes) over the length and
the row sums is the checksum.

What it detects: every change confined to one 64-bit word (a flipped bit, a stuck byte); every
change of length; rows or blocks that are missing, stale, zeroed, swapped or shifted by whole rows;
in short, any damage that changes at least one row's sum, but for hash collisions (about 2**-64).

What it does not detect: damage *within* one 512-byte row that keeps the row's sum: words that
changed places inside the row, or errors that cancel out exactly. It is no protection against
somebody who forges bytes on purpose.

Wrapping 64-bit sums are the same for signed and unsigned words, so that torch computes the same
value on the CPU and on CUDA: ``digest(nbytes, words.view(-1, ROW_WORDS).sum(dim=1))``, the row sums
copied to the host as little-endian int64.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.transport.piece import Buffer, byte_view

ROW_WORDS = 64
ROW_BYTES = 8 * ROW_WORDS


def row_sums(payload: Buffer) -> npt.NDArray[np.uint64]:
    """The sum of each row modulo 2**64, shape ``[ceil(nbytes / ROW_BYTES)]``.

    ``payload`` is any C-contiguous buffer; it is only read.
    """
    view = byte_view(payload)
    num_rows, tail_bytes = divmod(view.nbytes, ROW_BYTES)
    sums = np.empty(num_rows + (tail_bytes > 0), dtype="<u8")
    if num_rows:
        words: npt.NDArray[Any] = np.frombuffer(view, dtype="<u8", count=num_rows * ROW_WORDS)
        np.add.reduce(words.reshape(num_rows, ROW_WORDS), axis=1, out=sums[:num_rows])
    if tail_bytes:
        padded = bytes(view[num_rows * ROW_BYTES :]).ljust(ROW_BYTES, b"\0")
        sums[-1] = np.add.reduce(np.frombuffer(padded, dtype="<u8"))
    return sums


def digest(nbytes: int, sums: Buffer) -> int:
    """The checksum of ``nbytes`` payload bytes with these row sums; never 0.

    ``sums`` holds one little-endian 64-bit integer per row. 0 is left free to mean "not summed".
    """
    state = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=8)
    state.update(sums)
    return int.from_bytes(state.digest(), "little") or 1


def checksum(payload: Buffer) -> int:
    """The checksum of a C-contiguous buffer; never 0.

    Costs about as much as reading the memory once and releases the GIL for most of it, so that
    large payloads belong on a thread rather than on the event loop.
    """
    view = byte_view(payload)
    return digest(view.nbytes, row_sums(view).data)
