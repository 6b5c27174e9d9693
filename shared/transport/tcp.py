"""The bulk face over TCP: everywhere, across machines, TLS possible."""

import asyncio
from typing import ClassVar

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.connected import ConnectedTransport
from shared.transport.frames import FrameType
from shared.transport.inbox import INLINE_BYTES, Inbox, Offer
from shared.transport.links import IncomingLink, Key, LinkOwner, OutgoingLink
from shared.transport.peering import Address, Greeting, Kind
from shared.transport.piece import HEADER_BYTES, PieceHeader

CHUNK_BYTES = 256 << 10
"""Payloads are sent in frames of this size, so that pieces on one connection take turns."""


class TcpTransport(ConnectedTransport):
    """Pieces in frames over one connection a direction.

    A payload is sent when the receiver has asked for it, straight into the memory where it is to
    land; so the connection never has to be paused, and no piece waits behind one that nobody wants.
    """

    kind: ClassVar[Kind] = "tcp"

    def _accept(self) -> IncomingLink:
        return _TcpIncoming(self, self._inbox, self._token)

    async def _open(self, peer: bytes, address: Address) -> OutgoingLink:
        link = _TcpOutgoing(self, peer)
        await self._connect(link.connection, address)
        greeting = Greeting(token=address.token, sender=self.address)
        link.connection.send_control(FrameType.GREETING, body=greeting.encode())
        return link


class _Landing:
    """A buffer that a peer is filling."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.num_filled = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_abandoned = False

    def fail(self, error: PeerGone | TransferTimeout) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class _TcpOffer(Offer):
    def __init__(
        self, header: PieceHeader, inline: memoryview | None, link: "_TcpIncoming", key: Key
    ) -> None:
        super().__init__(header, inline, link)
        self._incoming = link
        self._key = key

    async def accept(self, buffer: memoryview) -> None:
        await self._incoming.accept(self._key, buffer)

    def refuse(self) -> None:
        self._incoming.refuse(self._key)


class _TcpIncoming(IncomingLink):
    def __init__(self, owner: LinkOwner, inbox: Inbox, token: bytes) -> None:
        super().__init__(owner, inbox, token)
        self._landings: dict[Key, _Landing] = {}
        # Pieces whose payload is still with the peer, neither asked for nor refused.
        self._offered: set[Key] = set()
        self._lost: str | None = None

    @property
    def num_quarantined(self) -> int:
        return sum(landing.is_abandoned for landing in self._landings.values())

    @property
    def quarantined_bytes(self) -> int:
        return sum(x.buffer.nbytes for x in self._landings.values() if x.is_abandoned)

    async def accept(self, key: Key, buffer: memoryview) -> None:
        if self._lost is not None:
            raise PeerGone(self._lost)
        if key not in self._offered:
            raise TransferTimeout(f"the sender gave up piece {key[1]} of transfer {key[0]}")
        self._offered.discard(key)
        landing = _Landing(buffer)
        self._landings[key] = landing
        self.connection.send_control(FrameType.ACCEPT, *key)
        try:
            await landing.done
        except asyncio.CancelledError:
            # What is on its way still lands; then the peer is done, or it answers WITHDRAW.
            landing.is_abandoned = True
            self.connection.send_control(FrameType.REFUSE, *key)
            raise

    def refuse(self, key: Key) -> None:
        if key in self._offered:
            self._offered.discard(key)
            self.connection.send_control(FrameType.REFUSE, *key)

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        landing = self._landings.get((transfer_id, piece))
        if landing is None or landing.num_filled + nbytes > landing.buffer.nbytes:
            raise ProtocolError(f"{nbytes} bytes that nobody asked for")
        return landing.buffer[landing.num_filled : landing.num_filled + nbytes]

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        landing = self._landings[transfer_id, piece]
        landing.num_filled += nbytes
        if landing.num_filled == landing.buffer.nbytes:
            del self._landings[transfer_id, piece]
            if not landing.done.done():
                landing.done.set_result(None)

    def _on_control(self, kind: FrameType, key: Key, body: memoryview) -> None:
        if kind is FrameType.OFFER:
            self._on_offer(key, body)
        elif kind is FrameType.WITHDRAW:
            self._offered.discard(key)
            landing = self._landings.pop(key, None)
            if landing is not None:
                landing.fail(
                    TransferTimeout(f"the sender gave up piece {key[1]} of transfer {key[0]}")
                )
        else:
            raise ProtocolError(f"{kind.name} from the sending side")

    def _fail(self, reason: str) -> None:
        self._lost = reason
        self._offered.clear()
        for landing in self._landings.values():
            landing.fail(PeerGone(reason))
        self._landings.clear()

    def _on_offer(self, key: Key, body: memoryview) -> None:
        header = PieceHeader.unpack(body)
        is_inline = header.nbytes <= INLINE_BYTES
        inline = memoryview(bytes(body[HEADER_BYTES:])) if is_inline else None
        if (header.transfer_id, header.piece) != key or (
            body.nbytes - HEADER_BYTES != (header.nbytes if is_inline else 0)
        ):
            raise ProtocolError("an offer that contradicts itself")
        if key in self._offered or key in self._landings:
            raise ProtocolError(f"piece {key[1]} of transfer {key[0]} is offered twice")
        if not is_inline:
            self._offered.add(key)
        if not self._inbox.put(_TcpOffer(header, inline, self, key)):
            raise ProtocolError("too many pieces that nobody asked for")


class _TcpOutgoing(OutgoingLink):
    def __init__(self, owner: LinkOwner, peer: bytes) -> None:
        super().__init__(owner, peer)
        self._answers: dict[Key, asyncio.Future[bool]] = {}
        self._refused: set[Key] = set()

    @property
    def num_quarantined(self) -> int:
        return self.connection.num_abandoned

    @property
    def quarantined_bytes(self) -> int:
        return self.connection.abandoned_bytes

    async def send(self, header: PieceHeader, payload: memoryview) -> None:
        key = (header.transfer_id, header.piece)
        if payload.nbytes <= INLINE_BYTES:
            await self.connection.send(FrameType.OFFER, *key, header.pack() + payload)
            return
        if key in self._answers:
            raise ValueError(f"piece {key[1]} of transfer {key[0]} is already being sent")
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[key] = answer
        is_complete = False
        try:
            await self.connection.send(FrameType.OFFER, *key, header.pack())
            if await answer:
                is_complete = await self._send_payload(key, payload)
        finally:
            del self._answers[key]
            self._refused.discard(key)
            if not is_complete:
                self.connection.send_control(FrameType.WITHDRAW, *key)

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        if kind not in (FrameType.ACCEPT, FrameType.REFUSE):
            raise ProtocolError(f"{kind.name} from the receiving side")
        key = (transfer_id, piece)
        answer = self._answers.get(key)
        if answer is None:
            return  # given up in the meantime: the WITHDRAW is on its way
        if not answer.done():
            answer.set_result(kind is FrameType.ACCEPT)
        elif kind is FrameType.REFUSE:
            self._refused.add(key)

    def _fail(self, reason: str) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerGone(reason))
                answer.exception()

    async def _send_payload(self, key: Key, payload: memoryview) -> bool:
        for offset in range(0, payload.nbytes, CHUNK_BYTES):
            if key in self._refused:
                return False
            chunk = payload[offset : offset + CHUNK_BYTES]
            await self.connection.send(FrameType.DATA, *key, chunk)
        return True
