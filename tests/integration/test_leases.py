"""What leases and leader election promise, on the memory bus and on NATS alike."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from shared.bus import Bus, LeaderElection, Lease, LeaseChange, LeaseEvent, LeaseStore, LeaseWatch
from shared.errors import BusDisconnected, LeaseLost
from tests.integration.bus_rig import NatsRig, Rig, open_rig, reconnected, until

pytestmark = pytest.mark.timeout(60)

TTL_S = 1.0
LONG_TTL_S = 60.0


@pytest.fixture(params=["memory", "nats"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(request.param, tmp_path) as rig:
        yield rig


async def new_store(rig: Rig, ttl_s: float = LONG_TTL_S) -> LeaseStore:
    return await (await rig.bus()).lease_store(ttl_s)


async def take(leases: LeaseStore, key: str = "k", value: str = "me") -> Lease:
    lease = await leases.try_acquire(key, value)
    assert lease is not None
    return lease


async def next_change(watch: LeaseWatch) -> LeaseChange:
    async with asyncio.timeout(10.0):
        return await anext(watch)


async def test_one_holder_at_a_time(rig: Rig) -> None:
    first, second = await new_store(rig), await new_store(rig)
    assert await first.get("k") is None
    lease = await take(first, value="first")
    assert await second.try_acquire("k", "second") is None
    assert await second.get("k") == lease
    assert (lease.key, lease.value) == ("k", "first")
    assert first.ttl_s == LONG_TTL_S


async def test_revisions_grow_over_renewals_holders_and_keys(rig: Rig) -> None:
    first, second = await new_store(rig), await new_store(rig)
    leases = [await take(first, "a")]
    leases.append(await first.renew(leases[-1]))
    leases.append(await take(second, "b"))
    await first.release(leases[1])
    leases.append(await take(second, "a"))
    revisions = [lease.revision for lease in leases]
    assert revisions == sorted(set(revisions))


async def test_a_released_lease_is_free_at_once(rig: Rig) -> None:
    first, second = await new_store(rig), await new_store(rig)
    lease = await take(first)
    await first.release(lease)
    assert await second.get("k") is None
    other = await take(second)
    await first.release(lease)
    assert await second.get("k") == other
    with pytest.raises(LeaseLost):
        await first.renew(lease)


async def test_the_same_name_elsewhere_is_another_holder(rig: Rig) -> None:
    first, second = await new_store(rig), await new_store(rig)
    await take(first, value="scheduler")
    assert await second.try_acquire("k", "scheduler") is None


async def test_what_a_lost_acknowledgement_left_is_recognised(rig: Rig) -> None:
    leases = await new_store(rig)
    lost = await take(leases)
    renewed_unknown = await leases.renew(lost)
    again = await take(leases)
    assert again.revision > renewed_unknown.revision
    assert (await leases.renew(lost)).revision > again.revision
    await leases.release(lost)
    assert await leases.get("k") is None


async def test_a_renewed_lease_lives_on_and_another_expires(rig: Rig) -> None:
    first, second = await new_store(rig, TTL_S), await new_store(rig, TTL_S)
    kept, dropped = await take(first, "kept"), await take(first, "dropped")
    async with second.watch("dropped") as changes:
        assert (await next_change(changes)).event is LeaseEvent.ACQUIRED

        async def keep(lease: Lease) -> None:
            while True:
                lease = await first.renew(lease)
                await asyncio.sleep(TTL_S / 4)

        keeper = asyncio.create_task(keep(kept))
        assert await next_change(changes) == LeaseChange(LeaseEvent.EXPIRED, dropped)
        keeper.cancel()
    held = await second.get("kept")
    assert held is not None
    assert held.value == "me"
    assert await second.get("dropped") is None
    with pytest.raises(LeaseLost):
        await first.renew(dropped)
    assert (await take(second, "dropped")).revision > dropped.revision


async def test_a_watch_sees_acquisition_release_and_expiry_but_no_renewal(rig: Rig) -> None:
    leases, observer = await new_store(rig, TTL_S), await new_store(rig, TTL_S)
    async with observer.watch("k") as changes:
        first = await take(leases)
        renewed = await leases.renew(first)
        await leases.release(renewed)
        second = await take(leases)
        assert [await next_change(changes) for _ in range(4)] == [
            LeaseChange(LeaseEvent.ACQUIRED, first),
            LeaseChange(LeaseEvent.RELEASED, renewed),
            LeaseChange(LeaseEvent.ACQUIRED, second),
            LeaseChange(LeaseEvent.EXPIRED, second),
        ]


async def test_a_watch_begins_with_what_is_held(rig: Rig) -> None:
    leases, observer = await new_store(rig), await new_store(rig)
    held = {await take(leases, f"worker.{n}") for n in range(3)}
    await take(leases, "leader")
    await leases.release(await take(leases, "worker.gone"))
    async with observer.watch("worker.*") as changes:
        seen = [await next_change(changes) for _ in range(3)]
        assert {change.lease for change in seen} == held
        assert {change.event for change in seen} == {LeaseEvent.ACQUIRED}
        late = await take(leases, "worker.late")
        assert await next_change(changes) == LeaseChange(LeaseEvent.ACQUIRED, late)


async def test_a_watch_ends_with_its_bus(rig: Rig) -> None:
    bus = await rig.bus()
    changes = (await bus.lease_store(LONG_TTL_S)).watch("k")
    await changes.start()
    waiting = asyncio.create_task(anext(changes, None))
    await asyncio.sleep(0)
    await bus.close()
    assert await waiting is None


@pytest.mark.parametrize("key", ["", "a b", "a.*", ">", ".a", "a..b", "ä"])
async def test_what_is_no_key_is_refused(rig: Rig, key: str) -> None:
    leases = await new_store(rig)
    with pytest.raises(ValueError, match="not a lease key"):
        await leases.try_acquire(key, "me")
    with pytest.raises(ValueError, match="not a lease key"):
        await leases.get(key)


async def test_too_short_a_time_to_live_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match=r"at least 0\.5 s"):
        await (await rig.bus()).lease_store(0.1)


async def test_leases_outlive_a_crash_of_the_broker(rig: Rig) -> None:
    holder_bus, observer_bus = await rig.bus(), await rig.bus()
    holder = await holder_bus.lease_store(LONG_TTL_S)
    observer = await observer_bus.lease_store(LONG_TTL_S)
    kept, released = await take(holder, "kept"), await take(holder, "released")
    async with observer.watch(">") as changes:
        assert {(await next_change(changes)).lease for _ in range(2)} == {kept, released}
        await rig.crash()
        with pytest.raises(BusDisconnected):
            await holder.renew(kept)
        await reconnected(holder_bus, observer_bus, meanwhile=rig.come_back)
        assert (await holder.renew(kept)).revision > kept.revision
        await holder.release(released)
        assert await next_change(changes) == LeaseChange(LeaseEvent.RELEASED, released)


async def test_what_expired_while_the_broker_was_away_is_seen_after_it(rig: Rig) -> None:
    holder_bus, observer_bus = await rig.bus(), await rig.bus()
    holder = await holder_bus.lease_store(TTL_S)
    observer = await observer_bus.lease_store(TTL_S)
    lease = await take(holder)
    async with observer.watch("k") as changes:
        assert await next_change(changes) == LeaseChange(LeaseEvent.ACQUIRED, lease)
        await rig.crash()
        await asyncio.sleep(TTL_S)
        await reconnected(holder_bus, observer_bus, meanwhile=rig.come_back)
        assert await next_change(changes) == LeaseChange(LeaseEvent.EXPIRED, lease)
    assert not observer_bus.may_judge_leases(3600.0)
    assert (await take(holder)).revision > lease.revision


# Leader election


class Candidate:
    """A candidate and its story, for instance ``["elected", "deposed"]``."""

    def __init__(self, bus: Bus, leases: LeaseStore, name: str) -> None:
        self.story: list[str] = []
        self.epochs: list[int] = []
        self._news = asyncio.Condition()
        self.election = LeaderElection(
            bus,
            leases,
            key="leader",
            candidate=name,
            on_elected=self._elected,
            on_deposed=self._deposed,
        )
        self.task = asyncio.create_task(self.election.run())

    async def _elected(self, epoch: int) -> None:
        assert self.election.is_leader
        assert self.election.epoch == epoch
        self.epochs.append(epoch)
        await self._tell("elected")

    async def _deposed(self) -> None:
        assert not self.election.is_leader
        assert self.election.epoch is None
        await self._tell("deposed")

    async def _tell(self, event: str) -> None:
        async with self._news:
            self.story.append(event)
            self._news.notify_all()

    async def lives(self, *story: str) -> None:
        async with asyncio.timeout(20.0), self._news:
            await self._news.wait_for(lambda: len(self.story) >= len(story))
        assert self.story == list(story)

    async def stands_by(self) -> None:
        await until(lambda: self.election.has_rival)

    async def retire(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def enter(stack: AsyncExitStack, bus: Bus, name: str, ttl_s: float = TTL_S) -> Candidate:
    candidate = Candidate(bus, await bus.lease_store(ttl_s), name)
    stack.push_async_callback(candidate.retire)
    return candidate


async def test_a_retiring_leader_hands_over_at_once(rig: Rig, stack: AsyncExitStack) -> None:
    first = await enter(stack, await rig.bus(), "first", LONG_TTL_S)
    await first.lives("elected")
    second = await enter(stack, await rig.bus(), "second", LONG_TTL_S)
    await second.stands_by()
    assert not second.election.is_leader
    await first.retire()
    await first.lives("elected", "deposed")
    await second.lives("elected")
    assert second.epochs[0] > first.epochs[0]


async def test_a_leader_that_is_cut_off_is_succeeded(rig: Rig, stack: AsyncExitStack) -> None:
    first_bus = await rig.bus()
    first = await enter(stack, first_bus, "first")
    await first.lives("elected")
    second = await enter(stack, await rig.bus(), "second")
    await second.stands_by()
    await first_bus.close()
    await second.lives("elected")
    assert not first.election.is_leader
    await first.lives("elected", "deposed")
    assert second.epochs[0] > first.epochs[0]


async def test_after_a_short_outage_the_leader_still_leads(rig: Rig, stack: AsyncExitStack) -> None:
    buses = [await rig.bus(), await rig.bus()]
    first = await enter(stack, buses[0], "first", 5.0)
    await first.lives("elected")
    second = await enter(stack, buses[1], "second", 5.0)
    await second.stands_by()
    await rig.crash()
    await reconnected(*buses, meanwhile=rig.come_back)
    assert first.election.is_leader
    await first.retire()
    await second.lives("elected")
    assert first.story == ["elected", "deposed"]


async def test_after_a_long_outage_the_former_leader_comes_first(
    rig: Rig, stack: AsyncExitStack
) -> None:
    buses = [await rig.bus(), await rig.bus()]
    first = await enter(stack, buses[0], "first")
    await first.lives("elected")
    second = await enter(stack, buses[1], "second")
    await second.stands_by()
    await rig.crash()
    await first.lives("elected", "deposed")
    await asyncio.sleep(TTL_S / 2)
    await reconnected(*buses, meanwhile=rig.come_back)
    await first.lives("elected", "deposed", "elected")
    assert first.epochs[1] > first.epochs[0]
    assert second.story == []


async def test_a_leader_that_never_comes_back_is_succeeded_after_an_outage(
    rig: Rig, stack: AsyncExitStack
) -> None:
    buses = [await rig.bus(), await rig.bus()]
    first = await enter(stack, buses[0], "first")
    await first.lives("elected")
    second = await enter(stack, buses[1], "second")
    await second.stands_by()
    await rig.crash()
    await buses[0].close()
    await reconnected(buses[1], meanwhile=rig.come_back)
    await second.lives("elected")
    assert second.epochs[0] > first.epochs[0]


_FROZEN_CANDIDATE = """
import asyncio, sys
from shared.bus import LeaderElection
from shared.bus.nats import NatsBus
from tests.integration.bus_rig import CODEC

