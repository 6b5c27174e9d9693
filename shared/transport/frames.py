"""Frames on a byte stream: small control frames, and data that lands without a copy of ours.

Every frame has a head of 24 bytes: type, length of the body, transfer, piece (see ``_HEAD``). The
bodies:

========  ==========================================================================
GREETING  a ``Greeting``; first frame in both directions
OFFER     a packed ``PieceHeader`` and, up to ``INLINE_BYTES``, the payload
ACCEPT    empty: send the payload of this piece
REFUSE    empty: nobody wants (the rest of) this piece
DATA      the next bytes of an accepted piece
WITHDRAW  empty: the (rest of the) payload of this piece will not come
========  ==========================================================================
"""

import asyncio
import enum
import struct
from typing import Protocol

from shared.errors import ProtocolError

_HEAD = struct.Struct("<BxxxIQI4x")
_MAX_CONTROL_BYTES = 16 << 10
_SCRATCH_BYTES = 128 << 10
_MAX_READ_BYTES = 1 << 20
"""A single read copies at most this much, about 0.2 ms."""

CHUNK_BYTES = 256 << 10
"""Data is written in chunks of this size, so that pieces on one connection take turns."""


class FrameType(enum.IntEnum):
    """What a frame is; see the module."""

    GREETING = 1
    OFFER = 2
    ACCEPT = 3
    REFUSE = 4
    DATA = 5
    WITHDRAW = 6


class FrameHandler(Protocol):
    """Who gets what a ``FrameConnection`` reads. May raise ``ProtocolError``: it closes it."""

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """A control frame; ``body`` is valid only during the call."""

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        """Where the next ``nbytes`` bytes of this piece go."""

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        """The bytes are there."""

    def on_lost(self, reason: str) -> None:
        """The connection is gone; called once, also after ``close``."""


class FrameConnection(asyncio.BufferedProtocol):
    """One connection; reads into scratch memory, or straight into where data goes."""

    def __init__(self) -> None:
        self._handler: FrameHandler | None = None
        self._transport: asyncio.Transport | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._filled = 0
        self._target: memoryview | None = None
        self._target_filled = 0
        self._target_of = (0, 0)
        self._reason = "the peer closed the connection"
        self._is_lost = False
        self._write_lock = asyncio.Lock()
        self._room: asyncio.Future[None] | None = None

    def set_handler(self, handler: FrameHandler) -> None:
        """Who reads from here; to be set before anything arrives."""
        self._handler = handler

    @property
    def is_lost(self) -> bool:
        """Nothing can be sent any more."""
        return self._is_lost or self._transport is None or self._transport.is_closing()

    def send_control(
        self, kind: FrameType, transfer_id: int = 0, piece: int = 0, body: bytes = b""
    ) -> None:
        """Send a small frame; lost silently if the connection is."""
        if self._transport is not None and not self.is_lost:
            head = _HEAD.pack(kind, len(body), transfer_id, piece)
            self._transport.write(head + body)

    async def send_data(self, transfer_id: int, piece: int, chunk: memoryview) -> None:
        """Send at most ``CHUNK_BYTES``; return when the memory is free.

        Frames stay whole when this is cancelled: then ``chunk`` is referred to until it is sent.
        Raises ``ConnectionError`` when the connection is gone.
        """
        async with self._write_lock:
            if self._transport is None or self.is_lost:
                raise ConnectionResetError(self._reason)
            self._transport.write(_HEAD.pack(FrameType.DATA, chunk.nbytes, transfer_id, piece))
            self._transport.write(chunk)
            if self._room is not None:
                await asyncio.shield(self._room)

    def close(self, reason: str) -> None:
        """Close, dropping what is not sent yet; ``on_lost`` follows."""
        if not self._is_lost:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's callback."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # Paused while anything is unsent: when there is room, the caller's memory is free.
        transport.set_write_buffer_limits(high=0)

    def pause_writing(self) -> None:
        """Asyncio's callback."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Asyncio's callback."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's callback."""
        self._is_lost = True
        if exc is not None:
            self._reason = f"the connection failed: {exc}"
        if self._room is not None and not self._room.done():
            self._room.set_exception(ConnectionResetError(self._reason))
            self._room.exception()
        if self._handler is not None:
            self._handler.on_lost(self._reason)
        self._handler = None
        self._target = None

    def eof_received(self) -> bool:
        """Asyncio's callback: no half-open connections."""
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        """Asyncio's callback."""
        if self._target is not None:
            return self._target[self._target_filled : self._target_filled + _MAX_READ_BYTES]
        return self._scratch[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Asyncio's callback."""
        try:
            if self._target is not None:
                self._advance_target(nbytes)
            else:
                self._filled += nbytes
                self._parse()
        except ProtocolError as error:
            self.close(f"the peer breaks the protocol: {error}")

    def _parse(self) -> None:
        offset = 0
        while self._target is None and self._filled - offset >= _HEAD.size:
            kind_number, length, transfer_id, piece = _HEAD.unpack_from(self._scratch, offset)
            start = offset + _HEAD.size
            available = min(length, self._filled - start)
            if kind_number == FrameType.DATA:
                self._target = self._require_handler().data_target(transfer_id, piece, length)
                self._target_filled = 0
                self._target_of = (transfer_id, piece)
                self._target[:available] = self._scratch[start : start + available]
                self._advance_target(available)
            elif length > _MAX_CONTROL_BYTES:
                raise ProtocolError(f"a control frame of {length} bytes")
            elif available < length:
                break
            else:
                try:
                    kind = FrameType(kind_number)
                except ValueError:
                    raise ProtocolError(f"a frame of type {kind_number}") from None
                body = self._scratch[start : start + length]
                self._require_handler().on_frame(kind, transfer_id, piece, body)
            offset = start + available
        remaining = self._filled - offset
        if offset and remaining:
            self._scratch[:remaining] = bytes(self._scratch[offset : self._filled])
        self._filled = remaining

    def _advance_target(self, nbytes: int) -> None:
        assert self._target is not None
        self._target_filled += nbytes
        if self._target_filled == self._target.nbytes:
            landed, self._target = self._target.nbytes, None
            self._require_handler().on_data(*self._target_of, landed)

    def _require_handler(self) -> FrameHandler:
        if self._handler is None:
            raise ProtocolError("a frame on a closed connection")
        return self._handler
