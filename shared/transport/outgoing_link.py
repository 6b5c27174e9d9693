"""The sending end of a link."""

import asyncio

from shared.errors import PeerGone, ProtocolError
from shared.transport.frames import FrameType
from shared.transport.inbox import INLINE_BYTES
from shared.transport.links import MEMORY_ADDRESS, Key, Link, LinkOwner, Sending
from shared.transport.peering import Greeting
from shared.transport.piece import PieceHeader
from shared.transport.pull import address_of
from shared.transport.stream import StreamSending


class OutgoingLink(Link):
    """A link that we dialled: we offer pieces, the peer takes them."""

    def __init__(self, owner: LinkOwner, peer: bytes) -> None:
        super().__init__(owner, peer)
        self.sending: Sending = StreamSending(self.connection)
        self._token = b""
        self._greetings: asyncio.Queue[Greeting | None] = asyncio.Queue()
        self._answers: dict[Key, asyncio.Future[bool]] = {}

    @property
    def num_quarantined(self) -> int:
        """See ``Link``."""
        return self.sending.num_quarantined

    @property
    def quarantined_bytes(self) -> int:
        """See ``Link``."""
        return self.sending.quarantined_bytes

    async def greet(self, greeting: Greeting) -> Greeting:
        """Send a greeting and return its answer. Raises ``PeerGone``."""
        self._token = greeting.token
        self.connection.send_control(FrameType.GREETING, body=greeting.encode())
        answer = await self._greetings.get()
        if answer is None:
            raise PeerGone("the peer closed the connection instead of greeting")
        return answer

    async def send(self, header: PieceHeader, payload: memoryview) -> None:
        """Offer a piece; return when its memory is free. Raises ``PeerGone``."""
        key = (header.transfer_id, header.piece)
        if payload.nbytes <= INLINE_BYTES:
            await self.connection.send(FrameType.OFFER, *key, header.pack() + payload)
            return
        if key in self._answers:
            raise ValueError(f"piece {key[1]} of transfer {key[0]} is already being sent")
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[key] = answer
        is_over = False
        try:
            address = MEMORY_ADDRESS.pack(address_of(payload))
            await self.connection.send(FrameType.OFFER, *key, header.pack() + address)
            is_accepted = await answer
            is_over = not is_accepted or await self.sending.send(key, payload)
        finally:
            del self._answers[key]
            if not is_over:
                self.connection.send_control(FrameType.WITHDRAW, *key)

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """See ``FrameHandler``."""
        key = (transfer_id, piece)
        if kind is FrameType.GREETING:
            self._greetings.put_nowait(Greeting.decode(body, self._token))
        elif kind is FrameType.ACCEPT or kind is FrameType.DONE:
            answer = self._answers.get(key)
            if answer is not None and not answer.done():
                answer.set_result(kind is FrameType.ACCEPT)
            elif answer is not None and kind is FrameType.DONE:
                self.sending.stop(key)
        else:
            raise ProtocolError(f"{kind.name} from the receiving side")

    def on_lost(self, reason: str) -> None:
        """See ``FrameHandler``."""
        self._greetings.put_nowait(None)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerGone(reason))
                answer.exception()
        self.sending.fail(reason)
        super().on_lost(reason)
