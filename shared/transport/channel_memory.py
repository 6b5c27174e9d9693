"""Channels between threads of one process, for tests."""

import queue
import threading

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.peering import Address, new_token
from shared.transport.piece import Buffer, byte_view

_MAX_QUEUED = 64
"""Messages that may be on their way in each direction."""

_Queue = queue.Queue[bytes | None]


class MemoryChannelFabric:
    """Where the ends made with it find each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[tuple[bytes, bytes, int], _Queue] = {}

    def meet(
        self, here: bytes, there: bytes, channel_id: int, timeout_s: float
    ) -> tuple[_Queue, _Queue]:
        """The queues from there and to there, when both sides have come; for ends."""
        inbound, outbound = (there, here, channel_id), (here, there, channel_id)
        with self._changed:
            self._queues[inbound] = queue.Queue(_MAX_QUEUED)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: outbound in self._queues, timeout_s):
                raise TransferTimeout(f"nobody came for channel {channel_id} in {timeout_s} s")
            return self._queues[inbound], self._queues[outbound]


class MemoryChannelEnd(ChannelEnd):
    """One end on a fabric."""

    def __init__(self, fabric: MemoryChannelFabric) -> None:
        self._fabric = fabric
        self._address = Address("memory-channel", "", 0, new_token()).encode()

    @property
    def address(self) -> bytes:
        """See ``ChannelEnd``."""
        return self._address

    def connect(
        self, peer: bytes, channel_id: int, *, is_initiator: bool, timeout_s: float
    ) -> Channel:
        """See ``ChannelEnd``."""
        Address.decode(peer, "memory-channel")
        return _MemoryChannel(*self._fabric.meet(self._address, peer, channel_id, timeout_s))

    def close(self) -> None:
        """See ``ChannelEnd``; there is nothing to stop."""


class _MemoryChannel(Channel):
    def __init__(self, inbound: _Queue, outbound: _Queue) -> None:
        self._inbound = inbound
        self._outbound = outbound
        self._gone: str | None = None

    def send(self, buffer: Buffer, *, timeout_s: float) -> None:
        self._check_peer()
        try:
            self._outbound.put(bytes(byte_view(buffer)), timeout=timeout_s)
        except queue.Full:
            self._gone = "the channel is broken: a message timed out"
            raise TransferTimeout(f"no room for a message in {timeout_s} s") from None

    def recv_into(self, buffer: Buffer, *, timeout_s: float) -> int:
        if self._gone is not None:
            raise PeerGone(self._gone)
        try:
            message = self._inbound.get(timeout=timeout_s)
        except queue.Empty:
            raise TransferTimeout(f"no message came in {timeout_s} s") from None
        if message is None:
            self._gone = "the peer closed the channel"
            raise PeerGone(self._gone)
        view = byte_view(buffer)
        if len(message) > view.nbytes:
            raise ProtocolError(f"a message of {len(message)} bytes, room for {view.nbytes}")
        view[: len(message)] = message
        return len(message)

    def close(self) -> None:
        if self._gone is None:
            self._gone = "the channel is closed"
            # The peer learns it from its queue: behind what is in there, or instead of the oldest.
            while True:
                try:
                    self._outbound.put_nowait(None)
                    return
                except queue.Full:
                    self._outbound.get_nowait()

    def _check_peer(self) -> None:
        if self._gone is None and self._has_peer_closed():
            self._gone = "the peer closed the channel"
        if self._gone is not None:
            raise PeerGone(self._gone)

    def _has_peer_closed(self) -> bool:
        with self._inbound.mutex:
            return bool(self._inbound.queue) and self._inbound.queue[-1] is None
