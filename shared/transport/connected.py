"""What transports over connections share: listening, dialling, and the links of each peer."""

import asyncio
import ssl
from typing import Any, ClassVar

from shared.errors import PeerGone, TransportError
from shared.transport.base import Transport
from shared.transport.frames import FrameConnection
from shared.transport.inbox import Inbox
from shared.transport.incoming_link import IncomingLink
from shared.transport.links import Link
from shared.transport.outgoing_link import OutgoingLink
from shared.transport.peering import (
    MAX_ADDRESS_BYTES,
    Address,
    Greeting,
    Kind,
    advertised_host,
    new_token,
)
from shared.transport.piece import PieceHeader
from shared.transport.pull import OwnMemory

DIAL_TIMEOUT_S = 10.0
"""A listener that has not let us in by then is gone; a send's own deadline may be shorter."""


class ConnectedTransport(Transport):
    """A transport whose peers dial each other.

    TCP and UCX speak to each other: what both sides can is used. Each pair of peers has at most one
    connection a direction, opened by the first send and shared by all transfers. It ends when
    either side closes it or dies, and what is in flight on it ends with it.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str | None = None,
        server_ssl: ssl.SSLContext | None = None,
        client_ssl: ssl.SSLContext | None = None,
        pull: bool = False,
        **options: Any,
    ) -> None:
        """Make a transport that listens on ``host``; 0 is any free port.

        ``advertise_host`` is what peers are told to dial: by default ``host``, or this machine's
        own name when bound to all interfaces. ``pull``: let peers on this machine read payloads
        from this process's memory, and read theirs, instead of sending them (see ``pull``); not
        with TLS, through which all bytes are meant to go. ``options`` are those of ``Transport``.
        """
        super().__init__(**options)
        self.name = self.kind
        self._host = host
        self._port = port
        self._advertise_host = advertise_host
        self._server_ssl = server_ssl
        self._client_ssl = client_ssl
        self._own_memory = OwnMemory() if pull and server_ssl is None is client_ssl else None
        self.token = new_token()
        self._server: asyncio.Server | None = None
        self._address = b""
        self._links: set[Link] = set()
        self._outgoing: dict[bytes, OutgoingLink] = {}
        self._dialling: dict[bytes, asyncio.Task[OutgoingLink]] = {}

    @property
    def address(self) -> bytes:
        """See ``Transport``."""
        if not self._address:
            raise RuntimeError("a transport has no address before it is started")
        return self._address

    @property
    def num_quarantined(self) -> int:
        """See ``Transport``."""
        return sum(link.num_quarantined for link in self._links)

    @property
    def quarantined_bytes(self) -> int:
        """See ``Transport``."""
        return sum(link.quarantined_bytes for link in self._links)

    async def start(self) -> None:
        """See ``Transport``."""
        if self._server is not None or self._address:
            raise RuntimeError("a transport is started once")
        loop = asyncio.get_running_loop()
        try:
            host = self._advertise_host
            if host is None:
                host = await asyncio.to_thread(advertised_host, self._host)
            self._server = await loop.create_server(
                self._on_connection,
                self._host,
                self._port,
                ssl=self._server_ssl,
                ssl_handshake_timeout=DIAL_TIMEOUT_S if self._server_ssl is not None else None,
            )
        except OSError as error:
            raise TransportError(f"cannot listen on {self._host}:{self._port}: {error}") from error
        port = self._server.sockets[0].getsockname()[1]
        self._address = Address(self.kind, host, port, self.token).encode()
        if len(self._address) > MAX_ADDRESS_BYTES:
            raise TransportError(f"the address is {len(self._address)} bytes long")
        self._is_open = True

    async def close(self) -> None:
        """See ``Transport``."""
        if self._server is None:
            return
        self._is_open = False
        reason = f"the {self.name} transport was closed"
        self._server.close()
        self._inbox.close(reason)
        await self._stop_dialling(list(self._dialling))
        await self._close_links(list(self._links), reason)
        self._server = None
        self._staging.clear()

    async def forget_peer(self, peer: bytes) -> None:
        """See ``Transport``."""
        await self._stop_dialling([peer])
        await self._close_links(
            [link for link in self._links if link.peer == peer], "the peer was forgotten"
        )

    async def _send(self, peer: bytes, header: PieceHeader, payload: memoryview) -> None:
        link = self._outgoing.get(peer)
        if link is None or link.connection.is_lost:
            link = await self._dialled(peer)
        await link.send(header, payload)

    def link_made(self, link: Link) -> None:
        """A link is connected; for links."""
        self._links.add(link)

    def link_lost(self, link: Link, reason: str) -> None:
        """A link's connection is gone; for links."""
        self._links.discard(link)
        self._inbox.lose(link, PeerGone(reason))
        if self._outgoing.get(link.peer) is link:
            del self._outgoing[link.peer]

    @property
    def inbox(self) -> Inbox:
        """Where offers go; for links."""
        return self._inbox

    @property
    def may_pull(self) -> bool:
        """Whether to try to read peers' memory; for links."""
        return self._own_memory is not None

    def _accept(self) -> IncomingLink:
        """A link for a connection that a peer opens."""
        return IncomingLink(self)

    async def _greet(self, link: OutgoingLink, address: Address) -> None:
        """Introduce ourselves on a new connection. Raises ``PeerGone``."""
        await link.greet(self._greeting(address))

    def _greeting(self, address: Address) -> Greeting:
        card = self._own_memory.card if self._own_memory is not None else b""
        return Greeting(token=address.token, sender=self.address, memory_card=card)

    def _on_connection(self) -> FrameConnection:
        return self._accept().connection

    async def _dialled(self, peer: bytes) -> OutgoingLink:
        task = self._dialling.get(peer)
        if task is None:
            task = asyncio.create_task(self._dial(peer), name=f"dial {self.name}")
            self._dialling[peer] = task
            task.add_done_callback(lambda done: self._on_dialled(peer, done))
        try:
            # Others may wait for the same link: one who runs out of time leaves it to them.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and current is not None and not current.cancelling():
                raise PeerGone("the peer was forgotten while it was being dialled") from None
            raise

    async def _dial(self, peer: bytes) -> OutgoingLink:
        address = Address.decode(peer, "tcp", "ucx")
        link = OutgoingLink(self, peer)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(
                    lambda: link.connection,
                    address.host,
                    address.port,
                    ssl=self._client_ssl,
                    server_hostname=address.host if self._client_ssl is not None else None,
                )
                await self._greet(link, address)
        except (OSError, TimeoutError) as error:
            link.connection.close("the peer was not reached")
            raise PeerGone(f"{address.host}:{address.port} cannot be reached: {error}") from error
        except BaseException:
            link.connection.close("the peer was not reached")
            raise
        return link

    def _on_dialled(self, peer: bytes, task: asyncio.Task[OutgoingLink]) -> None:
        if self._dialling.get(peer) is task:
            del self._dialling[peer]
        if not task.cancelled() and task.exception() is None:
            link = task.result()
            if not link.connection.is_lost:
                self._outgoing[peer] = link

    async def _stop_dialling(self, peers: list[bytes]) -> None:
        tasks = [self._dialling[peer] for peer in peers if peer in self._dialling]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _close_links(links: list[Link], reason: str) -> None:
        for link in links:
            link.connection.close(reason)
        for link in links:
            await link.wait_lost()
