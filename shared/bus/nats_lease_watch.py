"""Following the keys of a bucket with a JetStream push consumer."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription
from nats.js import api
from typing_extensions import override

from shared.bus.jetstream import read_state
from shared.bus.leases import Lease, LeaseChange, LeaseTracker, LeaseWatch
from shared.bus.nats_connection import NatsLink
from shared.errors import BusError

if TYPE_CHECKING:
    from shared.bus.nats import NatsBus

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_SILENCE_S = 3 * _HEARTBEAT_S
_MAX_READY = 4096


class NatsLeaseWatch(LeaseWatch):
    """See ``LeaseWatch``. ``call_api`` makes a call of JetStream's API.

    The consumer is ephemeral. It is made anew, and what was missed is found by comparing, when the
    connection was lost, when its heartbeat stops (its server is gone) and when a message is
    missing.
    """

    def __init__(
        self,
        bus: "NatsBus",
        bucket: str,
        pattern: str,
        call_api: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        self._bus = bus
        self._prefix = f"$KV.{bucket}."
        self._stream = f"KV_{bucket}"
        self._pattern = pattern
        self._call_api = call_api
        self._tracker = LeaseTracker()
        self._ready: deque[LeaseChange] = deque()
        self._news = asyncio.Event()
        self._consumer: tuple[NatsLink, ClientSubscription] | None = None
        self._generation = 0
        self._num_taken = 0
        self._is_syncing = False
        self._heard_at_s = 0.0
        self._is_started = False
        self._is_closed = False
        self._stop_listening: Callable[[], None] = lambda: None

    @override
    async def start(self) -> None:
        if self._is_started:
            return
        self._is_started = True
        self._stop_listening = self._bus.add_reconnect_listener(self._on_reconnect)
        self._bus.own_watch(self)
        try:
            await self._consume()
        except BaseException:
            await self.aclose()
            raise

    @override
    async def aclose(self) -> None:
        self._is_closed = True
        self._stop_listening()
        self._bus.disown_watch(self)
        self._news.set()
        await self._abandon()

    @override
    async def __anext__(self) -> LeaseChange:
        await self.start()
        while not self._ready:
            if self._is_closed or self._bus.is_closed:
                raise StopAsyncIteration
            if self._is_broken():
                await self._recover()
            else:
                await self._wait_for_news(_SILENCE_S)
        return self._ready.popleft()

    async def _on_reconnect(self) -> None:
        self._news.set()

    async def _wait_for_news(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return  # the caller looks whether the consumer has fallen silent
        self._news.clear()

    # The consumer

    def _is_broken(self) -> bool:
        if self._consumer is None or not self._consumer[0].is_alive:
            return True
        return asyncio.get_running_loop().time() - self._heard_at_s > _SILENCE_S

    async def _recover(self) -> None:
        try:
            await self._consume()
        except BusError as error:
            logger.info("watching %s%s again: %s", self._prefix, self._pattern, error)
            await self._wait_for_news(_HEARTBEAT_S)

    async def _consume(self) -> None:
        """Make a consumer that begins with what is held now."""
        await self._abandon()
        link = self._bus.raw_link()
        inbox = self._bus.new_inbox()
        self._generation += 1
        generation = self._generation
        self._num_taken = 0
        self._is_syncing = True
        self._heard_at_s = asyncio.get_running_loop().time()
        self._tracker.begin_sync()

        async def take(msg: Msg) -> None:
            if generation == self._generation:  # an abandoned consumer may have a last word
                self._take(msg)

        self._consumer = (link, await link.subscribe(inbox, None, take))
        link.lost.add_done_callback(lambda _: self._news.set())
        config = api.ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=api.AckPolicy.NONE,
            filter_subject=self._prefix + self._pattern,
            idle_heartbeat=_HEARTBEAT_S,
            inactive_threshold=2 * _SILENCE_S,
            mem_storage=True,
            num_replicas=1,
        )
        body = {"stream_name": self._stream, "config": config.as_dict()}
        try:
            info = await self._call_api(f"CONSUMER.CREATE.{self._stream}", body)
        except BaseException:
            await self._abandon()
            raise
        if info.get("num_pending", 0) == 0 and info["delivered"]["consumer_seq"] == 0:
            self._end_sync()

    async def _abandon(self) -> None:
        """Give the consumer up; the server removes it once nobody listens."""
        if self._consumer is not None:
            link, inner = self._consumer
            self._consumer = None
            await link.unsubscribe(inner, 0.0)

    def _take(self, msg: Msg) -> None:
        self._heard_at_s = asyncio.get_running_loop().time()
        if not msg.reply:
            return  # a heartbeat
        metadata = msg.metadata
        self._num_taken += 1
        if metadata.sequence.consumer != self._num_taken:
            logger.warning("a change of %s was missed; comparing", self._prefix)
            self._heard_at_s -= 2 * _SILENCE_S
            self._news.set()
            return
        key = msg.subject.removeprefix(self._prefix)
        state = read_state(metadata.sequence.stream, msg.headers or {}, msg.data)
        if state.holder is None:
            self._report(self._tracker.ended(key, state.event))
        else:
            lease = Lease(key, state.value, state.revision)
            self._report(self._tracker.held(lease, state.holder))
        if metadata.num_pending == 0:
            self._end_sync()

    def _end_sync(self) -> None:
        if self._is_syncing:
            self._is_syncing = False
            self._report(self._tracker.end_sync())

    def _report(self, changes: list[LeaseChange]) -> None:
        self._ready.extend(changes)
        while len(self._ready) > _MAX_READY:
            logger.warning("nobody reads the changes of %s: %s lost", self._prefix, self._ready[0])
            self._ready.popleft()
        if changes:
            self._news.set()
