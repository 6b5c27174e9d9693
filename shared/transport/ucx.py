"""The bulk face over UCX: shared memory within a host, what UCX finds between hosts. Linux only."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from shared.errors import PeerGone, ProtocolError, TransportError
from shared.transport.connected import ConnectedTransport
from shared.transport.frames import FrameType
from shared.transport.inbox import INLINE_BYTES, Inbox, Offer
from shared.transport.links import IncomingLink, Key, LinkOwner, OutgoingLink
from shared.transport.peering import Address, Greeting, Kind
from shared.transport.piece import HEADER_BYTES, PieceHeader
from shared.transport.ucx_library import UcxLibrary
from shared.transport.ucx_port import Operation, UcxPort

OFFER_TAG = 1
"""All offers of a link; payloads have their piece's own tag, which is larger than 2**20."""

_NUM_STANDING_RECEIVES = 16
"""Offers that can arrive in one go; more wait in UCX."""

_MAX_OFFER_BYTES = HEADER_BYTES + INLINE_BYTES


class UcxTransport(ConnectedTransport):
    """Pieces as UCX messages: an offer, and the payload by rendezvous when somebody takes it.

    Two peers meet over a TCP connection, which then only tells when one of them is gone: for UCX a
    killed peer over shared memory is no event. Each link has UCX workers of its own on both sides
    (about 2 MiB and 10 file descriptors), see ``ucx_library`` for why. Several transports may live
    in one process, at the same time or one after the other.
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

    def _accept(self) -> IncomingLink:
        return _UcxIncoming(self, self._inbox, self._token, self._new_port)

    async def _open(self, peer: bytes, address: Address) -> OutgoingLink:
        link = _UcxOutgoing(self, peer, self._new_port)
        try:
            await self._connect(link.connection, address)
            await link.greet(address.token)
        except BaseException:
            link.give_up()
            raise
        return link

    def _new_port(self, on_failed: Callable[[str], None]) -> UcxPort:
        if self._library is None or self._context is None:
            raise PeerGone("the ucx transport is not open")
        return UcxPort(self._library, self._context, on_failed)


_NewPort = Callable[[Callable[[str], None]], UcxPort]


class _UcxOffer(Offer):
    def __init__(
        self, header: PieceHeader, inline: memoryview | None, link: object, port: UcxPort
    ) -> None:
        super().__init__(header, inline, link)
        self._port = port

    async def accept(self, buffer: memoryview) -> None:
        await self._port.wait(self._port.post_receive(buffer, self.header.tag))

    def refuse(self) -> None:
        self._port.throw_away(self.header.tag)


class _UcxIncoming(IncomingLink):
    def __init__(self, owner: LinkOwner, inbox: Inbox, token: bytes, new_port: _NewPort) -> None:
        super().__init__(owner, inbox, token)
        self._new_port = new_port
        self._port: UcxPort | None = None

    @property
    def num_quarantined(self) -> int:
        return len(self._port.abandoned()) if self._port is not None else 0

    @property
    def quarantined_bytes(self) -> int:
        return _total_bytes(self._port)

    def _on_greeting(self, greeting: Greeting) -> None:
        try:
            self._port = self._new_port(self.connection.close)
            self._port.connect(greeting.worker_address)
            for _ in range(_NUM_STANDING_RECEIVES):
                self._expect_offer(self._port, memoryview(bytearray(_MAX_OFFER_BYTES)))
        except TransportError as error:
            self.connection.close(str(error))
            return
        answer = Greeting(
            token=self._token,
            sender=self._owner.address,
            worker_address=self._port.worker_address,
        )
        self.connection.send_control(FrameType.GREETING, body=answer.encode())

    def _on_control(self, kind: FrameType, key: Key, body: memoryview) -> None:
        raise ProtocolError(f"{kind.name} beside UCX")

    def _fail(self, reason: str) -> None:
        if self._port is not None:
            # What a peer sent just before it closed the connection is still to be taken in.
            self._port.drain()
            self._port.close(reason)

    def _expect_offer(self, port: UcxPort, buffer: memoryview) -> None:
        port.post_receive(
            buffer, OFFER_TAG, lambda operation: self._on_offer(port, buffer, operation)
        )

    def _on_offer(self, port: UcxPort, buffer: memoryview, operation: Operation) -> None:
        if operation.error is not None:
            self.connection.close(operation.error)
            return
        try:
            header = PieceHeader.unpack(buffer)
            inline = None
            if header.nbytes <= INLINE_BYTES:
                inline = memoryview(bytes(buffer[HEADER_BYTES : HEADER_BYTES + header.nbytes]))
            if not self._inbox.put(_UcxOffer(header, inline, self, port)):
                raise ProtocolError("too many pieces that nobody asked for")
        except ProtocolError as error:
            self.connection.close(f"the peer breaks the protocol: {error}")
            return
        self._expect_offer(port, buffer)


class _UcxOutgoing(OutgoingLink):
    def __init__(self, owner: LinkOwner, peer: bytes, new_port: _NewPort) -> None:
        super().__init__(owner, peer)
        self._port = new_port(self.connection.close)
        self._token = b""
        self._welcome: asyncio.Future[Greeting] = asyncio.get_running_loop().create_future()
        self._active: set[int] = set()

    @property
    def num_quarantined(self) -> int:
        return len(self._port.abandoned())

    @property
    def quarantined_bytes(self) -> int:
        return _total_bytes(self._port)

    async def greet(self, token: bytes) -> None:
        """Introduce ourselves and connect the two UCX workers. Raises ``PeerGone``."""
        self._token = token
        greeting = Greeting(
            token=token, sender=self._owner.address, worker_address=self._port.worker_address
        )
        self.connection.send_control(FrameType.GREETING, body=greeting.encode())
        answer = await self._welcome
        self._port.connect(answer.worker_address)

    def give_up(self) -> None:
        """The peer was not reached."""
        self.connection.close("the peer was not reached")
        self._fail("the peer was not reached")

    async def send(self, header: PieceHeader, payload: memoryview) -> None:
        if payload.nbytes <= INLINE_BYTES:
            await self._port.wait(self._port.post_send(header.pack() + payload, OFFER_TAG))
            return
        if header.tag in self._active:
            raise ValueError(
                f"piece {header.piece} of transfer {header.transfer_id} is already being sent"
            )
        self._active.add(header.tag)
        try:
            offering = self._port.post_send(header.pack(), OFFER_TAG)
            sending = self._port.post_send(payload, header.tag)
            await self._port.wait(sending)
            await self._port.wait(offering)
        finally:
            self._active.discard(header.tag)

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        if kind is not FrameType.GREETING or self._welcome.done():
            raise ProtocolError(f"{kind.name} beside UCX")
        self._welcome.set_result(Greeting.decode(body, self._token))

    def _fail(self, reason: str) -> None:
        if not self._welcome.done():
            self._welcome.set_exception(PeerGone(reason))
            self._welcome.exception()
        self._port.close(reason)


def _total_bytes(port: UcxPort | None) -> int:
    if port is None:
        return 0
    return sum(memoryview(operation.buffer).nbytes for operation in port.abandoned())
