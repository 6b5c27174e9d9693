"""Frames on a byte stream: small control frames, and data that lands without a copy of ours.

Every frame has a head of 24 bytes: type, length of the body, transfer, piece (see ``_HEAD``). The
side that dialled sends pieces:

========  =========  ==================================================================
GREETING  both       a ``Greeting``; see ``links``
OFFER     sender     a packed ``PieceHeader``; then a small payload itself, or the
                     address of a large one in the sender's memory (8 bytes)
ACCEPT    receiver   empty: send the payload of this piece
DATA      sender     the next bytes of an accepted piece
DONE      receiver   empty: the piece is taken, or nobody wants (the rest of) it
WITHDRAW  sender     empty: the (rest of the) payload will not come
========  =========  ==================================================================
"""

import asyncio
import enum
import struct
from typing import Protocol, cast

from shared.errors import PeerGone, ProtocolError

_HEAD = struct.Struct("<BxxxIQI4x")
_MAX_CONTROL_BYTES = 32 << 10
_SCRATCH_BYTES = 128 << 10
_JOIN_BYTES = 4 << 10
"""Copying this much costs less than a system call of its own."""

_MAX_READ_BYTES = 1 << 20
"""A single read copies at most this much, about 0.2 ms."""


class FrameType(enum.IntEnum):
    """What a frame is; see the module."""

    GREETING = 1
    OFFER = 2
    ACCEPT = 3
    DONE = 4
    DATA = 5
    WITHDRAW = 6


_FRAME_TYPES = frozenset(int(kind) for kind in FrameType)


class FrameHandler(Protocol):
    """Who gets what a ``FrameConnection`` reads; a ``ProtocolError`` raised here closes it."""

    def on_made(self) -> None:
        """The connection stands, with TLS if there is any."""

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """A control frame; ``body`` is valid only during the call."""

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        """Where the next ``nbytes`` bytes of this piece go: a view of exactly that size."""

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        """The bytes are there."""

    def on_lost(self, reason: str) -> None:
        """The connection is gone; called once, also after ``close``."""


class FrameConnection(asyncio.BufferedProtocol):
    """One connection; reads into scratch memory, or straight into where data goes."""

    def __init__(self, handler: FrameHandler) -> None:
        self._handler = handler
        self._transport: asyncio.Transport | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._filled = 0
        self._target: memoryview | None = None
        self._target_filled = 0
        self._target_of = (0, 0)
        self._reason = "the peer closed the connection"
        self._lost = asyncio.Event()
        self._write_lock = asyncio.Lock()
        self._room: asyncio.Future[None] | None = None
        self.num_abandoned = 0
        """Writes whose caller was cancelled while the data was still waiting to be sent."""
        self.abandoned_bytes = 0

    @property
    def is_lost(self) -> bool:
        """Nothing can be sent any more."""
        return self._transport is None or self._transport.is_closing()

    def send_control(
        self, kind: FrameType, transfer_id: int = 0, piece: int = 0, body: bytes = b""
    ) -> None:
        """Send a small frame at once; lost silently if the connection is."""
        if self._transport is not None and not self.is_lost:
            self._transport.write(_HEAD.pack(kind, len(body), transfer_id, piece) + body)

    async def send(
        self, kind: FrameType, transfer_id: int, piece: int, body: bytes | memoryview
    ) -> None:
        """Send a frame when there is room; return when the body's memory is free.

        A frame stays whole when this is cancelled: then ``body`` is referred to until it is sent
        or the connection is closed. Raises ``PeerGone`` when the connection is gone.
        """
        async with self._write_lock:
            await self._drained()
            if self._transport is None or self.is_lost:
                raise PeerGone(self._reason)
            head = _HEAD.pack(kind, len(body), transfer_id, piece)
            if len(body) <= _JOIN_BYTES:
                self._transport.write(head + body)
            else:
                self._transport.write(head)
                self._transport.write(body)
            try:
                await self._drained()
            except asyncio.CancelledError:
                self._abandon(len(body))
                raise

    def close(self, reason: str) -> None:
        """Close, dropping what is not sent yet; the handler's ``on_lost`` follows."""
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    async def wait_lost(self) -> None:
        """Return when the connection is gone and the handler knows."""
        await self._lost.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's callback."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        # Paused while anything is unsent, so that room means that the caller's memory is free.
        # TLS compares with >=, and would never resume with 0.
        is_tls = transport.get_extra_info("sslcontext") is not None
        self._transport.set_write_buffer_limits(high=1 if is_tls else 0, low=0)
        self._handler.on_made()

    def pause_writing(self) -> None:
        """Asyncio's callback."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Asyncio's callback."""
        room, self._room = self._room, None
        if room is not None:
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's callback."""
        if exc is not None:
            self._reason = f"the connection failed: {exc}"
        self.resume_writing()
        self._target = None
        self._lost.set()
        self._handler.on_lost(self._reason)

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
                self._advance(self._target, nbytes)
            else:
                self._filled += nbytes
                self._parse()
        except ProtocolError as error:
            self.close(f"the peer breaks the protocol: {error}")

    async def _drained(self) -> None:
        while self._room is not None:
            await asyncio.shield(self._room)

    def _abandon(self, nbytes: int) -> None:
        if self._room is None:
            return

        def on_room(_: object) -> None:
            self.num_abandoned -= 1
            self.abandoned_bytes -= nbytes

        self.num_abandoned += 1
        self.abandoned_bytes += nbytes
        self._room.add_done_callback(on_room)

    def _parse(self) -> None:
        offset = 0
        while self._target is None and self._filled - offset >= _HEAD.size:
            number, length, transfer_id, piece = _HEAD.unpack_from(self._scratch, offset)
            start = offset + _HEAD.size
            available = min(length, self._filled - start)
            if number == FrameType.DATA:
                target = self._handler.data_target(transfer_id, piece, length)
                target[:available] = self._scratch[start : start + available]
                self._target, self._target_filled = target, 0
                self._target_of = (transfer_id, piece)
                self._advance(target, available)
            elif number not in _FRAME_TYPES or length > _MAX_CONTROL_BYTES:
                raise ProtocolError(f"a frame of type {number} with {length} bytes")
            elif available < length:
                break
            else:
                body = self._scratch[start : start + length]
                self._handler.on_frame(FrameType(number), transfer_id, piece, body)
            offset = start + available
        remaining = self._filled - offset
        if offset and remaining:
            self._scratch[:remaining] = bytes(self._scratch[offset : self._filled])
        self._filled = remaining

    def _advance(self, target: memoryview, nbytes: int) -> None:
        self._target_filled += nbytes
        if self._target_filled == target.nbytes:
            self._target = None
            self._handler.on_data(*self._target_of, target.nbytes)
