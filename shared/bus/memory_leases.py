"""Leases in the memory of one process, judged by a clock that a test may hold in its hand."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from shared.bus.leases import (
    Lease,
    LeaseChange,
    LeaseEvent,
    LeaseStore,
    LeaseTracker,
    LeaseWatch,
    check_lease_key,
    check_lease_pattern,
    lease_bucket,
)
from shared.bus.subjects import matches
from shared.clock import Clock
from shared.errors import LeaseLost

if TYPE_CHECKING:
    from shared.bus.memory import MemoryBus


@dataclass(frozen=True)
class _Record:
    lease: Lease
    holder: str
    expires_at_s: float


class LeaseTable:
    """All leases of one broker. They expire by ``clock``, whether or not the broker runs.

    With a live clock an expiry is noticed by a timer; a clock moved by hand needs a call of
    ``expire`` after each move, or any use of the leases.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._records: dict[tuple[str, str], _Record] = {}
        self._revision = 0
        self._watches: set[MemoryLeaseWatch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def expire(self) -> None:
        """Drop what has expired, and tell the watches."""
        now_s = self._clock.now_s()
        for (bucket, key), record in tuple(self._records.items()):
            if record.expires_at_s <= now_s:
                self.drop(bucket, key, LeaseEvent.EXPIRED)
        self._set_timer(now_s)

    def _set_timer(self, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._records:
            next_s = min(record.expires_at_s for record in self._records.values())
            self._timer = asyncio.get_running_loop().call_later(
                max(next_s - now_s, 0.0), self.expire
            )

    def find(self, bucket: str, key: str) -> tuple[Lease, str] | None:
        """The lease on ``key`` and its holder."""
        self.expire()
        record = self._records.get((bucket, key))
        return None if record is None else (record.lease, record.holder)

    def put(self, bucket: str, key: str, value: str, holder: str, ttl_s: float) -> Lease:
        """Write a lease, whatever was there."""
        self._revision += 1
        lease = Lease(key, value, self._revision)
        now_s = self._clock.now_s()
        self._records[bucket, key] = _Record(lease, holder, now_s + ttl_s)
        self._set_timer(now_s)
        self._tell(bucket, key, lambda watch: watch.saw_held(lease, holder))
        return lease

    def drop(self, bucket: str, key: str, event: LeaseEvent) -> None:
        """Remove the lease on ``key``, because of ``event``."""
        del self._records[bucket, key]
        self._tell(bucket, key, lambda watch: watch.saw_end(key, event))

    def _tell(self, bucket: str, key: str, tell: Callable[["MemoryLeaseWatch"], None]) -> None:
        for watch in tuple(self._watches):
            if watch.bucket == bucket and matches(watch.pattern, key):
                tell(watch)

    def add_watch(self, watch: "MemoryLeaseWatch") -> None:
        """Tell ``watch`` what is held, and what changes from now on."""
        self.expire()
        self._watches.add(watch)
        for (bucket, key), record in sorted(self._records.items(), key=lambda item: item[0]):
            if watch.bucket == bucket and matches(watch.pattern, key):
                watch.saw_held(record.lease, record.holder)

    def remove_watch(self, watch: "MemoryLeaseWatch") -> None:
        """Tell ``watch`` nothing more."""
        self._watches.discard(watch)


class MemoryLeaseStore(LeaseStore):
    """See ``LeaseStore``."""

    def __init__(self, bus: "MemoryBus", table: LeaseTable, ttl_s: float, holder: str) -> None:
        self._bus = bus
        self._table = table
        self._ttl_s = ttl_s
        self._holder = holder
        self._bucket = lease_bucket(ttl_s)

    @property
    @override
    def ttl_s(self) -> float:
        return self._ttl_s

    def _find(self, key: str) -> tuple[Lease, str] | None:
        self._bus.check_connected()
        return self._table.find(self._bucket, key)

    def _put(self, key: str, value: str) -> Lease:
        return self._table.put(self._bucket, key, value, self._holder, self._ttl_s)

    @override
    async def try_acquire(self, key: str, value: str) -> Lease | None:
        check_lease_key(key)
        found = self._find(key)
        if found is not None and (found[0].value, found[1]) != (value, self._holder):
            return None
        return self._put(key, value)

    @override
    async def renew(self, lease: Lease) -> Lease:
        if not self._is_ours(lease):
            raise LeaseLost(f"the lease on {lease.key} has expired or is another's")
        return self._put(lease.key, lease.value)

    @override
    async def release(self, lease: Lease) -> None:
        if self._is_ours(lease):
            self._table.drop(self._bucket, lease.key, LeaseEvent.RELEASED)

    def _is_ours(self, lease: Lease) -> bool:
        found = self._find(lease.key)
        return found is not None and (found[0].value, found[1]) == (lease.value, self._holder)

    @override
    async def get(self, key: str) -> Lease | None:
        check_lease_key(key)
        found = self._find(key)
        return None if found is None else found[0]

    @override
    def watch(self, key: str) -> LeaseWatch:
        check_lease_pattern(key)
        return MemoryLeaseWatch(self._bus, self._table, self._bucket, key)


class MemoryLeaseWatch(LeaseWatch):
    """See ``LeaseWatch``. Hears nothing while its bus is disconnected."""

    def __init__(self, bus: "MemoryBus", table: LeaseTable, bucket: str, pattern: str) -> None:
        self._bus = bus
        self._table = table
        self.bucket = bucket
        self.pattern = pattern
        self._tracker = LeaseTracker()
        self._ready: deque[LeaseChange] = deque()
        self._news = asyncio.Event()
        self._is_started = False
        self._is_closed = False

    @override
    async def start(self) -> None:
        if self._is_started:
            return
        self._bus.check_connected()
        self._is_started = True
        self._bus.own_watch(self)
        self.resume()

    def pause(self) -> None:
        """The connection is gone."""
        self._table.remove_watch(self)

    def resume(self) -> None:
        """The connection is there: compare, and follow on."""
        self._tracker.begin_sync()
        self._table.add_watch(self)
        self._report(self._tracker.end_sync())

    @override
    async def aclose(self) -> None:
        self._is_closed = True
        self._table.remove_watch(self)
        self._bus.disown_watch(self)
        self._news.set()

    @override
    async def __anext__(self) -> LeaseChange:
        await self.start()
        while not self._ready:
            if self._is_closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._ready.popleft()

    def saw_held(self, lease: Lease, holder: str) -> None:
        """The table says that ``holder`` holds ``lease``."""
        self._report(self._tracker.held(lease, holder))

    def saw_end(self, key: str, event: LeaseEvent) -> None:
        """The table says that nobody holds ``key`` any more."""
        self._report(self._tracker.ended(key, event))

    def _report(self, changes: list[LeaseChange]) -> None:
        self._ready.extend(changes)
        if changes:
            self._news.set()
