"""The bulk face of the data plane: pieces of KV and weights, asynchronous, each with a deadline."""

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass

from shared.errors import ChecksumMismatch, PeerGone, ProtocolError, TransferTimeout
from shared.transport.checksum import checksum as checksum_of
from shared.transport.inbox import Inbox, Offer
from shared.transport.piece import (
    HEADER_BYTES,
    MAX_PIECE_BYTES,
    MAX_PIECES,
    Buffer,
    Piece,
    PieceHeader,
    PieceKind,
    TransferIds,
    byte_view,
    check_id,
)
from shared.transport.staging import StagingPool

__all__ = [
    "HEADER_BYTES",
    "MAX_PIECES",
    "MAX_PIECE_BYTES",
    "Buffer",
    "Piece",
    "PieceHeader",
    "PieceKind",
    "TransferIds",
    "Transport",
    "TransportStats",
]

_SUM_ON_LOOP_BYTES = 2 << 20
"""Summing this much takes about 0.2 ms; more goes to a thread, which costs as much to reach."""


@dataclass(slots=True)
class TransportStats:
    """What a transport has done since it was made; counts only grow."""

    num_pieces_sent: int = 0
    num_bytes_sent: int = 0
    num_pieces_received: int = 0
    num_bytes_received: int = 0
    num_send_timeouts: int = 0
    num_receive_timeouts: int = 0
    num_peers_gone: int = 0
    """Sends and receives that ended with ``PeerGone``."""
    num_checksum_mismatches: int = 0


