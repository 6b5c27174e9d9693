"""The bulk face over UCX: shared memory within a host, what UCX finds between hosts. Linux only."""

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from shared.errors import PeerGone, ProtocolError
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
        return _UcxIncoming(self, self._inbox, self._token, self._library, self._context)

    async def _open(self, peer: bytes, address: Address) -> OutgoingLink:
        link = _UcxOutgoing(self, peer, self._library, self._context)
        try:
            await self._connect(link.connection, address)
            await link.greet(address.token)
        except BaseException:
            link.close("the peer was not reached")
            raise
        return link


class _UcxOffer(Offer):
    def __init__(
        self, header: PieceHeader, inline: memoryview | None, link: "_UcxIncoming"
    ) -> None:
        super().__init__(header, inline, link)
        self._port = link.port

    async def accept(self, buffer: memoryview) -> None:
        await self._port.wait(self._port.post_receive(buffer, self.header.tag))

    def refuse(self) -> None:
        self._port.throw_away(self.header.tag)
