"""Sends the KV of prefilling requests to where they will be decoded, layer by layer."""

import asyncio
import logging
from dataclasses import dataclass, field

from shared.core.request import RequestKey
from shared.engine.outputs import KVExport
from shared.errors import PeerGone
from shared.kvcache.layout import KVLayout
from shared.messages import CODEC
from shared.messages.workers import HandoffTrailer, KVTarget
from shared.transport.base import PieceHeader, PieceKind, Transport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sending:
    target: KVTarget
    items: asyncio.Queue[list[KVExport] | HandoffTrailer] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None


class KVSender:
    """One transfer an attempt; layer *i* travels while layer *i + 1* computes.

    Layers that arrive together (small ones do) travel as one piece.
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

    def push(self, key: RequestKey, exports: list[KVExport]) -> None:
        """Send KV of ``key``, layers in order; ignored when the transfer is over."""
        sending = self._sending.get(key)
        if sending is not None:
            sending.items.put_nowait(exports)

    def finish(self, key: RequestKey, trailer: HandoffTrailer) -> None:
        """Send the trailer behind all KV."""
        sending = self._sending.get(key)
        if sending is not None:
            sending.items.put_nowait(trailer)

    def abort(self, key: RequestKey) -> None:
        """Give the transfer up."""
        sending = self._sending.pop(key, None)
        if sending is not None and sending.task is not None:
            sending.task.cancel()

    async def _send_all(self, key: RequestKey, sending: _Sending) -> None:
        index = 0
        try:
            while True:
                item = await sending.items.get()
                if isinstance(item, HandoffTrailer):
                    await self._send(sending.target, index, PieceKind.TRAILER, CODEC.encode(item))
                    return
                for run in _runs(item, sending.target.first_block):
                    await self._send_run(sending.target, index, run)
                    index += 1
        except PeerGone:
            # A deadline alone says nothing about the peer's other transfers; this does.
            await self._transport.forget_peer(sending.target.address)
            raise
        finally:
            self._sending.pop(key, None)

    async def _send_run(self, target: KVTarget, index: int, run: list[KVExport]) -> None:
        """One piece: the same blocks of consecutive layers."""
        first = run[0]
        skipped = max(0, target.first_block - first.block_lo)
        parts = [e.data.data[skipped * self._layout.block_bytes(e.layer) :] for e in run]
        await self._send(
            target,
            index,
            PieceKind.KV,
            parts[0] if len(parts) == 1 else b"".join(parts),
            layer=first.layer,
            block_lo=first.block_lo + skipped,
            block_hi=first.block_hi,
            head_hi=self._layout.layers[first.layer].num_kv_heads,
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


def _runs(exports: list[KVExport], first_block: int) -> list[list[KVExport]]:
    """Exports that fit into one piece each: consecutive layers, the same blocks."""
    runs: list[list[KVExport]] = []
    for export in exports:
        if export.block_hi <= first_block:
            continue
        last = runs[-1][-1] if runs else None
        blocks = (export.block_lo, export.block_hi)
        if (
            last is not None
            and export.layer == last.layer + 1
            and blocks == (last.block_lo, last.block_hi)
        ):
            runs[-1].append(export)
        else:
            runs.append([export])
    return runs
