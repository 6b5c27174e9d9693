"""Channels over UCX, driven by the calling thread.

Between two ends on one machine a plain socket is used instead: a thread that sleeps in the kernel
is woken faster than one that sleeps on UCX's events. Measured on two cores, 16 KiB there and back:
45 to 85 µs by socket, 40 to 400 by UCX, more the busier the machine is. Bare UCX needs 22 while
both sides spin on a core each, and twice the spinning when they have to share one.
"""

import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import PeerGone, ProtocolError, TransferTimeout, TransportError
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.channel_socket import ChannelListener, ChannelSocket, Deadline
from shared.transport.channel_tcp import SocketChannel
from shared.transport.peering import Greeting
from shared.transport.piece import Buffer, byte_view
from shared.transport.ucx_library import UcxLibrary

_SETTINGS = {"RNDV_THRESH": "262144"}
"""Up to this size a message goes without asking the receiver first, which waits for it anyway."""

_TAG = 1

_SPIN_S = 30e-6
"""How long to look for a message before going to sleep. A wake-up costs about as much; more would
take the core away from somebody else's computing."""

_NO_ROOM_MS = 1
"""How often to look for room at a slow receiver; UCX has no event for that."""


class UcxChannelEnd(ChannelEnd):
    """A UCX worker of its own, and a listener on ``host`` until it is connected.

    ``use_sockets_locally``: see the module. Raises ``TransportError`` if UCX cannot be used here.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        use_sockets_locally: bool = True,
        ucx_settings: Mapping[str, str] | None = None,
    ) -> None:
        self._machine = _machine() if use_sockets_locally else b""
        self._library = UcxLibrary.load()
        settings = {**_SETTINGS, **(ucx_settings or {})}
        context = self._library.new_context(host=host, settings=settings)
        try:
            self._worker = self._library.api.UCXWorker(context)
            self._worker.init_blocking_progress_mode()
        except self._library.error as error:
            raise TransportError(f"UCX has no worker for a channel: {error}") from error
        self._listener = ChannelListener("ucx-channel", host)

    @property
    def address(self) -> bytes:
        """See ``ChannelEnd``."""
        return self._listener.address.encode()

    def connect(
        self, peer: bytes, channel_id: int, *, is_initiator: bool, timeout_s: float
    ) -> Channel:
        """See ``ChannelEnd``."""
        deadline = Deadline(timeout_s)
        worker, self._worker = self._worker, None
        if worker is None:
            raise PeerGone("this end has been connected or closed before")
        ours = Greeting(
            token=self._listener.address.token,
            sender=self.address,
            channel_id=channel_id,
            worker_address=bytes(worker.address),
            machine=self._machine,
        )
        meet = self._listener.dial if is_initiator else self._listener.accept
        try:
            connection, theirs = meet(peer, ours, deadline)
        finally:
            self._listener.close()
        if self._machine and theirs.machine == self._machine:
            return SocketChannel(connection)
        channel = _UcxChannel(self._library, worker, connection)
        try:
            channel.establish(theirs.worker_address, deadline)
        except BaseException:
            channel.close()
            raise
        return channel

    def close(self) -> None:
        """See ``ChannelEnd``."""
        self._worker = None
        self._listener.close()


def _machine() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes()


class _UcxChannel(Channel):
    def __init__(self, library: UcxLibrary, worker: Any, connection: ChannelSocket) -> None:
        self._library = library
        self._worker = worker
        self._connection = connection
        self._endpoint: Any = None
        self._tag = library.api.UCXXTag(_TAG)
        self._poller = select.poll()
        self._poller.register(worker.epoll_file_descriptor, select.POLLIN)
        self._poller.register(connection, select.POLLIN)
        self._broken: str | None = None
        # What UCX may still touch after a message timed out: kept until the worker is gone.
        self._unfinished: list[tuple[Any, memoryview]] = []

    def establish(self, worker_address: bytes, deadline: Deadline) -> None:
        """Connect the two workers; returns when a message has gone each way."""
        api = self._library.api
        try:
            address = api.UCXAddress.create_from_buffer(worker_address)
            self._endpoint = api.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except self._library.error as error:
            raise PeerGone(f"UCX cannot reach the peer: {error}") from error
        self._send(memoryview(b"\0"), deadline)
        self._receive(memoryview(bytearray(1)), deadline)

    def send(self, buffer: Buffer, *, timeout_s: float) -> None:
        if self._broken is not None:
            raise PeerGone(self._broken)
        self._send(byte_view(buffer), Deadline(timeout_s))

    def recv_into(self, buffer: Buffer, *, timeout_s: float) -> int:
        if self._broken is not None:
            raise PeerGone(self._broken)
        return self._receive(byte_view(buffer), Deadline(timeout_s))

    def close(self) -> None:
        if self._worker is None:
            return
        if self._broken is None:
            self._broken = "the channel is closed"
        self._connection.close()
        if self._endpoint is not None:
            self._endpoint.close_blocking()  # forced, as error handling is on
        self._endpoint = None
        unfinished, self._unfinished = self._unfinished, []
        buffers = [buffer for _, buffer in unfinished]
        self._worker = None
        del unfinished  # the worker goes with the last request, and only then the buffers
        del buffers

    def _send(self, view: memoryview, deadline: Deadline) -> None:
        request = self._endpoint.tag_send(self._library.array(view), self._tag)
        self._finish(request, view, deadline)

    def _receive(self, view: memoryview, deadline: Deadline) -> int:
        probe, tag = self._worker.tag_probe, self._tag
        if not self._drive(lambda: probe(tag).matched, deadline):
            raise TransferTimeout(f"no message came in {deadline.timeout_s} s")
        length = int(probe(tag).length)
        if length > view.nbytes:
            self._broken = "the channel is broken: a message was too large"
            raise ProtocolError(f"a message of {length} bytes, room for {view.nbytes}")
        target = view[:length]
        request = self._worker.tag_recv(self._library.array(target), tag)
        self._finish(request, target, deadline)
        return length

    def _finish(self, request: Any, view: memoryview, deadline: Deadline) -> None:
        try:
            if not request.completed and not self._drive(lambda: request.completed, deadline):
                raise TransferTimeout(f"a message was not taken in {deadline.timeout_s} s")
            request.check_error()
        except self._library.error as error:
            self._broken = f"the channel is broken: {error}"
            raise PeerGone(self._broken) from error
        except (PeerGone, TransferTimeout) as error:
            self._unfinished.append((request, view))
            self._broken = f"the channel is broken: {error}"
            raise

    def _drive(self, is_done: Callable[[], bool], deadline: Deadline) -> bool:
        """Drive UCX until ``is_done``; False at the deadline. Raises ``PeerGone``."""
        progress_once = self._worker.progress_once
        idle_since_s = time.monotonic()
        while True:
            has_progressed = progress_once()
            if is_done():
                return True
            now_s = time.monotonic()
            if has_progressed:
                idle_since_s = now_s
            elif now_s - idle_since_s > _SPIN_S:
                if deadline.is_over:
                    return False
                self._sleep(deadline)
                if self._connection.is_peer_gone() and not self._has_more(is_done):
                    self._broken = "the peer closed the channel"
                    raise PeerGone(self._broken)
                idle_since_s = time.monotonic()

    def _sleep(self, deadline: Deadline) -> None:
        left_ms = deadline.left_ms()
        if not self._worker.arm():
            if self._worker.progress_once():
                return
            left_ms = min(left_ms, _NO_ROOM_MS)
        self._poller.poll(left_ms)

    def _has_more(self, is_done: Callable[[], bool]) -> bool:
        """What a peer sent just before it went is still to be received."""
        while self._worker.progress_once():
            pass
        return is_done()
