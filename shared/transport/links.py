"""Links: one connection with one peer; pieces go one way, from whoever dialled.

The dialling side greets with its address and its memory card, the other side answers whether it can
read that memory. Then payloads go one of three ways, offers and everything else by frames:

======  ======================================================================================
pull    the receiver reads the payload from the sender's memory and says DONE (same machine)
stream  ACCEPT, then the payload in DATA frames on the connection
UCX     ACCEPT, then the payload as a UCX message (``ucx``), instead of the stream
======  ======================================================================================
"""

import struct
from abc import ABC, abstractmethod
from typing import Protocol

from shared.errors import ProtocolError
from shared.transport.frames import FrameConnection, FrameType

MEMORY_ADDRESS = struct.Struct("<Q")
"""What follows the header of a payload that does not travel with its offer."""

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


class Quarantine(Protocol):
    """Buffers that nobody waits for any more and that something may still touch."""

    @property
    def num_quarantined(self) -> int:
        """How many."""

    @property
    def quarantined_bytes(self) -> int:
        """Their size."""


class Receiving(Quarantine, Protocol):
    """How payloads that are not pulled arrive."""

    async def land(self, key: Key, buffer: memoryview) -> None:
        """Let an offered payload land in ``buffer``; see ``Offer.accept``."""

    def withdraw(self, key: Key) -> None:
        """The (rest of the) payload will not come."""

    def fail(self, reason: str) -> None:
        """The link is gone: end all with ``PeerGone`` and let go of all buffers."""

    def data_target(self, key: Key, nbytes: int) -> memoryview:
        """Where data from the connection goes."""

    def on_data(self, key: Key, nbytes: int) -> None:
        """It is there."""


class Sending(Quarantine, Protocol):
    """How payloads that are not pulled are sent."""

    async def send(self, key: Key, payload: memoryview) -> bool:
        """Send an accepted payload; False if it was stopped and is to be withdrawn."""

    def stop(self, key: Key) -> None:
        """The receiver does not want the rest."""

    def fail(self, reason: str) -> None:
        """The link is gone."""


class Link(ABC):
    """One end of a connection; implements ``FrameHandler``.

    ``peer`` is the other side's address, empty while it has not said who it is.
    """

    def __init__(self, owner: LinkOwner, peer: bytes) -> None:
        self.connection = FrameConnection(self)
        self.peer = peer
        self.owner = owner

    @property
    @abstractmethod
    def num_quarantined(self) -> int:
        """Buffers given up by their callers and still referred to here."""

    @property
    @abstractmethod
    def quarantined_bytes(self) -> int:
        """Their size."""

    async def wait_lost(self) -> None:
        """Return when the connection is gone and no buffer is referred to any more."""
        await self.connection.wait_lost()

    @abstractmethod
    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        """See ``FrameHandler``."""

    def on_made(self) -> None:
        """See ``FrameHandler``."""
        self.owner.link_made(self)

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        """See ``FrameHandler``."""
        raise ProtocolError("data from the receiving side")

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        """See ``FrameHandler``."""
        raise ProtocolError("data from the receiving side")

    def on_lost(self, reason: str) -> None:
        """See ``FrameHandler``."""
        self.owner.link_lost(self, reason)
