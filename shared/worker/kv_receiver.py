"""Receives KV into the blocks reserved for it."""

import asyncio
import concurrent.futures

from shared.core.request import RequestKey
from shared.engine.thread import EngineThread
from shared.errors import ProtocolError, TransferTimeout
from shared.messages import CODEC
from shared.messages.workers import HandoffTrailer
from shared.transport.base import Piece, PieceKind, Transport


async def receive_kv(
    transport: Transport,
    engine: EngineThread,
    key: RequestKey,
    *,
    transfer_id: int,
    timeout_s: float,
) -> Piece:
    """Import all KV pieces of a transfer into the reservation of ``key``; return its trailer.

    Pieces land in staging buffers of the transport; the engine thread copies them into the
    reserved blocks between two iterations, so a late write can never touch a block that has a new
    owner. Raises ``TransportError`` (deadline, checksum, peer), ``ProtocolError``, or what the
    engine says of a piece that does not fit.
    """
    try:
        async with asyncio.timeout(timeout_s):
            piece = await _receive_all(transport, engine, key, transfer_id, timeout_s)
    except BaseException as error:
        transport.discard(transfer_id)
        if isinstance(error, TimeoutError):
            raise TransferTimeout(f"not complete after {timeout_s} s") from error
        raise
    if piece.header.kind is not PieceKind.TRAILER:
        raise ProtocolError(f"transfer {transfer_id} was aborted by its sender")
    return piece


async def _receive_all(
    transport: Transport, engine: EngineThread, key: RequestKey, transfer_id: int, timeout_s: float
) -> Piece:
    """Import piece after piece; returns the first that is no KV, with all imports done."""
    imports: list[concurrent.futures.Future[None]] = []
    while True:
        piece = await transport.receive(transfer_id, len(imports), timeout_s=timeout_s)
        if piece.header.kind is not PieceKind.KV:
            break
        imports.append(_import(engine, key, piece))
    await asyncio.gather(*(asyncio.wrap_future(done) for done in imports))
    return piece


def _import(engine: EngineThread, key: RequestKey, piece: Piece) -> concurrent.futures.Future[None]:
    header = piece.header
    return engine.call(
        lambda e: e.import_kv_layers(
            key,
            header.layer,
            header.block_lo,
            header.block_hi,
            header.head_lo,
            header.head_hi,
            piece.payload,
        )
    )


def read_trailer(piece: Piece, key: RequestKey) -> HandoffTrailer:
    """The trailer's message; raises ``ProtocolError`` if it is not that of ``key``."""
    message = CODEC.decode(bytes(piece.payload))
    if not isinstance(message, HandoffTrailer):
        raise ProtocolError(f"a {type(message).__name__} is no trailer")
    if RequestKey(message.request_id, message.attempt) != key:
        raise ProtocolError(f"the trailer is of {message.request_id}, attempt {message.attempt}")
    return message
