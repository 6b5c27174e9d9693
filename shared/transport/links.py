"""What links have in common: one connection with one peer, data one way, from whoever dialled."""

import asyncio
from abc import ABC, abstractmethod
from typing import Protocol

from shared.errors import ProtocolError
from shared.transport.frames import FrameConnection, FrameType
from shared.transport.inbox import Inbox
from shared.transport.peering import Greeting
from shared.transport.piece import PieceHeader

GREETING_TIMEOUT_S = 10.0
"""Whoever connects and does not say who it is by then is thrown out."""

Key = tuple[int, int]
"""(transfer_id, piece)"""


class LinkOwner(Protocol):
    """Who keeps the links: a transport."""

    @property
    def address(self) -> bytes:
        """Its own address."""

    def link_made(self, link: "Link") -> None:
        """A link is connected."""

    def link_lost(self, link: "Link", reason: str) -> None:
        """A link's connection is gone."""


class Link(ABC):
    """One end of a connection; implements ``FrameHandler``.

    ``peer`` is the other side's address, empty while it has not said who it is.
    """

    def __init__(self, owner: LinkOwner, peer: bytes) -> None:
        self.connection = FrameConnection(self)
        self.peer = peer
        self._owner = owner

    @property
    @abstractmethod
    def num_quarantined(self) -> int:
        """Buffers given up by their callers and still referred to here."""

    @property
    @abstractmethod
    def quarantined_bytes(self) -> int:
        """Their size."""

    @abstractmethod
    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """See ``FrameHandler``."""

    def on_made(self) -> None:
        """See ``FrameHandler``."""
        self._owner.link_made(self)

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        """See ``FrameHandler``; no data is expected unless a subclass says so."""
        raise ProtocolError("data that nobody asked for")

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        """See ``FrameHandler``."""
        raise ProtocolError("data that nobody asked for")

    def on_lost(self, reason: str) -> None:
        """See ``FrameHandler``."""
        self._fail(reason)
        self._owner.link_lost(self, reason)

    @abstractmethod
    def _fail(self, reason: str) -> None:
        """End what is in flight with ``PeerGone`` and let go of all buffers."""


class OutgoingLink(Link):
    """A link that we dialled: we offer pieces, the peer takes them."""

    @abstractmethod
    async def send(self, header: PieceHeader, payload: memoryview) -> None:
        """Offer a piece; return when its memory is free. Raises ``PeerGone``."""


class IncomingLink(Link):
    """A link that a peer dialled: it offers pieces, we take them. It has to say first who it is."""

    def __init__(self, owner: LinkOwner, inbox: Inbox, token: bytes) -> None:
        super().__init__(owner, b"")
        self._inbox = inbox
        self._token = token
        self._patience: asyncio.TimerHandle | None = None

    def on_made(self) -> None:
        """See ``FrameHandler``."""
        super().on_made()
        self._patience = asyncio.get_running_loop().call_later(
            GREETING_TIMEOUT_S, self.connection.close, "the peer did not say who it is"
        )

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """See ``FrameHandler``."""
        if self.peer:
            self._on_control(kind, (transfer_id, piece), body)
        elif kind is FrameType.GREETING:
            greeting = Greeting.decode(body, self._token)
            if not greeting.sender:
                raise ProtocolError("a greeting from nobody")
            self.peer = greeting.sender
            self._forgive()
            self._on_greeting(greeting)
        else:
            raise ProtocolError("no greeting")

    def on_lost(self, reason: str) -> None:
        """See ``FrameHandler``."""
        self._forgive()
        super().on_lost(reason)

    def _on_greeting(self, greeting: Greeting) -> None:
        """The peer is who it should be."""

    @abstractmethod
    def _on_control(self, kind: FrameType, key: Key, body: memoryview) -> None:
        """A control frame after the greeting; may raise ``ProtocolError``."""

    def _forgive(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
