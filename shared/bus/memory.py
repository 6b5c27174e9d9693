"""The bus without a server, for tests and simulations in one process and one event loop."""

import itertools

from typing_extensions import override

from shared.bus.endpoint import BusEndpoint, too_large
from shared.bus.inbound import InboundSubscription
from shared.bus.leases import LeaseStore
from shared.bus.memory_leases import LeaseTable, MemoryLeaseStore, MemoryLeaseWatch
from shared.bus.replies import RawReply
from shared.bus.subjects import matches
from shared.clock import Clock, MonotonicClock
from shared.errors import BusDisconnected
from shared.messages.base import MessageCodec


class MemoryBroker:
    """What the buses of one test or simulation share; it stands for the server.

    Members of a queue group take turns. ``stop`` and ``start`` are what a crash and restart of the
    server are to its clients: subscriptions survive, what is published meanwhile raises, requests
    under way fail, leases go on ageing by ``clock``.
    """

    def __init__(
        self, *, clock: Clock | None = None, max_payload_bytes: int = 8 * 1024 * 1024
    ) -> None:
        self.clock = clock or MonotonicClock()
        self.max_payload_bytes = max_payload_bytes
        self.leases = LeaseTable(self.clock)
        self._is_running = True
        self._buses: dict[str, MemoryBus] = {}
        self._subscriptions: list[InboundSubscription] = []
        self._turns: dict[str, int] = {}
        self._ids = itertools.count(1)

    @property
    def is_running(self) -> bool:
        """Whether buses can connect and send."""
        return self._is_running

    def stop(self) -> None:
        """Every bus loses its connection."""
        if self._is_running:
            self._is_running = False
            for bus in tuple(self._buses.values()):
                bus.lose_connection()

    def start(self) -> None:
        """Every bus gets its connection back."""
        if not self._is_running:
            self._is_running = True
            for bus in tuple(self._buses.values()):
                bus.regain_connection()

    def new_id(self) -> str:
        """A name that is unique to this broker."""
        return str(next(self._ids))

    def add_bus(self, inbox: str, bus: "MemoryBus") -> None:
        """Deliver replies under ``inbox`` to ``bus``."""
        self._buses[inbox] = bus

    def remove_bus(self, inbox: str) -> None:
        """Forget a bus that was closed."""
        self._buses.pop(inbox, None)

    def add_subscription(self, subscription: InboundSubscription) -> None:
        """Offer ``subscription`` what matches its subject."""
        self._subscriptions.append(subscription)

    def remove_subscription(self, subscription: InboundSubscription) -> None:
        """Offer it nothing more."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    async def route(self, subject: str, data: bytes, reply: str | None) -> None:
        """Deliver one message to all it concerns."""
        inbox, _, token = subject.rpartition(".")
        asker = self._buses.get(inbox)
        if asker is not None:
            asker.take_reply(token, data)
            return
        receivers = self._receivers(subject)
        for subscription in receivers:
            await subscription.offer(data, subject, reply)
        if not receivers and reply is not None:
            inbox, _, token = reply.rpartition(".")
            asker = self._buses.get(inbox)
            if asker is not None:
                asker.take_no_responder(token)

    def _receivers(self, subject: str) -> list[InboundSubscription]:
        receivers = []
        groups: dict[str, list[InboundSubscription]] = {}
        for subscription in self._subscriptions:
            if matches(subscription.subject, subject):
                if subscription.queue is None:
                    receivers.append(subscription)
                else:
                    groups.setdefault(subscription.queue, []).append(subscription)
        for queue, members in groups.items():
            turn = self._turns[queue] = self._turns.get(queue, -1) + 1
            receivers.append(members[turn % len(members)])
        return receivers


class MemoryBus(BusEndpoint):
    """See ``Bus``. Its clock is the broker's."""

    def __init__(self, codec: MessageCodec, broker: MemoryBroker) -> None:
        super().__init__(codec, inbox=f"_INBOX.{broker.new_id()}", clock=broker.clock)
        self._broker = broker
        self._lease_watches: set[MemoryLeaseWatch] = set()

    @override
    async def connect(self) -> None:
        if not self._broker.is_running:
            raise BusDisconnected("the broker is stopped")
        self._broker.add_bus(self._inbox, self)
        self._went_up()

    def lose_connection(self) -> None:
        """The broker was stopped."""
        for watch in self._lease_watches:
            watch.pause()
        self._went_down("the broker was stopped")

    def regain_connection(self) -> None:
        """The broker was started again."""
        self._went_up()
        for watch in self._lease_watches:
            watch.resume()

    def check_connected(self) -> None:
        """Raise ``BusDisconnected`` unless connected."""
        if not self.is_connected:
            raise BusDisconnected("there is no connection to the broker")

    def take_reply(self, token: str, data: bytes) -> None:
        """An answer to one of our requests."""
        self._replies.resolve(token, RawReply(data))

    def take_no_responder(self, token: str) -> None:
        """One of our requests reached nobody."""
        self._replies.no_responder(token)

    def own_watch(self, watch: MemoryLeaseWatch) -> None:
        """Have ``watch`` follow the connection, and closed with the bus."""
        self._lease_watches.add(watch)
        self._watches.add(watch)

    def disown_watch(self, watch: MemoryLeaseWatch) -> None:
        """``watch`` was closed."""
        self._lease_watches.discard(watch)
        self._watches.discard(watch)

    @override
    async def flush(self, *, timeout_s: float = 5.0) -> None:
        self.check_connected()

    @override
    async def lease_store(self, ttl_s: float) -> LeaseStore:
        self.check_connected()
        return MemoryLeaseStore(self, self._broker.leases, ttl_s, self._broker.new_id())

    @override
    async def _send(self, subject: str, data: bytes, reply: str | None) -> None:
        self.check_connected()
        if len(data) > self._broker.max_payload_bytes:
            raise too_large(data, self._broker.max_payload_bytes)
        await self._broker.route(subject, data, reply)

    @override
    async def _attach(self, subscription: InboundSubscription) -> None:
        self.check_connected()
        self._broker.add_subscription(subscription)

    @override
    async def _detach(self, subscription: InboundSubscription) -> None:
        self._broker.remove_subscription(subscription)

    @override
    async def _hang_up(self, deadline_s: float) -> None:
        self._broker.remove_bus(self._inbox)
