"""A blocking connection between two channel ends: how they meet, and how they see each other die.

Used as it is by the TCP channel; the UCX channel meets over it and then only watches it.
"""

import math
import select
import socket
import struct
import time

import msgspec

from shared.errors import PeerGone, ProtocolError, TransferTimeout, TransportError
from shared.transport.peering import Address, Greeting, Kind, advertised_host, new_token

_LENGTH = struct.Struct("<Q")
_TIMEVAL = struct.Struct("@ll")
_MIN_TIMEOUT_S = 0.001
"""The kernel takes 0 for "for ever"."""

_MAX_GREETING_BYTES = 4096

_GREETING_TIMEOUT_S = 1.0
"""Somebody who connects to a waiting end and says nothing is sent away after this."""


class Deadline:
    """A point in time, and what is left until then."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at_s = time.monotonic() + timeout_s
        self._is_asked = False

    @property
    def is_untouched(self) -> bool:
        """Whether this is the first question: then all of the time is left."""
        first, self._is_asked = not self._is_asked, True
        return first

    def left_ms(self) -> int:
        """Milliseconds left, rounded up; 0 when it is over."""
        return max(0, math.ceil((self._at_s - time.monotonic()) * 1000))

    @property
    def is_over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._at_s


class ChannelSocket:
    """One connection, never waited for beyond a deadline.

    The kernel does the waiting, inside the call that moves the bytes: with a poll before it, a
    round trip takes twice as long. Everything raises ``PeerGone`` when the connection is gone and
    ``TransferTimeout`` when the deadline passes; what was moved in part by then is lost.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._timeouts_s: dict[int, float] = {}

    def fileno(self) -> int:
        """The file descriptor, readable when the peer has sent something or is gone."""
        return self._socket.fileno()

    def write(self, parts: list[memoryview], deadline: Deadline) -> None:
        """Write all parts, one behind the other."""
        num_left = sum(part.nbytes for part in parts)
        while True:
            self._set_timeout(socket.SO_SNDTIMEO, deadline)
            try:
                num_written = self._socket.sendmsg(parts)
            except BlockingIOError:
                continue
            except OSError as error:
                raise PeerGone(f"the connection failed: {error}") from error
            num_left -= num_written
            if not num_left:
                return
            parts = _rest(parts, num_written)

    def read(self, target: memoryview, deadline: Deadline) -> None:
        """Fill ``target``."""
        num_read = 0
        while num_read < target.nbytes:
            num_read += self.read_some(target[num_read:], deadline)

    def read_some(self, target: memoryview, deadline: Deadline) -> int:
        """Read at least one byte, and no more than there are."""
        while True:
            self._set_timeout(socket.SO_RCVTIMEO, deadline)
            try:
                num_read = self._socket.recv_into(target)
            except BlockingIOError:
                continue
            except OSError as error:
                raise PeerGone(f"the connection failed: {error}") from error
            if num_read == 0:
                raise PeerGone("the peer closed the channel")
            return num_read

    def is_peer_gone(self) -> bool:
        """Whether the connection has ended; only where the peer has nothing to say on it."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def greet(self, greeting: Greeting, deadline: Deadline) -> None:
        """Write a greeting."""
        data = greeting.encode()
        self.write([memoryview(_LENGTH.pack(len(data))), memoryview(data)], deadline)

    def read_greeting(self, token: bytes, deadline: Deadline) -> Greeting:
        """Read a greeting; raises ``ProtocolError`` for anything else."""
        head = memoryview(bytearray(_LENGTH.size))
        self.read(head, deadline)
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_GREETING_BYTES:
            raise ProtocolError(f"a greeting of {length} bytes")
        data = memoryview(bytearray(length))
        self.read(data, deadline)
        return Greeting.decode(data, token)

    def close(self) -> None:
        """Close it; the peer sees the end."""
        self._socket.close()

    def _set_timeout(self, option: int, deadline: Deadline) -> None:
        left_s = deadline.timeout_s if deadline.is_untouched else deadline.left_ms() / 1000
        if left_s <= 0:
            raise TransferTimeout(f"the peer did not answer in {deadline.timeout_s} s")
        if self._timeouts_s.get(option) != left_s:
            whole_s, rest_s = divmod(max(left_s, _MIN_TIMEOUT_S), 1)
            value = _TIMEVAL.pack(int(whole_s), int(rest_s * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)
            self._timeouts_s[option] = left_s


def _rest(parts: list[memoryview], num_written: int) -> list[memoryview]:
    """What is left of the parts."""
    rest = []
    for part in parts:
        rest.append(part[num_written:])
        num_written = max(0, num_written - part.nbytes)
    return [part for part in rest if part.nbytes]


class ChannelListener:
    """Where the other side of a channel is to come, once."""

    def __init__(self, kind: Kind, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.bind((host, 0))
            self._socket.listen(8)
            self._socket.setblocking(False)
            port = self._socket.getsockname()[1]
            self.address = Address(kind, advertised_host(host), port, new_token())
        except OSError as error:
            self._socket.close()
            raise TransportError(f"a channel cannot listen on {host}: {error}") from error

    def dial(
        self, peer: bytes, greeting: Greeting, deadline: Deadline
    ) -> tuple[ChannelSocket, Greeting]:
        """Meet a peer by dialling it; returns its greeting. Ours gets the token it wants to see."""
        address = Address.decode(peer, self.address.kind)
        try:
            raw = socket.create_connection((address.host, address.port), deadline.left_ms() / 1000)
        except TimeoutError:
            raise TransferTimeout(f"no connection in {deadline.timeout_s} s") from None
        except OSError as error:
            raise PeerGone(f"{address.host}:{address.port} cannot be reached: {error}") from error
        connection = ChannelSocket(raw)
        try:
            connection.greet(msgspec.structs.replace(greeting, token=address.token), deadline)
            return connection, connection.read_greeting(address.token, deadline)
        except ProtocolError as error:
            connection.close()
            raise PeerGone(f"the other side is no channel end: {error}") from error
        except BaseException:
            connection.close()
            raise

    def accept(
        self, peer: bytes, greeting: Greeting, deadline: Deadline
    ) -> tuple[ChannelSocket, Greeting]:
        """Meet a peer by waiting for it; returns its greeting. Whoever else comes is sent away."""
        Address.decode(peer, self.address.kind)
        while True:
            connection = ChannelSocket(self._accept(deadline))
            patience = Deadline(min(_GREETING_TIMEOUT_S, deadline.left_ms() / 1000))
            try:
                theirs = connection.read_greeting(self.address.token, patience)
                if (theirs.sender, theirs.channel_id) == (peer, greeting.channel_id):
                    connection.greet(greeting, deadline)
                    return connection, theirs
            except (ProtocolError, PeerGone, TransferTimeout):
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                connection.close()

    def _accept(self, deadline: Deadline) -> socket.socket:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while True:
            try:
                return self._socket.accept()[0]
            except BlockingIOError:
                pass
            if not poller.poll(deadline.left_ms()) and deadline.is_over:
                raise TransferTimeout(f"nobody came in {deadline.timeout_s} s")

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
