"""The bulk face over UCX: what UCX finds between hosts, shared memory within one. Linux only."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from shared.errors import PeerGone, ProtocolError, TransportError
from shared.transport.connected import ConnectedTransport
from shared.transport.incoming_link import IncomingLink
from shared.transport.outgoing_link import OutgoingLink
from shared.transport.peering import Address, Greeting, Kind
from shared.transport.ucx_library import UcxLibrary
from shared.transport.ucx_path import UcxReceiving, UcxSending
from shared.transport.ucx_port import UcxPort


class UcxTransport(ConnectedTransport):
    """Payloads as UCX messages; on one machine they are pulled where that is allowed.

    Peers meet over a TCP connection, on which pieces are offered and asked for; it also tells at
    once when a peer is gone, which UCX over shared memory does not. Each link that cannot pull has
    UCX workers of its own on both sides (2 MiB, about 10 file descriptors), see ``ucx_library``
    for why. There may be several transports in a process, and one after the other.
    """

    kind: ClassVar[Kind] = "ucx"

    def __init__(self, *, ucx_settings: Mapping[str, str] | None = None, **options: Any) -> None:
        """Make a transport. ``ucx_settings``: see ``UcxLibrary.new_context``."""
        super().__init__(**options)
        self._ucx_settings = ucx_settings
        self._library: UcxLibrary | None = None
        self._context: Any = None

    async def start(self) -> None:
        """See ``Transport``."""
        self._library = await asyncio.to_thread(UcxLibrary.load)
        self._context = self._library.new_context(host=self._host, settings=self._ucx_settings)
        await super().start()

    async def close(self) -> None:
        """See ``Transport``."""
        await super().close()
        self._context = None

    def new_port(self, on_failed: Callable[[str], None]) -> UcxPort:
        """A UCX worker for one peer; for links."""
        if self._library is None or self._context is None:
            raise PeerGone("the ucx transport is not open")
        return UcxPort(self._library, self._context, on_failed)

    def _accept(self) -> IncomingLink:
        return _UcxIncomingLink(self)

    async def _greet(self, link: OutgoingLink, address: Address) -> None:
        answer = await link.greet(self._greeting(address))
        if answer.can_pull or address.kind != "ucx":
            return
        port = self.new_port(link.connection.close)
        try:
            answer = await link.greet(
                Greeting(
                    token=address.token, sender=self.address, worker_address=port.worker_address
                )
            )
            port.connect(answer.worker_address)
        except BaseException:
            port.close("the peer was not reached")
            raise
        link.sending = UcxSending(port)


class _UcxIncomingLink(IncomingLink):
    def __init__(self, transport: UcxTransport) -> None:
        super().__init__(transport)
        self._transport = transport

    def answer(self, greeting: Greeting) -> Greeting:
        if not greeting.worker_address:
            return super().answer(greeting)
        try:
            port = self._transport.new_port(self.connection.close)
            self.receiving = UcxReceiving(port, self.connection)
            port.connect(greeting.worker_address)
        except TransportError as error:
            raise ProtocolError(str(error)) from error
        return Greeting(
            token=greeting.token,
            sender=self._transport.address,
            worker_address=port.worker_address,
        )
