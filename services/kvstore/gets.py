"""Sends a run of blocks to a worker, one piece a layer, verified on the way out."""

import asyncio
import logging

from services.kvstore.blocks import GatheredLayer, gather_layer
from services.kvstore.counters import KVStoreCounters
from services.kvstore.store import BlockRun, BlockStore
from shared.errors import ChecksumMismatch, TransportError
from shared.messages.kv import GetBlocks
from shared.transport.base import PieceHeader, PieceKind, Transport

log = logging.getLogger(__name__)


class GetSender:
    """Sends runs; at most ``max_sending`` at a time have layers copied together in memory.

    While one layer is on its way the next one is gathered and verified in a thread.
    """

    def __init__(
        self,
        store: BlockStore,
        transport: Transport,
        counters: KVStoreCounters,
        *,
        max_sending: int,
    ) -> None:
        self._store = store
        self._transport = transport
        self._counters = counters
        self._sending = asyncio.Semaphore(max_sending)

    async def send(self, get: GetBlocks, run: BlockRun, timeout_s: float) -> None:
        """Send ``run`` and the trailer behind it, or as much as can be sent by the deadline.

        A block that fails its checksum ends the transfer with an abort piece, and is dropped: its
        receiver computes what it did not get. The run is closed at the end. Only a programming
        error is raised.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s), self._sending:
                await self._send_all(get, run, deadline_s)
        except (TransportError, TimeoutError) as error:
            # The link stays: its other transfers are not to end with this one, and what the
            # transport still has of it ends when the receiver does.
            self._counters.failed_gets.add()
            log.warning("get %d failed: %s", get.transfer_id, error or "deadline")
        finally:
            self._store.close_run(run)

    async def _send_all(self, get: GetBlocks, run: BlockRun, deadline_s: float) -> None:
        num_layers = len(run.blocks[0].layers) if run.blocks else 0
        gathering = self._gather(run, 0) if num_layers else None
        try:
            for layer in range(num_layers):
                assert gathering is not None
                gathered = await gathering
                if gathered.first_bad is not None:
                    await self._abort(get, run, layer, gathered.first_bad, deadline_s)
                gathering = self._gather(run, layer + 1) if layer + 1 < num_layers else None
                await self._send_layer(get, run, layer, gathered, deadline_s)
            trailer = PieceHeader(
                transfer_id=get.transfer_id, piece=num_layers, kind=PieceKind.TRAILER
            )
            await self._send_piece(get, trailer, deadline_s)
        finally:
            if gathering is not None:
                gathering.cancel()

    def _gather(self, run: BlockRun, layer: int) -> asyncio.Task[GatheredLayer]:
        return asyncio.create_task(asyncio.to_thread(gather_layer, run.blocks, layer))

    async def _send_layer(
        self,
        get: GetBlocks,
        run: BlockRun,
        layer: int,
        gathered: GatheredLayer,
        deadline_s: float,
    ) -> None:
        header = PieceHeader(
            transfer_id=get.transfer_id,
            piece=layer,
            kind=PieceKind.KV,
            layer=layer,
            block_lo=0,
            block_hi=len(run.blocks),
            head_lo=0,
            head_hi=run.blocks[0].layers[layer].num_heads,
        )
        await self._send_piece(get, header, deadline_s, gathered.data, gathered.checksum)
        self._counters.sent_bytes.add(gathered.data.nbytes)

    async def _abort(
        self, get: GetBlocks, run: BlockRun, layer: int, position: int, deadline_s: float
    ) -> None:
        """Tell the receiver that no more will come. Always raises."""
        self._store.drop_corrupt(run, position)
        reason = f"block {position}, layer {layer}: the checksum is not the one of the put"
        header = PieceHeader(transfer_id=get.transfer_id, piece=layer, kind=PieceKind.ABORT)
        await self._send_piece(get, header, deadline_s, reason.encode())
        raise ChecksumMismatch(f"{reason}; the block is dropped")

    async def _send_piece(
        self,
        get: GetBlocks,
        header: PieceHeader,
        deadline_s: float,
        payload: bytes | memoryview = b"",
        checksum: int | None = None,
    ) -> None:
        left_s = deadline_s - asyncio.get_running_loop().time()
        await self._transport.send(
            get.address, header, payload, timeout_s=max(0.0, left_s), checksum=checksum
        )
