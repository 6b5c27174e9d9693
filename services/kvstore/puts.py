"""Receives the blocks of a put; a block is visible once all of its layers are here and verified."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from services.kvstore.blocks import ArrivingBlock
from services.kvstore.counters import KVStoreCounters
from services.kvstore.index import BlockId
from services.kvstore.store import BlockStore
from shared.errors import ProtocolError, TransportError
from shared.transport.base import Piece, PieceKind, Transport

log = logging.getLogger(__name__)


class PutReceiver:
    """Takes one piece a (layer, block) from the transport into the store."""

    def __init__(
        self,
        store: BlockStore,
        transport: Transport,
        counters: KVStoreCounters,
        *,
        timeout_s: float,
        idle_s: float,
    ) -> None:
        self._store = store
        self._transport = transport
        self._counters = counters
        self._timeout_s = timeout_s
        self._idle_s = idle_s

    async def receive(
        self,
        transfer_id: int,
        chain: Sequence[BlockId],
        wanted: Sequence[int],
        layer_bytes: Sequence[int],
    ) -> None:
        """Receive the admitted blocks ``wanted`` of ``chain``.

        Returns when all are here, when the sender ends the transfer, or at a deadline; every
        admitted block is committed or abandoned by then. Only a programming error is raised.
        """
        arriving = {index: ArrivingBlock(layer_bytes) for index in wanted}
        num_pieces = len(wanted) * len(layer_bytes)
        try:
            async with asyncio.timeout(self._timeout_s):
                for number in range(num_pieces):
                    piece = await self._transport.receive(
                        transfer_id, number, timeout_s=self._idle_s
                    )
                    if piece.header.kind is not PieceKind.KV:
                        break
                    self._take(piece, chain, arriving)
        except (TransportError, ProtocolError, TimeoutError) as error:
            log.info("put %d ended early: %s", transfer_id, error or "deadline")
        finally:
            # Nobody asks for what may still come; without this it would wait here for ever.
            self._transport.discard(transfer_id)
            for index in arriving:
                self._store.abandon(chain[index])
            if arriving:
                self._counters.incomplete_puts.add()
            self._store.index.touch(chain)

    def _take(
        self, piece: Piece, chain: Sequence[BlockId], arriving: dict[int, ArrivingBlock]
    ) -> None:
        """Add a piece; raises ``ProtocolError`` if it is none of those that were asked for."""
        header = piece.header
        index = header.block_lo
        try:
            stored = _asked_for(arriving, index, header.block_hi).add(
                header.layer,
                piece.payload,
                num_heads=_whole(header.head_lo, header.head_hi),
                known_checksum=header.checksum,
            )
        except ValueError as error:
            raise ProtocolError(f"piece {header.piece} of block {index}: {error}") from error
        self._counters.received_bytes.add(header.nbytes)
        if stored is not None:
            del arriving[index]
            self._store.commit(chain[index], stored)


def _asked_for(arriving: Mapping[int, ArrivingBlock], index: int, block_hi: int) -> ArrivingBlock:
    if index not in arriving or block_hi != index + 1:
        raise ValueError("not a block that is wanted")
    return arriving[index]


def _whole(head_lo: int, head_hi: int) -> int:
    if head_lo != 0 or head_hi < 1:
        raise ValueError(f"heads [{head_lo}, {head_hi}) are not a whole layer")
    return head_hi
