"""The receiving end of a link."""

import asyncio
from typing import Protocol

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.frames import FrameType
from shared.transport.inbox import INLINE_BYTES, Inbox, Offer
from shared.transport.links import MEMORY_ADDRESS, Key, Link, LinkOwner, Receiving
from shared.transport.peering import Greeting
from shared.transport.piece import HEADER_BYTES, PieceHeader
from shared.transport.pull import PeerMemory, Pull
from shared.transport.stream import StreamReceiving

GREETING_TIMEOUT_S = 10.0
"""Whoever connects and does not say who it is by then is thrown out."""

_PULL_ON_LOOP_BYTES = 2 << 20
"""Reading this much takes about 0.3 ms; more goes to a thread."""


class IncomingOwner(LinkOwner, Protocol):
    """What an incoming link needs of its transport besides."""

    @property
    def inbox(self) -> Inbox:
        """Where offers go."""

    @property
    def token(self) -> bytes:
        """What a greeting has to know."""

    @property
    def may_pull(self) -> bool:
        """Whether to try to read peers' memory."""


class IncomingLink(Link):
    """A link that a peer dialled: it offers pieces, we take them. It has to say first who it is."""

    def __init__(self, owner: IncomingOwner) -> None:
        super().__init__(owner, b"")
        self.receiving: Receiving = StreamReceiving(self.connection)
        self._owner = owner
        self._memory: PeerMemory | None = None
        self._pulls: dict[Key, Pull] = {}
        self._readings: set[asyncio.Future[None]] = set()
        # Pieces whose payload is still with the peer, neither asked for nor refused.
        self._offered: set[Key] = set()
        self._lost: str | None = None
        self._patience: asyncio.TimerHandle | None = None

    @property
    def num_quarantined(self) -> int:
        """See ``Link``."""
        return self.receiving.num_quarantined + sum(x.is_abandoned for x in self._pulls.values())

    @property
    def quarantined_bytes(self) -> int:
        """See ``Link``."""
        pulling = sum(pull.nbytes for pull in self._pulls.values() if pull.is_abandoned)
        return self.receiving.quarantined_bytes + pulling

    async def wait_lost(self) -> None:
        """See ``Link``."""
        await super().wait_lost()
        if self._readings:
            await asyncio.wait(self._readings)

    async def accept(self, key: Key, address: int, buffer: memoryview) -> None:
        """See ``Offer``; the payload is at ``address`` in the peer's memory."""
        if self._lost is not None:
            raise PeerGone(self._lost)
        if key not in self._offered:
            raise TransferTimeout(f"the sender gave up piece {key[1]} of transfer {key[0]}")
        self._offered.discard(key)
        if self._memory is not None:
            try:
                await self._pull(self._memory, key, address, buffer)
            except OSError:
                pass  # memory that cannot be read like this, a device's perhaps
            else:
                self.connection.send_control(FrameType.DONE, *key)
                return
        await self.receiving.land(key, buffer)

    def refuse(self, key: Key) -> None:
        """See ``Offer``."""
        if key in self._offered:
            self._offered.discard(key)
            self.connection.send_control(FrameType.DONE, *key)

    def on_made(self) -> None:
        """See ``FrameHandler``."""
        super().on_made()
        self._patience = asyncio.get_running_loop().call_later(
            GREETING_TIMEOUT_S, self.connection.close, "the peer did not say who it is"
        )

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """See ``FrameHandler``."""
        key = (transfer_id, piece)
        if kind is FrameType.GREETING:
            self._forgive()
            answer = self.answer(Greeting.decode(body, self._owner.token))
            self.connection.send_control(FrameType.GREETING, body=answer.encode())
        elif not self.peer:
            raise ProtocolError("no greeting")
        elif kind is FrameType.OFFER:
            self._on_offer(key, body)
        elif kind is FrameType.WITHDRAW:
            self._offered.discard(key)
            pull = self._pulls.get(key)
            if pull is not None:
                pull.stop(TransferTimeout(f"the sender gave up piece {piece} of {transfer_id}"))
            self.receiving.withdraw(key)
        else:
            raise ProtocolError(f"{kind.name} from the sending side")

    def answer(self, greeting: Greeting) -> Greeting:
        """What to answer to a greeting; may raise ``ProtocolError``."""
        self.peer = greeting.sender
        if self._owner.may_pull:
            self._memory = PeerMemory.open(greeting.memory_card)
        return Greeting(
            token=self._owner.token, sender=self._owner.address, can_pull=self._memory is not None
        )

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        """See ``FrameHandler``."""
        return self.receiving.data_target((transfer_id, piece), nbytes)

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        """See ``FrameHandler``."""
        self.receiving.on_data((transfer_id, piece), nbytes)

    def on_lost(self, reason: str) -> None:
        """See ``FrameHandler``."""
        self._lost = reason
        self._forgive()
        self._offered.clear()
        for pull in self._pulls.values():
            pull.stop(PeerGone(reason))
        self.receiving.fail(reason)
        super().on_lost(reason)

    async def _pull(self, memory: PeerMemory, key: Key, address: int, buffer: memoryview) -> None:
        pull = Pull(buffer.nbytes)
        if buffer.nbytes <= _PULL_ON_LOOP_BYTES:
            memory.read(address, buffer, pull)
            return
        self._pulls[key] = pull
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(None, memory.read, address, buffer, pull)
        self._readings.add(reading)
        reading.add_done_callback(lambda _: self._pulls.pop(key))
        reading.add_done_callback(self._readings.discard)
        try:
            await asyncio.shield(reading)
        except OSError:
            pull.check()  # a sender that has given up may have freed the memory
            raise
        except asyncio.CancelledError:
            pull.is_abandoned = True
            pull.stop(TransferTimeout("nobody waits any more"))
            self.connection.send_control(FrameType.DONE, *key)
            raise

    def _on_offer(self, key: Key, body: memoryview) -> None:
        header = PieceHeader.unpack(body)
        rest = bytes(body[HEADER_BYTES:])
        is_inline = header.nbytes <= INLINE_BYTES
        if (header.transfer_id, header.piece) != key or len(rest) != (
            header.nbytes if is_inline else MEMORY_ADDRESS.size
        ):
            raise ProtocolError("an offer that contradicts itself")
        if is_inline:
            offer = LinkOffer(header, memoryview(rest), self, 0)
        elif key in self._offered:
            raise ProtocolError(f"piece {key[1]} of transfer {key[0]} is offered twice")
        else:
            self._offered.add(key)
            offer = LinkOffer(header, None, self, MEMORY_ADDRESS.unpack(rest)[0])
        if not self._owner.inbox.put(offer):
            raise ProtocolError("too many pieces that nobody asked for")

    def _forgive(self) -> None:
        if self._patience is not None:
            self._patience.cancel()


class LinkOffer(Offer):
    """A piece that came in over a link."""

    def __init__(
        self, header: PieceHeader, inline: memoryview | None, link: IncomingLink, address: int
    ) -> None:
        super().__init__(header, inline, link)
        self._incoming = link
        self._key = (header.transfer_id, header.piece)
        self._address = address

    async def accept(self, buffer: memoryview) -> None:
        """See ``Offer``."""
        await self._incoming.accept(self._key, self._address, buffer)

    def refuse(self) -> None:
        """See ``Offer``."""
        self._incoming.refuse(self._key)
