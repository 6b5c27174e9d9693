"""What a watch concludes from what the store tells it, and leases under a clock moved by hand."""

import pytest

from shared.bus import Lease, LeaseChange, LeaseEvent, lease_bucket
from shared.bus.leases import LeaseTracker
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import ManualClock
from shared.errors import LeaseLost
from shared.messages.base import ErrorReply, MessageCodec

CODEC = MessageCodec((ErrorReply,))
ACQUIRED, RELEASED, EXPIRED = LeaseEvent.ACQUIRED, LeaseEvent.RELEASED, LeaseEvent.EXPIRED


def lease(revision: int, value: str = "v", key: str = "k") -> Lease:
    return Lease(key, value, revision)


def test_renewals_are_no_change_and_ends_carry_the_last_revision() -> None:
    tracker = LeaseTracker()
    assert tracker.held(lease(1), "h") == [LeaseChange(ACQUIRED, lease(1))]
    assert tracker.held(lease(2), "h") == []
    assert tracker.ended("k", RELEASED) == [LeaseChange(RELEASED, lease(2))]
    assert tracker.ended("k", EXPIRED) == []


@pytest.mark.parametrize(("value", "holder"), [("other", "h"), ("v", "other")])
def test_a_holder_that_changes_unseen_ends_the_old_lease(value: str, holder: str) -> None:
    tracker = LeaseTracker()
    tracker.held(lease(1), "h")
    assert tracker.held(lease(5, value), holder) == [
        LeaseChange(EXPIRED, lease(1)),
        LeaseChange(ACQUIRED, lease(5, value)),
    ]


def test_what_is_not_told_again_has_expired() -> None:
    tracker = LeaseTracker()
    for key in ("a", "b", "c"):
        tracker.held(lease(1, key=key), "h")
    tracker.begin_sync()
    assert tracker.held(lease(2, key="a"), "h") == []
    assert tracker.ended("b", RELEASED) == [LeaseChange(RELEASED, lease(1, key="b"))]
    assert tracker.end_sync() == [LeaseChange(EXPIRED, lease(1, key="c"))]
    assert tracker.end_sync() == []


def test_one_bucket_for_one_time_to_live() -> None:
    assert lease_bucket(2.0) == "leases_2000ms"
    assert lease_bucket(2.5) == "leases_2500ms"
    with pytest.raises(ValueError, match=r"at least 0\.5 s, not 0\.1 s"):
        lease_bucket(0.1)


async def test_a_lease_ends_exactly_one_time_to_live_after_its_renewal() -> None:
    clock = ManualClock()
    broker = MemoryBroker(clock=clock)
    async with MemoryBus(CODEC, broker) as bus:
        leases = await bus.lease_store(2.0)
        mine = await leases.try_acquire("k", "me")
        assert mine is not None
        clock.advance(1.5)
        mine = await leases.renew(mine)
        clock.advance(1.99)
        assert await leases.get("k") == mine
        async with leases.watch("k") as changes:
            assert await anext(changes) == LeaseChange(ACQUIRED, mine)
            clock.advance(0.01)
            broker.leases.expire()
            assert await anext(changes) == LeaseChange(EXPIRED, mine)
        assert await leases.get("k") is None
        with pytest.raises(LeaseLost):
            await leases.renew(mine)


async def test_leases_are_not_judged_for_one_time_to_live_after_a_reconnect() -> None:
    clock = ManualClock(start_s=100.0)
    broker = MemoryBroker(clock=clock)
    async with MemoryBus(CODEC, broker) as bus:
        assert bus.connected_since_s() == 100.0
        assert bus.may_judge_leases(2.0)
        clock.advance(10.0)
        broker.stop()
        assert not bus.may_judge_leases(2.0)
        clock.advance(1.0)
        broker.start()
        assert bus.connected_since_s() == 111.0
        clock.advance(1.99)
        assert not bus.may_judge_leases(2.0)
        clock.advance(0.01)
        assert bus.may_judge_leases(2.0)
