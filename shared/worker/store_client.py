"""A worker's use of the global KV store: fetch a prompt's cached prefix, offer what is new.

The store is a cache: whatever goes wrong here costs a recomputation and nothing else.
"""

import asyncio
import hashlib
import logging
from dataclasses import dataclass

from shared.bus.base import Bus
from shared.core.prefix import block_keys, root_key
from shared.core.request import Request, RequestKey
from shared.engine.outputs import KVExport
from shared.engine.thread import EngineThread
from shared.errors import BanyanError
from shared.kvcache.layout import KVLayout
from shared.messages import subjects
from shared.messages.kv import GetBlocks, LookupPrefix, PrefixFound, PutAccepted, PutBlocks
from shared.messages.requests import Done
from shared.transport.base import PieceHeader, PieceKind, TransferIds, Transport
from shared.worker.kv_receiver import receive_kv

log = logging.getLogger(__name__)

PUT_WINDOW = 16
"""Pieces of a put under way at a time."""

STORE_BLOCK_TOKENS = 64
"""Block size of the store; an engine of another block size does without it for now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorePlan:
    """Which store is asked for a prompt, and the keys of its full blocks."""

    store: str
    keys: tuple[bytes, ...]


class StoreClient:
    """Talks to the stores that report themselves on the bus.

    A prompt's blocks all live in one store, chosen by rendezvous hashing of its first block, so
    that a prefix is found in one round trip.
    """

    def __init__(
        self,
        bus: Bus,
        transport: Transport,
        engine: EngineThread,
        layout: KVLayout,
        *,
        fingerprint: str,
        timeout_s: float,
        piece_timeout_s: float,
        max_puts: int = 4,
    ) -> None:
        self._bus = bus
        self._transport = transport
        self._engine = engine
        self._layout = layout
        self._layout_name = f"{fingerprint}/{layout.name}"
        self._fingerprint = fingerprint
        self._timeout_s = timeout_s
        self._piece_timeout_s = piece_timeout_s
        self._transfer_ids = TransferIds()
        self._max_puts = max_puts
        self._puts: set[asyncio.Task[None]] = set()
        self.stores: tuple[str, ...] = ()
        """Live store instances; kept up to date by the owner."""
        self.num_hit_blocks = 0
        self.num_failures = 0
        self.num_puts_skipped = 0

    def plan(self, request: Request) -> StorePlan | None:
        """What to ask for, or ``None`` when there is no store or no full block to share."""
        token_ids = request.prompt_token_ids + request.output_token_ids
        if not self.stores or len(token_ids) <= STORE_BLOCK_TOKENS:
            return None
        if self._layout.block_size != STORE_BLOCK_TOKENS:
            return None
        root = root_key(self._fingerprint, request.tenant)
        keys = tuple(block_keys(token_ids, STORE_BLOCK_TOKENS, root))
        store = max(self.stores, key=lambda s: hashlib.blake2b(s.encode() + keys[0]).digest())
        return StorePlan(store=store, keys=keys)

    async def fetch(self, request: Request, plan: StorePlan) -> int:
        """Bring the longest stored prefix into a reservation; returns its length in tokens.

        With 0 nothing is reserved. At least one token of the prompt is left to compute.
        """
        usable = (request.num_tokens - 1) // STORE_BLOCK_TOKENS
        try:
            local = asyncio.wrap_future(self._engine.call(lambda e: e.num_cached_tokens(request)))
            found = await self._bus.request(
                subjects.kv(plan.store, "lookup"),
                LookupPrefix(kv_layout=self._layout_name, keys=plan.keys[:usable]),
                PrefixFound,
                timeout_s=self._timeout_s,
            )
            num_blocks = min(found.num_blocks, usable)
            if num_blocks * STORE_BLOCK_TOKENS <= await local:
                return 0
        except BanyanError as error:
            self._failed("lookup", error)
            return 0
        return await self._get(request, plan, num_blocks)

    async def _get(self, request: Request, plan: StorePlan, num_blocks: int) -> int:
        key = request.key
        try:
            await asyncio.wrap_future(
                self._engine.call(lambda e: e.reserve(key, request.num_tokens))
            )
        except BanyanError as error:
            self._failed("reservation", error)
            return 0
        count = 0
        try:
            count = await self._transfer(key, plan, num_blocks)
        except (BanyanError, TimeoutError, ValueError) as error:
            self._failed("get", error)
        finally:
            if count == 0:
                self._engine.call(lambda e: e.release(key))
        self.num_hit_blocks += count
        return count * STORE_BLOCK_TOKENS

    async def _transfer(self, key: RequestKey, plan: StorePlan, num_blocks: int) -> int:
        """Have the store send, and import what comes; returns the number of blocks."""
        transfer_id = self._transfer_ids.next()
        question = GetBlocks(
            kv_layout=self._layout_name,
            keys=plan.keys[:num_blocks],
            transfer_id=transfer_id,
            address=self._transport.address,
            timeout_s=self._timeout_s,
        )
        receiving = asyncio.create_task(
            receive_kv(
                self._transport,
                self._engine,
                key,
                transfer_id=transfer_id,
                timeout_s=self._timeout_s,
            )
        )
        try:
            reply = await self._bus.request(
                subjects.kv(plan.store, "get"), question, Done, timeout_s=self._timeout_s
            )
            await receiving
        finally:
            receiving.cancel()
            await asyncio.wait([receiving])
        return reply.count

    def offer(self, plan: StorePlan, exports: list[KVExport]) -> None:
        """Put a prompt's full blocks into the store in the background, or skip it when busy."""
        if len(self._puts) >= self._max_puts:
            self.num_puts_skipped += 1
            return
        task = asyncio.create_task(self._put(plan, exports))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    async def _put(self, plan: StorePlan, exports: list[KVExport]) -> None:
        layers = range(self._layout.num_layers)
        try:
            accepted = await self._bus.request(
                subjects.kv(plan.store, "put"),
                PutBlocks(
                    kv_layout=self._layout_name,
                    keys=plan.keys,
                    num_layers=self._layout.num_layers,
                    layer_bytes=tuple(self._layout.block_bytes(layer) for layer in layers),
                ),
                PutAccepted,
                timeout_s=self._timeout_s,
            )
            await self._send_wanted(accepted, exports)
        except BanyanError as error:
            self._failed("put", error)

    async def _send_wanted(self, accepted: PutAccepted, exports: list[KVExport]) -> None:
        """Send the blocks the store wants, a few at a time, so that it never waits for the next."""
        wanted = frozenset(accepted.wanted)
        pieces = [
            (export, block)
            for export in exports
            for block in range(export.block_lo, export.block_hi)
            if block in wanted
        ]
        for first in range(0, len(pieces), PUT_WINDOW):
            await asyncio.gather(
                *(
                    self._send_block(accepted, first + offset, export, block)
                    for offset, (export, block) in enumerate(pieces[first : first + PUT_WINDOW])
                )
            )

    async def _send_block(
        self, accepted: PutAccepted, index: int, export: KVExport, block: int
    ) -> None:
        num_bytes = self._layout.block_bytes(export.layer)
        start = (block - export.block_lo) * num_bytes
        header = PieceHeader(
            transfer_id=accepted.transfer_id,
            piece=index,
            layer=export.layer,
            block_lo=block,
            block_hi=block + 1,
            head_lo=0,
            head_hi=self._layout.layers[export.layer].num_kv_heads,
            kind=PieceKind.KV,
        )
        await self._transport.send(
            accepted.address,
            header,
            export.data.data[start : start + num_bytes],
            timeout_s=self._piece_timeout_s,
        )

    def _failed(self, what: str, error: BaseException) -> None:
        self.num_failures += 1
        log.info("kvstore %s failed, the prompt is computed: %s", what, error)

    def close(self) -> None:
        """Give up the puts under way."""
        for task in self._puts:
            task.cancel()
