"""Leader election under a clock moved by hand, over the memory bus."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from shared.bus import LeaderElection, LeaseEvent
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import ManualClock
from shared.messages.base import ErrorReply, MessageCodec
from tests.integration.bus_rig import until

pytestmark = pytest.mark.timeout(30)

CODEC = MessageCodec((ErrorReply,))
TTL_S = 0.5


class World:
    """One broker whose clock a test moves, and the story of one candidate."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(clock=self.clock)
        self.bus = MemoryBus(CODEC, self.broker)
        self.story: list[str] = []
        self.epochs: list[int] = []
        self._news = asyncio.Condition()

    async def tell(self, event: str) -> None:
        async with self._news:
            self.story.append(event)
            self._news.notify_all()

    async def reaches(self, *story: str) -> None:
        async with asyncio.timeout(10.0), self._news:
            await self._news.wait_for(lambda: len(self.story) >= len(story))
        assert self.story == list(story)

    async def elected(self, epoch: int) -> None:
        self.epochs.append(epoch)
        await self.tell("elected")

    async def deposed(self) -> None:
        await self.tell("deposed")

    @asynccontextmanager
    async def candidate(
        self, on_elected: Callable[[int], Awaitable[None]] | None = None
    ) -> AsyncIterator[LeaderElection]:
        await self.bus.connect()
        election = LeaderElection(
            self.bus,
            await self.bus.lease_store(TTL_S),
            key="leader",
            candidate="me",
            on_elected=on_elected or self.elected,
            on_deposed=self.deposed,
            clock=self.clock,
        )
        task = asyncio.create_task(election.run())
        try:
            yield election
        finally:
            task.cancel()
            await asyncio.wait({task})
            await self.bus.close()


async def test_a_leader_that_was_frozen_is_none_before_it_does_anything() -> None:
    world = World()
    async with world.candidate() as election:
        await world.reaches("elected")
        assert election.is_leader
        assert election.epoch == world.epochs[0]
        world.clock.advance(TTL_S - 0.001)
        assert election.is_leader
        world.clock.advance(0.001)
        assert not election.is_leader
        assert election.epoch is None
        assert world.story == ["elected"]
        await world.reaches("elected", "deposed", "elected")
        assert world.epochs[1] > world.epochs[0]


async def test_a_leader_without_a_bus_is_deposed_by_its_own_clock() -> None:
    world = World()
    async with world.candidate() as election:
        await world.reaches("elected")
        world.broker.stop()
        assert election.is_leader
        world.clock.advance(TTL_S)
        await world.reaches("elected", "deposed")
        world.broker.start()
        await world.reaches("elected", "deposed", "elected")


async def test_the_work_of_a_term_ends_before_on_deposed() -> None:
    world = World()

    async def lead(epoch: int) -> None:
        await world.tell("leading")
        try:
            await asyncio.Event().wait()
        finally:
            await world.tell("stopped")

    async with world.candidate(lead):
        await world.reaches("leading")
        world.clock.advance(TTL_S)
        await world.reaches("leading", "stopped", "deposed", "leading")


async def test_a_term_that_fails_ends_the_run_and_frees_the_lease() -> None:
    world = World()
    await world.bus.connect()
    leases = await world.bus.lease_store(TTL_S)

    async def fail(epoch: int) -> None:
        raise ZeroDivisionError("on purpose")

    election = LeaderElection(
        world.bus,
        leases,
        key="leader",
        candidate="me",
        on_elected=fail,
        on_deposed=world.deposed,
        clock=world.clock,
    )
    with pytest.raises(ZeroDivisionError):
        await election.run()
    assert world.story == ["deposed"]
    assert await leases.get("leader") is None
    await world.bus.close()


async def test_a_lost_lease_ends_the_term() -> None:
    world = World()
    async with world.candidate() as election:
        await world.reaches("elected")
        world.broker.leases.drop("leases_500ms", "leader", LeaseEvent.EXPIRED)
        await world.reaches("elected", "deposed", "elected")
        assert election.is_leader
        assert world.epochs[1] > world.epochs[0]


async def test_a_candidate_stands_by_while_another_leads() -> None:
    world = World()
    rival = MemoryBus(CODEC, world.broker)
    await rival.connect()
    theirs = await (await rival.lease_store(TTL_S)).try_acquire("leader", "rival")
    assert theirs is not None
    async with world.candidate() as election:
        await until(lambda: election.has_rival)
        assert not election.is_leader
        assert world.story == []
        await (await rival.lease_store(TTL_S)).release(theirs)  # another store: not its own
        assert world.story == []
        world.clock.advance(TTL_S)
        world.broker.leases.expire()
        await world.reaches("elected")
        assert world.epochs[0] > theirs.revision
    await rival.close()