async def main():
    async with NatsBus(CODEC, sys.argv[1], name="frozen") as bus:
        async def elected(epoch):
            print("elected", epoch, flush=True)
        async def deposed():
            print("deposed", election.is_leader, flush=True)
        election = LeaderElection(bus, await bus.lease_store(float(sys.argv[2])), key="leader",
            candidate="frozen", on_elected=elected, on_deposed=deposed)
        await election.run()

asyncio.run(main())
"""


async def test_a_frozen_leader_is_succeeded_and_knows_it_when_it_thaws(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    rig = await stack.enter_async_context(open_rig("nats", tmp_path))
    assert isinstance(rig, NatsRig)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _FROZEN_CANDIDATE,
        rig.server.url,
        str(TTL_S),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )

    async def end() -> None:
        process.kill()
        await process.communicate()

    stack.push_async_callback(end)
    assert process.stdout is not None
    event, epoch = (await process.stdout.readline()).split()
    assert event == b"elected"
    second = await enter(stack, await rig.bus(), "second")
    process.send_signal(signal.SIGSTOP)
    await second.lives("elected")
    assert second.epochs[0] > int(epoch)
    process.send_signal(signal.SIGCONT)
    assert (await process.stdout.readline()).split() == [b"deposed", b"False"]
    assert second.election.is_leader


async def test_epochs_grow_even_if_jetstream_loses_its_disk(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    rig = await stack.enter_async_context(open_rig("nats", tmp_path))
    bus = await rig.bus()
    first = await enter(stack, bus, "first")
    await first.lives("elected")
    await rig.crash()
    (tmp_path / "jetstream").rename(tmp_path / "lost")
    await rig.come_back()
    await first.lives("elected", "deposed", "elected")
    assert first.epochs[1] > first.epochs[0]
