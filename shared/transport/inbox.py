"""Where the two halves of a piece meet: what a peer offers and what somebody here waits for."""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict

from shared.errors import PeerGone, TransportError
from shared.transport.piece import PieceHeader

INLINE_BYTES = 16 << 10
"""Payloads up to this size travel with their offer and wait at the receiver."""

_OFFER_BYTES = 512
"""What an unclaimed offer itself is taken to cost."""

_NUM_REMEMBERED = 1 << 16
"""How many ended transfers are remembered; later pieces of older ones count as unclaimed."""

_NUM_SOURCES = 1 << 12
"""For how many transfers it is remembered which link they come from."""


class Offer(ABC):
    """A piece that a peer has announced and that waits to be taken.

    Small payloads come along (``inline``); for others the peer keeps the bytes until ``accept``,
    so that what nobody asks for costs the receiver next to nothing. ``link`` identifies where the
    offer came from.
    """

    def __init__(self, header: PieceHeader, inline: memoryview | None, link: object) -> None:
        self.header = header
        self.inline = inline
        self.link: object | None = link

    @property
    def cost_bytes(self) -> int:
        """Memory that the offer is taken to cost while nobody claims it."""
        return _OFFER_BYTES + (self.inline.nbytes if self.inline is not None else 0)

    @abstractmethod
    async def accept(self, buffer: memoryview) -> None:
        """Let the payload land in ``buffer``, which has ``header.nbytes`` bytes.

        Once, and only where there is no ``inline``. Raises ``PeerGone``, or ``TransferTimeout`` if
        the sender has given the piece up. When cancelled, the buffer stays with the link, in
        quarantine, as bytes may still arrive.
        """

    @abstractmethod
    def refuse(self) -> None:
        """Nobody will ever take it: the peer's send ends as if it had been taken."""


class Inbox:
    """Matches offers with waiting receivers, by (transfer, piece).

    What one link may leave here unclaimed is bounded by ``max_unclaimed_bytes``. A transfer can be
    ended: its pieces are refused from then on, and whoever waits for one is told why.
    """

    def __init__(self, max_unclaimed_bytes: int) -> None:
        self._max_unclaimed_bytes = max_unclaimed_bytes
        self._unclaimed: dict[int, dict[int, Offer]] = {}
        self._unclaimed_bytes: Counter[object] = Counter()
        self._waiting: dict[int, dict[int, asyncio.Future[Offer]]] = {}
        self._ended: OrderedDict[int, TransportError] = OrderedDict()
        self._source: OrderedDict[int, object] = OrderedDict()
        self._closed: str | None = None
        self.num_refused = 0

    def put(self, offer: Offer) -> bool:
        """Take an offer in; False if its link already has too much here and must be closed."""
        transfer_id, piece = offer.header.transfer_id, offer.header.piece
        if (
            self._closed is not None
            or transfer_id in self._ended
            or piece in self._unclaimed.get(transfer_id, {})
        ):
            self._refuse(offer)
            return True
        self._source[transfer_id] = offer.link
        self._source.move_to_end(transfer_id)
        if len(self._source) > _NUM_SOURCES:
            self._source.popitem(last=False)
        future = self._waiting.get(transfer_id, {}).get(piece)
        if future is not None and not future.done():
            future.set_result(offer)
            return True
        if self._unclaimed_bytes[offer.link] + offer.cost_bytes > self._max_unclaimed_bytes:
            return False
        self._unclaimed.setdefault(transfer_id, {})[piece] = offer
        self._unclaimed_bytes[offer.link] += offer.cost_bytes
        return True

    async def take(self, transfer_id: int, piece: int) -> Offer:
        """Wait for a piece to be offered; the offer is the caller's then.

        Raises the reason if the transfer has ended, ``PeerGone`` if the inbox is closed,
        ``ValueError`` if somebody else already waits for the piece.
        """
        if self._closed is not None:
            raise PeerGone(self._closed)
        ended = self._ended.get(transfer_id)
        if ended is not None:
            raise type(ended)(*ended.args)
        offer = self._unclaimed.get(transfer_id, {}).get(piece)
        if offer is not None:
            self._drop(offer)
            return offer
        waiting = self._waiting.setdefault(transfer_id, {})
        if piece in waiting:
            raise ValueError(f"piece {piece} of transfer {transfer_id} is already waited for")
        future: asyncio.Future[Offer] = asyncio.get_running_loop().create_future()
        waiting[piece] = future
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._refuse(future.result())
            raise
        finally:
            del waiting[piece]
            if not waiting:
                self._waiting.pop(transfer_id, None)

    def end(self, transfer_id: int, reason: TransportError) -> None:
        """Refuse all pieces of a transfer that nobody has taken yet, now and later.

        Whoever waits for one, or asks for one later, gets the ``reason`` raised.
        """
        self._ended[transfer_id] = reason
        self._ended.move_to_end(transfer_id)
        if len(self._ended) > _NUM_REMEMBERED:
            self._ended.popitem(last=False)
        for offer in list(self._unclaimed.get(transfer_id, {}).values()):
            self._drop(offer)
            self._refuse(offer)
        self._fail_waiting(transfer_id, reason)

    def lose(self, link: object, reason: PeerGone) -> None:
        """A link is gone: transfers that came over it are ended.

        One of which only such pieces are here as came with their payload is not: they can be taken.
        """
        orphans = [offer for offer in self._offers() if offer.link is link]
        for transfer_id in {o.header.transfer_id for o in orphans if o.inline is None}:
            self.end(transfer_id, reason)
        for transfer_id in [x for x, source in self._source.items() if source is link]:
            del self._source[transfer_id]
            if transfer_id not in self._unclaimed:
                self.end(transfer_id, reason)
        kept_bytes = self._unclaimed_bytes.pop(link, 0)
        if self._unclaimed_bytes[None] + kept_bytes > self._max_unclaimed_bytes:
            for offer in [offer for offer in self._offers() if offer.link is None]:
                self._drop(offer)
        self._unclaimed_bytes[None] += kept_bytes
        for offer in orphans:
            offer.link = None

    def close(self, reason: str) -> None:
        """Raise ``PeerGone`` to whoever waits or asks from now on.

        Offers are forgotten, not refused: their senders learn it from their links.
        """
        self._closed = reason
        for offer in self._offers():
            self._drop(offer)
        for transfer_id in list(self._waiting):
            self._fail_waiting(transfer_id, PeerGone(reason))

    def _offers(self) -> list[Offer]:
        return [offer for offers in self._unclaimed.values() for offer in offers.values()]

    def _fail_waiting(self, transfer_id: int, reason: TransportError) -> None:
        for future in self._waiting.get(transfer_id, {}).values():
            if not future.done():
                future.set_exception(type(reason)(*reason.args))

    def _refuse(self, offer: Offer) -> None:
        self.num_refused += 1
        if offer.inline is None:
            offer.refuse()

    def _drop(self, offer: Offer) -> None:
        offers = self._unclaimed[offer.header.transfer_id]
        del offers[offer.header.piece]
        if not offers:
            del self._unclaimed[offer.header.transfer_id]
        self._unclaimed_bytes[offer.link] -= offer.cost_bytes
