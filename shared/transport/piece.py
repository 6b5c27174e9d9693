"""What travels on the bulk face: pieces of a transfer, their header and their ids.

A transfer and a piece of it share one 64-bit number (a UCX tag) without overlap:

=====================  ===========================================================
bits ``[20, 63)``      the transfer: the low 20 bits of a ``transfer_id`` are 0
bits ``[0, 20)``       the piece: its running index in the transfer, from 0
numbers below 2**20    no transfer has them; they are the transports' own messages
=====================  ===========================================================
"""

import enum
import secrets
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Self

from shared.errors import ProtocolError

PIECE_BITS = 20
MAX_PIECES = 1 << PIECE_BITS
MAX_PIECE_BYTES = 1 << 30
HEADER_BYTES = 64

_MAGIC = b"BYPC"
_VERSION = 1
_LAYOUT = struct.Struct("<4sHHQIIIIHHQQ8xI")
_CRC = struct.Struct("<I")
assert _LAYOUT.size == HEADER_BYTES

# Whatever offers the buffer protocol (bytes, memoryview, array, numpy); Python has no name for
# it before 3.12.
Buffer = Any


def byte_view(buffer: Buffer) -> memoryview:
    """A flat view of a buffer's bytes, which are not copied.

    Raises ``ValueError`` if the buffer is not C-contiguous.
    """
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("a buffer that travels must be C-contiguous")
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


class PieceKind(enum.IntEnum):
    """What a piece's payload is."""

    KV = 1
    """KV of one layer: blocks ``[block_lo, block_hi)``, heads ``[head_lo, head_hi)``."""
    WEIGHTS = 2
    """Weights of one layer, or a part of them."""
    TRAILER = 3
    """The message that ends a transfer."""
    ABORT = 4
    """The sender gives the transfer up; the payload may say why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceHeader:
    """What a piece is and where it belongs; 64 bytes on the wire, with magic, version and CRC.

    ``nbytes`` and ``checksum`` describe the payload and are filled in by the sending transport
    (``checksum`` 0: not summed). Block and head ranges are half-open and mean what ``kind`` says.
    """

    transfer_id: int
    piece: int
    kind: PieceKind
    layer: int = 0
    block_lo: int = 0
    block_hi: int = 0
    head_lo: int = 0
    head_hi: int = 0
    nbytes: int = 0
    checksum: int = 0

    @property
    def tag(self) -> int:
        """The piece's own 64-bit number, see the module."""
        return self.transfer_id | self.piece

    def sealed(self, nbytes: int, checksum: int) -> Self:
        """The same header for a payload of this size and sum."""
        return type(self)(
            transfer_id=self.transfer_id,
            piece=self.piece,
            kind=self.kind,
            layer=self.layer,
            block_lo=self.block_lo,
            block_hi=self.block_hi,
            head_lo=self.head_lo,
            head_hi=self.head_hi,
            nbytes=nbytes,
            checksum=checksum,
        )

    def pack(self) -> bytes:
        """The header as ``HEADER_BYTES`` bytes.

        Raises ``ValueError`` if a field does not fit or is no valid id.
        """
        check_id(self.transfer_id, self.piece)
        try:
            packed = _LAYOUT.pack(
                _MAGIC,
                _VERSION,
                self.kind,
                self.transfer_id,
                self.piece,
                self.layer,
                self.block_lo,
                self.block_hi,
                self.head_lo,
                self.head_hi,
                self.nbytes,
                self.checksum,
                0,
            )
        except struct.error as error:
            raise ValueError(f"{self} does not fit its wire format: {error}") from error
        return packed[: -_CRC.size] + _CRC.pack(zlib.crc32(packed[: -_CRC.size]))

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """The header in the first ``HEADER_BYTES`` bytes of ``data``.

        Raises ``ProtocolError`` for anything that ``pack`` does not produce.
        """
        view = byte_view(data)[:HEADER_BYTES]
        if view.nbytes < HEADER_BYTES or view[:4] != _MAGIC:
            raise ProtocolError("not a piece header")
        magic, version, kind, *fields, crc = _LAYOUT.unpack(view)
        del magic
        if version != _VERSION:
            raise ProtocolError(f"piece header of version {version}, this side speaks {_VERSION}")
        if crc != zlib.crc32(view[: -_CRC.size]):
            raise ProtocolError("a piece header that is damaged")
        transfer_id, piece, layer, block_lo, block_hi, head_lo, head_hi, nbytes, checksum = fields
        try:
            check_id(transfer_id, piece)
            kind = PieceKind(kind)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if nbytes > MAX_PIECE_BYTES:
            raise ProtocolError(f"a piece of {nbytes} bytes; {MAX_PIECE_BYTES} are the most")
        return cls(
            transfer_id=transfer_id,
            piece=piece,
            kind=kind,
            layer=layer,
            block_lo=block_lo,
            block_hi=block_hi,
            head_lo=head_lo,
            head_hi=head_hi,
            nbytes=nbytes,
            checksum=checksum,
        )


def check_id(transfer_id: int, piece: int) -> None:
    """Raise ``ValueError`` unless these can be a transfer and a piece of it."""
    if transfer_id < MAX_PIECES or transfer_id >= 1 << 63 or transfer_id % MAX_PIECES:
        raise ValueError(f"{transfer_id} is no transfer id")
    if not 0 <= piece < MAX_PIECES:
        raise ValueError(f"piece {piece} is not in [0, {MAX_PIECES})")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece that has arrived and passed its checksum.

    ``payload`` is a view of a staging buffer of the transport (or of the receiver's own ``into``).
    The buffer is used again only when nothing refers to the view any more, so it may be kept,
    sliced, and handed to numpy or torch.
    """

    header: PieceHeader
    payload: memoryview


class TransferIds:
    """The transfer ids of one receiver, each given out once.

    They are multiples of 2**20 below 2**63, counted up from a random start: a receiver that
    restarts does not meet the ids of its former self, for 2**42 starts against a few million ids
    a day. Whoever receives allocates; the sender is told the id.
    """

    def __init__(self, start: int | None = None) -> None:
        self._next = secrets.randbits(42) + 1 if start is None else start

    def next(self) -> int:
        """An id that this object never gave out before."""
        transfer_id = self._next << PIECE_BITS
        self._next += 1
        return transfer_id