class Transport(ABC):
    """Moves pieces between processes. One contract; UCX, TCP and memory keep it alike.

    **Sending.** ``send`` returns when the payload's memory may be changed again. For payloads up
    to ``inbox.INLINE_BYTES`` that is at once: they wait at the receiver. Larger ones stay where
    they are until the receiver asks for them, so a sender cannot flood a receiver. Returning is no
    receipt: a receiver that has discarded the transfer takes the piece and throws it away.

    **Receiving.** Whoever receives allocates the transfer's id (``TransferIds``) and tells the
    sender. Pieces are asked for by index; transfers may be received in any order and at the same
    time. Blocks of a KV pool are never the target: payloads land in staging memory of the
    transport (or in ``into``, which must then be nobody else's), because bytes of a transfer that
    timed out may still arrive later. Such a buffer is kept in *quarantine*: referenced, counted,
    and released only when the transport knows that nothing can write to it any more, at the latest
    when the link to that peer is closed.

    **Failing.** Every call ends by its deadline. A receive that ends with an error or is cancelled
    ends its whole transfer, see ``discard``. A peer that is killed is ``PeerGone`` at once; one
    that is frozen is ``TransferTimeout`` at the deadline; neither touches transfers with other
    peers. A peer that restarts has a new address.

    All methods belong to the event loop on which ``start`` ran.
    """

    name: str

    def __init__(
        self,
        *,
        verify: bool = True,
        max_unclaimed_bytes: int = 64 << 20,
        max_idle_staging_bytes: int = 256 << 20,
    ) -> None:
        """Make a transport; it has no address before ``start``.

        ``verify``: sum payloads when sending and check the sum when receiving; to be the same on
        both sides. ``max_unclaimed_bytes``: how much one peer may leave here that nobody has asked
        for yet. ``max_idle_staging_bytes``: landing memory kept for reuse.
        """
        self.verify = verify
        self.stats = TransportStats()
        self._inbox = Inbox(max_unclaimed_bytes)
        self._staging = StagingPool(max_idle_staging_bytes)
        self._is_open = False

    @property
    @abstractmethod
    def address(self) -> bytes:
        """What a peer needs to send here: opaque, at most 1 KiB, new with every start.

        It holds the secret that lets a peer in: give it to peers only.
        """

    @abstractmethod
    async def start(self) -> None:
        """Begin to listen; once. Raises ``TransportError`` if that cannot be done."""

    @abstractmethod
    async def close(self) -> None:
        """Close all links and release all memory; what is in flight ends with ``PeerGone``."""

    @abstractmethod
    async def forget_peer(self, peer: bytes) -> None:
        """Close the links with a peer, in both directions, and release what they quarantine.

        What is in flight with it ends with ``PeerGone`` on both sides. A later send starts anew.
        Nothing happens if there is no link.
        """

    @property
    @abstractmethod
    def num_quarantined(self) -> int:
        """Buffers that nobody waits for any more but that a link still refers to."""

    @property
    @abstractmethod
    def quarantined_bytes(self) -> int:
        """The size of those buffers."""

    async def send(
        self,
        peer: bytes,
        header: PieceHeader,
        payload: Buffer = b"",
        *,
        timeout_s: float,
        checksum: int | None = None,
    ) -> None:
        """Send one piece to the transport at address ``peer``.

        ``payload`` is any C-contiguous host buffer of up to 1 GiB; it must not change until this
        returns. ``nbytes`` and ``checksum`` of the header are filled in here; a ``checksum`` that
        is known already (a stored block's) is passed on instead of summing again. Connects when
        there is no link yet; the deadline covers that too.

        Raises ``TransferTimeout`` (the memory may still be read until the link closes; a receiver
        that takes it after it changed sees a ``ChecksumMismatch``), ``PeerGone``, or
        ``ValueError`` for a header or payload that cannot be sent.
        """
        self._check_open()
        view = byte_view(payload)
        if view.nbytes > MAX_PIECE_BYTES:
            raise ValueError(f"a piece of {view.nbytes} bytes; {MAX_PIECE_BYTES} are the most")
        check_id(header.transfer_id, header.piece)
        try:
            async with asyncio.timeout(timeout_s):
                if not self.verify:
                    checksum = 0
                elif checksum is None:
                    checksum = await _sum(view)
                await self._send(peer, header.sealed(view.nbytes, checksum), view)
        except TimeoutError as error:
            self.stats.num_send_timeouts += 1
            raise TransferTimeout(f"{_name(header)} was not taken in {timeout_s} s") from error
        except PeerGone:
            self.stats.num_peers_gone += 1
            raise
        self.stats.num_pieces_sent += 1
        self.stats.num_bytes_sent += view.nbytes

    async def receive(
        self,
        transfer_id: int,
        piece: int,
        *,
        timeout_s: float,
        into: Buffer | None = None,
    ) -> Piece:
        """Receive one piece, which may have arrived before or may still have to be sent.

        ``into``: writable memory of at least the payload's size, used instead of staging memory;
        after an error it must not be used again while ``num_quarantined`` counts it.

        Raises ``TransferTimeout``, ``PeerGone`` (the sender died with the piece), or
        ``ChecksumMismatch``; each ends the transfer. Raises ``ProtocolError`` if the payload is
        larger than ``into``, ``ValueError`` if somebody else already waits for this piece.
        """
        self._check_open()
        check_id(transfer_id, piece)
        try:
            async with asyncio.timeout(timeout_s):
                offer = await self._inbox.take(transfer_id, piece)
                received = await self._land(offer, into)
        except TimeoutError as error:
            self.stats.num_receive_timeouts += 1
            reason = f"piece {piece} of transfer {transfer_id} did not come in {timeout_s} s"
            self._inbox.end(transfer_id, TransferTimeout(reason))
            raise TransferTimeout(reason) from error
        except PeerGone as error:
            self.stats.num_peers_gone += 1
            self._inbox.end(transfer_id, error)
            raise
        except (TransferTimeout, ChecksumMismatch, ProtocolError, asyncio.CancelledError):
            self.discard(transfer_id)
            raise
        self.stats.num_pieces_received += 1
        self.stats.num_bytes_received += received.header.nbytes
        return received

    def discard(self, transfer_id: int) -> None:
        """Nobody will receive any more pieces of this transfer: drop what is here and what comes.

        To be called when a transfer is given up between two receives; an erring receive does it by
        itself. Sends of such pieces end as if the pieces had been taken.
        """
        reason = TransferTimeout(f"transfer {transfer_id} was given up by its receiver")
        self._inbox.end(transfer_id, reason)

    @abstractmethod
    async def _send(self, peer: bytes, header: PieceHeader, payload: memoryview) -> None:
        """Offer a sealed piece to a peer; return when its memory is free. Raises ``PeerGone``."""

    async def _land(self, offer: Offer, into: Buffer | None) -> Piece:
        header = offer.header
        if into is None:
            if offer.inline is not None:
                payload = offer.inline
            else:
                payload = self._staging.take(header.nbytes)
                await offer.accept(payload)
        else:
            target = byte_view(into)
            if target.nbytes < header.nbytes:
                if offer.inline is None:
                    offer.refuse()
                raise ProtocolError(
                    f"{_name(header)} has {header.nbytes} bytes, there is room for {target.nbytes}"
                )
            payload = target[: header.nbytes]
            if offer.inline is not None:
                payload[:] = offer.inline
            else:
                await offer.accept(payload)
        await self._verify(header, payload)
        return Piece(header, payload)

    async def _verify(self, header: PieceHeader, payload: memoryview) -> None:
        if not self.verify:
            return
        if header.checksum != await _sum(payload):
            self.stats.num_checksum_mismatches += 1
            raise ChecksumMismatch(
                f"{_name(header)}: the {header.nbytes} bytes that came are not those that were sent"
                if header.checksum
                else f"{_name(header)} carries no checksum: its sender does not verify"
            )

    def _check_open(self) -> None:
        if not self._is_open:
            raise PeerGone(f"the {self.name} transport is not open")


async def _sum(view: memoryview) -> int:
    if view.nbytes <= _SUM_ON_LOOP_BYTES:
        return checksum_of(view)
    return await asyncio.to_thread(checksum_of, view)


def _name(header: PieceHeader) -> str:
    return f"piece {header.piece} of transfer {header.transfer_id}"
