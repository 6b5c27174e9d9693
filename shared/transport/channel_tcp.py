"""Channels over TCP."""

import struct
from collections.abc import Callable

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.channel_socket import ChannelListener, ChannelSocket, Deadline
from shared.transport.peering import Greeting
from shared.transport.piece import Buffer, byte_view

_LENGTH = struct.Struct("<Q")


class TcpChannelEnd(ChannelEnd):
    """Listens on any free port of ``host`` until it is connected."""

    def __init__(self, *, host: str = "127.0.0.1") -> None:
        self._listener = ChannelListener("tcp-channel", host)

    @property
    def address(self) -> bytes:
        """See ``ChannelEnd``."""
        return self._listener.address.encode()

    def connect(
        self, peer: bytes, channel_id: int, *, is_initiator: bool, timeout_s: float
    ) -> Channel:
        """See ``ChannelEnd``."""
        deadline = Deadline(timeout_s)
        ours = Greeting(
            token=self._listener.address.token, sender=self.address, channel_id=channel_id
        )
        meet = self._listener.dial if is_initiator else self._listener.accept
        try:
            connection, _ = meet(peer, ours, deadline)
        finally:
            self.close()
        return _TcpChannel(connection)

    def close(self) -> None:
        """See ``ChannelEnd``."""
        self._listener.close()


class _TcpChannel(Channel):
    """Each message is its length, 8 bytes, and its bytes."""

    def __init__(self, connection: ChannelSocket) -> None:
        self._connection = connection
        self._head = memoryview(bytearray(_LENGTH.size))
        self._broken: str | None = None

    def send(self, buffer: Buffer, *, timeout_s: float) -> None:
        self._check()
        view = byte_view(buffer)
        parts = [memoryview(_LENGTH.pack(view.nbytes)), view]
        self._guarded(lambda: self._connection.write(parts, Deadline(timeout_s)))

    def recv_into(self, buffer: Buffer, *, timeout_s: float) -> int:
        self._check()
        deadline = Deadline(timeout_s)
        try:
            num_read = self._connection.read_some(self._head, deadline)
        except PeerGone as error:  # a timeout here loses nothing, so it breaks nothing
            self._broken = str(error)
            raise
        self._guarded(lambda: self._connection.read(self._head[num_read:], deadline))
        (length,) = _LENGTH.unpack(self._head)
        view = byte_view(buffer)
        if length > view.nbytes:
            self._broken = "the channel is broken: a message was too large"
            raise ProtocolError(f"a message of {length} bytes, room for {view.nbytes}")
        self._guarded(lambda: self._connection.read(view[:length], deadline))
        return int(length)

    def close(self) -> None:
        if self._broken is None:
            self._broken = "the channel is closed"
        self._connection.close()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (PeerGone, TransferTimeout) as error:
            self._broken = f"the channel is broken: {error}"
            raise

    def _check(self) -> None:
        if self._broken is not None:
            raise PeerGone(self._broken)
