"""One leader among several candidates, by a lease."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shared.bus.base import Bus
from shared.bus.leases import Lease, LeaseEvent, LeaseStore
from shared.clock import Clock, MonotonicClock
from shared.errors import BusError, LeaseLost

logger = logging.getLogger(__name__)

_RENEWALS_PER_TTL = 4
_CAMPAIGNS_PER_TTL = 2


class LeaderElection:
    """Campaigns for the lease ``key`` and keeps it.

    A *term* begins with ``on_elected(epoch)`` and ends with ``on_deposed()``. ``epoch`` is the
    revision of the acquisition: it grows strictly from term to term, whoever leads. The two never
    overlap: ``on_elected`` runs as a task that may last as long as the term, is cancelled when the
    term ends, and has ended before ``on_deposed`` is called; no new term begins here before
    ``on_deposed`` has returned. An exception of either ends ``run`` with it.

    A term ends when the lease is lost, or one time to live (on ``clock``) after the moment the last
    confirmed renewal was asked for: then the store may have given the lease to another. Whatever
    froze this process or cut it off, ``is_leader`` is false from that instant on; so ask it before
    each act that only a leader may do, and give ``epoch`` with the act.

    A candidate wakes up when the lease is released or expires, when the connection comes back, and
    on a timer. Of a rival it gives up for lost only after ``bus.may_judge_leases``: after an
    outage of the server the former leader comes first.

    ``candidate`` names this process for people, who see it in the lease.
    """

    def __init__(
        self,
        bus: Bus,
        leases: LeaseStore,
        *,
        key: str,
        candidate: str,
        on_elected: Callable[[int], Awaitable[None]],
        on_deposed: Callable[[], Awaitable[None]],
        clock: Clock | None = None,
    ) -> None:
        self._bus = bus
        self._leases = leases
        self._ttl_s = leases.ttl_s
        self._key = key
        self._candidate = candidate
        self._on_elected = on_elected
        self._on_deposed = on_deposed
        self._clock = clock or MonotonicClock()
        self._lease: Lease | None = None
        self._epoch = 0
        self._asked_at_s = 0.0
        self._confirmed_at_s = 0.0
        self._rival_seen = False
        self._term: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._reconnected = asyncio.Event()

    @property
    def is_leader(self) -> bool:
        """Whether this candidate leads at this very moment."""
        if self._lease is None:
            return False
        return self._clock.now_s() < self._confirmed_at_s + self._ttl_s

    @property
    def epoch(self) -> int | None:
        """The epoch of the present term, ``None`` when not leading."""
        return self._epoch if self.is_leader else None

    @property
    def has_rival(self) -> bool:
        """Whether another candidate held the lease when last looked at: we stand by."""
        return self._rival_seen

    async def run(self) -> None:
        """Campaign and lead until cancelled; then end the term and release the lease."""
        stop_listening = self._bus.add_reconnect_listener(self._on_reconnect)
        watcher = asyncio.create_task(self._watch(), name=f"watch {self._key}")
        watcher.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                self._wake.clear()
                await self._step()
                if watcher.done():
                    watcher.result()
                await self._sleep()
        finally:
            stop_listening()
            watcher.cancel()
            await asyncio.wait({watcher})
            await self._retire()

    async def _on_reconnect(self) -> None:
        self._reconnected.set()
        self._wake.set()

    async def _watch(self) -> None:
        """Wake the campaign when the lease changes hands, until the bus is closed."""
        while True:
            try:
                async with self._leases.watch(self._key) as changes:
                    async for change in changes:
                        if change.event is LeaseEvent.RELEASED:
                            self._rival_seen = False
                        self._wake.set()
                return
            except BusError as error:
                # Until this works the timer of the campaign has to do.
                logger.info("%s cannot watch %s: %s", self._candidate, self._key, error)
                await self._bus_back_or(self._ttl_s / _RENEWALS_PER_TTL)

    async def _bus_back_or(self, timeout_s: float) -> None:
        self._reconnected.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._reconnected.wait()
        except TimeoutError:
            return

    async def _sleep(self) -> None:
        """Until something happens or the next renewal or attempt is due."""
        if self._lease is None:
            due_s = self._asked_at_s + self._ttl_s / _CAMPAIGNS_PER_TTL
        else:
            due_s = self._asked_at_s + self._ttl_s / _RENEWALS_PER_TTL
            due_s = min(due_s, self._confirmed_at_s + self._ttl_s)
        try:
            async with asyncio.timeout(max(due_s - self._clock.now_s(), 0.0)):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _step(self) -> None:
        # Before anything else: a process that was frozen must not act on what it was.
        if self._lease is not None and not self.is_leader:
            await self._end_term("the lease was not renewed in time")
        if self._term is not None and self._term.done():
            self._term.result()
        if self._lease is None:
            await self._campaign()
        else:
            await self._renew(self._lease)

    async def _campaign(self) -> None:
        asked_at_s = self._asked_at_s = self._clock.now_s()
        if self._rival_seen and not self._bus.may_judge_leases(self._ttl_s):
            return
        try:
            lease = await self._leases.try_acquire(self._key, self._candidate)
        except BusError as error:
            logger.info("%s cannot campaign: %s", self._candidate, error)
            return
        self._rival_seen = lease is None
        if lease is None:
            return
        if self._clock.now_s() >= asked_at_s + self._ttl_s:
            self._wake.set()  # frozen in between: it is worth nothing, ask again
            return
        self._lease, self._epoch, self._confirmed_at_s = lease, lease.revision, asked_at_s
        logger.info("%s leads %s in epoch %d", self._candidate, self._key, self._epoch)
        self._term = asyncio.create_task(self._lead(self._epoch), name=f"lead {self._key}")

    async def _lead(self, epoch: int) -> None:
        try:
            await self._on_elected(epoch)
        except Exception:
            self._wake.set()
            raise

    async def _renew(self, lease: Lease) -> None:
        asked_at_s = self._asked_at_s = self._clock.now_s()
        try:
            async with asyncio.timeout(self._confirmed_at_s + self._ttl_s - asked_at_s):
                self._lease = await self._leases.renew(lease)
            self._confirmed_at_s = asked_at_s
        except LeaseLost as error:
            await self._end_term(str(error))
            self._wake.set()
        except (BusError, TimeoutError) as error:
            logger.warning("%s could not renew %s: %s", self._candidate, self._key, error)

    async def _end_term(self, reason: str) -> None:
        """No leader from here on."""
        self._lease = None
        logger.warning("%s ends epoch %d: %s", self._candidate, self._epoch, reason)
        term, self._term = self._term, None
        if term is not None:
            term.cancel()
            await asyncio.wait({term})
        await self._on_deposed()
        if term is not None and not term.cancelled():
            term.result()

    async def _retire(self) -> None:
        lease = self._lease
        if lease is None:
            return
        try:
            await self._end_term("it retires")
        finally:
            try:
                await self._leases.release(lease)
            except BusError as error:
                logger.info("%s could not release %s: %s", self._candidate, self._key, error)
