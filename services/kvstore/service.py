"""The KV store process: answers lookups, sends blocks, takes offers."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from services.kvstore.config import KVStoreSettings
from services.kvstore.counters import KVStoreCounters
from services.kvstore.gets import GetSender
from services.kvstore.index import block_ids
from services.kvstore.puts import PutReceiver
from services.kvstore.store import BlockStore
from shared.bus.base import Subscription
from shared.clock import Clock, MonotonicClock
from shared.errors import InvalidRequest, Refused
from shared.messages import subjects
from shared.messages.base import Message, expect
from shared.messages.kv import GetBlocks, LookupPrefix, PrefixFound, PutAccepted, PutBlocks
from shared.messages.requests import Done
from shared.reporting import OpenBus, Reporter, connect_bus
from shared.runtime import Release, Runtime, Service
from shared.transport.base import MAX_PIECE_BYTES, MAX_PIECES, TransferIds, Transport
from shared.transport.factory import create_transport
from shared.transport.piece import check_id

RETRY_AFTER_S = 0.1


def open_transport(settings: KVStoreSettings) -> Transport:
    """The data plane that the settings name; not started yet."""
    return create_transport(settings.transport, host=settings.transport_host)


class KVStoreService(Service):
    """One shard of the global KV store.

    It is a cache: nothing it holds outlives it, and whatever it cannot do costs its callers a
    recomputation.
    """

    def __init__(
        self,
        settings: KVStoreSettings,
        *,
        open_bus: OpenBus = connect_bus,
        make_transport: Callable[[KVStoreSettings], Transport] = open_transport,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._open_bus = open_bus
        self._make_transport = make_transport
        self._clock = clock or MonotonicClock()
        self._transfer_ids = TransferIds()
        self._gets: set[asyncio.Task[None]] = set()
        self._puts: set[asyncio.Task[None]] = set()
        self._intake: list[Subscription] = []

    async def start(self, runtime: Runtime) -> None:
        """Open the data plane, join the bus, serve."""
        settings = self._settings
        self._runtime = runtime
        self._counters = KVStoreCounters(runtime.metrics)
        self._store = BlockStore(settings.capacity_bytes, self._counters)
        self._transport = self._make_transport(settings)
        runtime.on_release(Release.TRANSPORT, "transport", self._transport.close)
        await self._transport.start()
        self._getting = GetSender(
            self._store, self._transport, self._counters, max_sending=settings.max_sending
        )
        self._putting = PutReceiver(
            self._store,
            self._transport,
            self._counters,
            timeout_s=settings.put_timeout_s,
            idle_s=settings.put_idle_s,
        )
        bus = await self._open_bus(settings, runtime)
        self._reporter = Reporter(
            bus,
            role="kvstore",
            instance=settings.instance,
            gauges=self._gauges,
            labels=lambda: {"transport": self._transport.name},
        )
        instance = settings.instance
        for verb, handler in (
            ("lookup", self._on_lookup),
            ("get", self._on_get),
            ("put", self._on_put),
        ):
            self._intake.append(await bus.serve(subjects.kv(instance, verb), handler))
        runtime.spawn(self._reporter.run(), name="reports")

    async def stop_intake(self) -> None:
        """Answer nobody any more, which to a worker is a miss.

        Puts under way are given up: what they bring would be gone with the process.
        """
        await self._reporter.drain()
        for subscription in self._intake:
            await subscription.unsubscribe()
        for put in self._puts:
            put.cancel()

    async def drain(self, deadline_s: float) -> None:
        """Wait for the gets under way; each has a deadline of its own."""
        if self._gets:
            await asyncio.wait(self._gets, timeout=deadline_s)
        await self._reporter.leave()

    def _gauges(self) -> dict[str, float]:
        return self._counters.report(
            self._store.index, num_gets=len(self._gets), num_puts=len(self._puts)
        )

    async def _on_lookup(self, message: Message) -> Message:
        lookup = expect(message, LookupPrefix)
        found = self._store.lookup(
            block_ids(lookup.kv_layout, lookup.keys),
            now_s=self._clock.now_s(),
            pin_s=self._settings.lookup_pin_s,
        )
        return PrefixFound(num_blocks=found)

    async def _on_get(self, message: Message) -> Message:
        get = expect(message, GetBlocks)
        _check_get(get)
        if len(self._gets) >= self._settings.max_gets:
            self._counters.refused_gets.add()
            raise Refused(f"{len(self._gets)} gets are under way", retry_after_s=RETRY_AFTER_S)
        timeout_s = min(get.timeout_s, self._settings.max_get_s)
        run = self._store.open_run(
            block_ids(get.kv_layout, get.keys), now_s=self._clock.now_s(), ttl_s=timeout_s
        )
        self._spawn(self._gets, self._getting.send(get, run, timeout_s), f"get {get.transfer_id}")
        return Done(count=len(run.blocks))

    async def _on_put(self, message: Message) -> Message:
        put = expect(message, PutBlocks)
        _check_layers(put.num_layers, put.layer_bytes)
        if len(self._puts) >= self._settings.max_puts:
            self._counters.skipped_puts.add()
            return PutAccepted(wanted=())
        chain = block_ids(put.kv_layout, put.keys[: MAX_PIECES // put.num_layers])
        wanted = self._store.admit(chain, sum(put.layer_bytes), self._clock.now_s())
        if not wanted:
            return PutAccepted(wanted=())
        transfer_id = self._transfer_ids.next()
        self._spawn(
            self._puts,
            self._putting.receive(transfer_id, chain, wanted, put.layer_bytes),
            f"put {transfer_id}",
        )
        return PutAccepted(wanted=wanted, transfer_id=transfer_id, address=self._transport.address)

    def _spawn(
        self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], name: str
    ) -> None:
        task = self._runtime.spawn(work, name=name)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _check_get(get: GetBlocks) -> None:
    """Raise ``InvalidRequest`` for what could not even be tried."""
    try:
        check_id(get.transfer_id, 0)
    except ValueError as error:
        raise InvalidRequest(str(error), field="transfer_id") from error
    if get.timeout_s <= 0:
        raise InvalidRequest(f"{get.timeout_s} s are no time", field="timeout_s")


def _check_layers(num_layers: int, layer_bytes: Sequence[int]) -> None:
    if not 1 <= num_layers <= MAX_PIECES or num_layers != len(layer_bytes):
        raise InvalidRequest(f"{num_layers} layers, {len(layer_bytes)} sizes", field="layer_bytes")
    if not all(1 <= nbytes <= MAX_PIECE_BYTES for nbytes in layer_bytes):
        raise InvalidRequest(f"layers of 1 to {MAX_PIECE_BYTES} bytes", field="layer_bytes")
