"""Sends the KV of prefilling requests to where they will be decoded, layer by layer."""

import asyncio
import logging
from dataclasses import dataclass, field

from shared.core.request import RequestKey
from shared.engine.outputs import KVExport
from shared.errors import TransportError
from shared.kvcache.layout import KVLayout
from shared.messages import CODEC
from shared.messages.workers import HandoffTrailer, KVTarget
from shared.transport.base import PieceHeader, PieceKind, Transport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sending:
    target: KVTarget
    pieces: asyncio.Queue[KVExport | HandoffTrailer] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None


class KVSender:
    """One transfer an attempt; layer *i* travels while layer *i + 1* computes.

    The exports are copies, so the engine's blocks are free as soon as the prefill is over. What
    waits to be sent is bounded by the batches a prefill instance is given at a time.
    """

    def __init__(self, transport: Transport, layout: KVLayout, *, piece_timeout_s: float) -> None:
        self._transport = transport
        self._layout = layout
        self._piece_timeout_s = piece_timeout_s
        self._sending: dict[RequestKey, _Sending] = {}

    def __len__(self) -> int:
        return len(self._sending)

    def open(self, key: RequestKey, target: KVTarget) -> asyncio.Task[None]:
        """Begin the transfer of ``key``; the task ends when the trailer has been sent.

        The task raises ``TransportError`` when the target cannot be reached in time.
        """
        sending = _Sending(target)
        sending.task = asyncio.create_task(self._send_all(key, sending), name=f"send {key}")
        self._sending[key] = sending
        return sending.task

    def push(self, export: KVExport) -> None:
        """Send a piece of KV; ignored when the transfer is over."""
        sending = self._sending.get(export.key)
        if sending is not None and export.block_hi > sending.target.first_block:
            sending.pieces.put_nowait(export)

    def finish(self, key: RequestKey, trailer: HandoffTrailer) -> None:
        """Send the trailer behind all KV."""
        sending = self._sending.get(key)
        if sending is not None:
            sending.pieces.put_nowait(trailer)

    def abort(self, key: RequestKey) -> None:
        """Give the transfer up."""
        sending = self._sending.pop(key, None)
        if sending is not None and sending.task is not None:
            sending.task.cancel()

    async def _send_all(self, key: RequestKey, sending: _Sending) -> None:
        index = 0
        try:
            while True:
                item = await sending.pieces.get()
                if isinstance(item, HandoffTrailer):
                    await self._send(sending.target, index, PieceKind.TRAILER, CODEC.encode(item))
                    return
                await self._send_export(sending.target, index, item)
                index += 1
        except TransportError:
            await self._transport.forget_peer(sending.target.address)
            raise
        finally:
            self._sending.pop(key, None)

    async def _send_export(self, target: KVTarget, index: int, export: KVExport) -> None:
        skipped = max(0, target.first_block - export.block_lo)
        offset = skipped * self._layout.block_bytes(export.layer)
        await self._send(
            target,
            index,
            PieceKind.KV,
            export.data.data[offset:],
            layer=export.layer,
            block_lo=export.block_lo + skipped,
            block_hi=export.block_hi,
            head_hi=self._layout.layers[export.layer].num_kv_heads,
        )

    async def _send(
        self,
        target: KVTarget,
        index: int,
        kind: PieceKind,
        payload: bytes | memoryview,
        *,
        layer: int = 0,
        block_lo: int = 0,
        block_hi: int = 0,
        head_hi: int = 0,
    ) -> None:
        header = PieceHeader(
            transfer_id=target.transfer_id,
            piece=index,
            layer=layer,
            block_lo=block_lo,
            block_hi=block_hi,
            head_lo=0,
            head_hi=head_hi,
            kind=kind,
        )
        await self._transport.send(target.address, header, payload, timeout_s=self._piece_timeout_s)
