"""Channels over TCP."""

import struct

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.channel_socket import ChannelListener, ChannelSocket, Deadline
from shared.transport.peering import Greeting
from shared.transport.piece import Buffer, byte_view

_LENGTH = struct.Struct("<Q")
_SCRATCH_BYTES = 64 << 10


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
        return SocketChannel(connection)

    def close(self) -> None:
        """See ``ChannelEnd``."""
        self._listener.close()


class SocketChannel(Channel):
    """Each message is its length, 8 bytes, and its bytes."""

    def __init__(self, connection: ChannelSocket) -> None:
        self._connection = connection
        # What has been read and not been received yet is scratch[start:end]: small messages
        # cost one system call that way, and large ones are read where they belong.
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = 0
        self._end = 0
        self._broken: str | None = None

    def send(self, buffer: Buffer, *, timeout_s: float) -> None:
        """See ``Channel``."""
        if self._broken is not None:
            raise PeerGone(self._broken)
        view = byte_view(buffer)
        try:
            head = memoryview(_LENGTH.pack(view.nbytes))
            self._connection.write([head, view], Deadline(timeout_s))
        except (PeerGone, TransferTimeout) as error:
            self._broken = f"the channel is broken: {error}"
            raise

    def recv_into(self, buffer: Buffer, *, timeout_s: float) -> int:
        """See ``Channel``."""
        if self._broken is not None:
            raise PeerGone(self._broken)
        deadline = Deadline(timeout_s)
        length = self._read_length(deadline)
        view = byte_view(buffer)
        if length > view.nbytes:
            self._broken = "the channel is broken: a message was too large"
            raise ProtocolError(f"a message of {length} bytes, room for {view.nbytes}")
        here = min(length, self._end - self._start)
        view[:here] = self._scratch[self._start : self._start + here]
        self._start += here
        if here < length:
            try:
                self._connection.read(view[here:length], deadline)
            except (PeerGone, TransferTimeout) as error:
                self._broken = f"the channel is broken: {error}"
                raise
        return length

    def close(self) -> None:
        """See ``Channel``."""
        if self._broken is None:
            self._broken = "the channel is closed"
        self._connection.close()

    def _read_length(self, deadline: Deadline) -> int:
        if self._start == self._end:
            self._start = self._end = 0
        while self._end - self._start < _LENGTH.size:
            if self._start:
                left = bytes(self._scratch[self._start : self._end])
                self._scratch[: len(left)] = left
                self._start, self._end = 0, len(left)
            try:
                # A timeout here loses nothing: what has come stays in the scratch memory.
                self._end += self._connection.read_some(self._scratch[self._end :], deadline)
            except PeerGone as error:
                self._broken = str(error)
                raise
        (length,) = _LENGTH.unpack_from(self._scratch, self._start)
        self._start += _LENGTH.size
        return int(length)
