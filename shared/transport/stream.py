"""Payloads in DATA frames on the link's own connection."""

import asyncio

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.frames import FrameConnection, FrameType
from shared.transport.links import Key

CHUNK_BYTES = 256 << 10
"""A frame carries this much, so that pieces on one connection take turns."""


class StreamSending:
    """Implements ``Sending``."""

    def __init__(self, connection: FrameConnection) -> None:
        self._connection = connection
        self._active: set[Key] = set()

    @property
    def num_quarantined(self) -> int:
        """Chunks whose sender gave up while they were waiting to be written."""
        return self._connection.num_abandoned

    @property
    def quarantined_bytes(self) -> int:
        """Their size."""
        return self._connection.abandoned_bytes

    async def send(self, key: Key, payload: memoryview) -> bool:
        """See ``Sending``."""
        self._active.add(key)
        try:
            for offset in range(0, payload.nbytes, CHUNK_BYTES):
                if key not in self._active:
                    return False
                chunk = payload[offset : offset + CHUNK_BYTES]
                await self._connection.send(FrameType.DATA, *key, chunk)
            return True
        finally:
            self._active.discard(key)

    def stop(self, key: Key) -> None:
        """See ``Sending``."""
        self._active.discard(key)

    def fail(self, reason: str) -> None:
        """See ``Sending``; the connection tells whoever is writing."""


class _Landing:
    """A buffer that the peer is filling."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.num_filled = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_abandoned = False

    def fail(self, error: PeerGone | TransferTimeout) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class StreamReceiving:
    """Implements ``Receiving``."""

    def __init__(self, connection: FrameConnection) -> None:
        self._connection = connection
        self._landings: dict[Key, _Landing] = {}

    @property
    def num_quarantined(self) -> int:
        """Buffers that the peer is still filling for nobody."""
        return sum(landing.is_abandoned for landing in self._landings.values())

    @property
    def quarantined_bytes(self) -> int:
        """Their size."""
        return sum(x.buffer.nbytes for x in self._landings.values() if x.is_abandoned)

    async def land(self, key: Key, buffer: memoryview) -> None:
        """See ``Receiving``."""
        landing = _Landing(buffer)
        self._landings[key] = landing
        self._connection.send_control(FrameType.ACCEPT, *key)
        try:
            await landing.done
        except asyncio.CancelledError:
            # What is on its way still lands; then the peer is done, or it answers WITHDRAW.
            landing.is_abandoned = True
            self._connection.send_control(FrameType.DONE, *key)
            raise

    def withdraw(self, key: Key) -> None:
        """See ``Receiving``."""
        landing = self._landings.pop(key, None)
        if landing is not None:
            landing.fail(TransferTimeout(f"the sender gave up piece {key[1]} of transfer {key[0]}"))

    def fail(self, reason: str) -> None:
        """See ``Receiving``."""
        for landing in self._landings.values():
            landing.fail(PeerGone(reason))
        self._landings.clear()

    def data_target(self, key: Key, nbytes: int) -> memoryview:
        """See ``Receiving``; raises ``ProtocolError`` for data that nobody asked for."""
        landing = self._landings.get(key)
        if landing is None or landing.num_filled + nbytes > landing.buffer.nbytes:
            raise ProtocolError(f"{nbytes} bytes that nobody asked for")
        return landing.buffer[landing.num_filled : landing.num_filled + nbytes]

    def on_data(self, key: Key, nbytes: int) -> None:
        """See ``Receiving``."""
        landing = self._landings[key]
        landing.num_filled += nbytes
        if landing.num_filled == landing.buffer.nbytes:
            del self._landings[key]
            if not landing.done.done():
                landing.done.set_result(None)
