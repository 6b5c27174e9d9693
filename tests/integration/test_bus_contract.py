"""What every bus promises, tried on the memory bus and on NATS alike."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus import Bus, Subscription
from shared.bus.nats import NatsBus
from shared.errors import (
    BusDisconnected,
    BusTimeout,
    NoResponder,
    ProtocolError,
    Refused,
    RemoteError,
)
from shared.messages.base import Message
from tests.integration.bus_rig import (
    CODEC,
    MAX_PAYLOAD_BYTES,
    STRANGE_CODEC,
    NatsRig,
    Ping,
    Pong,
    Rig,
    Stranger,
    open_rig,
    reconnected,
    until,
)

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(params=["memory", "nats"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(request.param, tmp_path) as rig:
        yield rig


class Inbox:
    """A handler that keeps what it gets, and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: list[tuple[Message, str]] = []
        self._news = asyncio.Condition()

    async def __call__(self, message: Message, subject: str) -> None:
        async with self._news:
            self.messages.append((message, subject))
            self._news.notify_all()

    @property
    def numbers(self) -> list[int]:
        return [message.number for message, _ in self.messages if isinstance(message, Ping)]

    async def has(self, count: int) -> None:
        async with asyncio.timeout(10.0), self._news:
            await self._news.wait_for(lambda: len(self.messages) >= count)


async def echo(message: Message) -> Message:
    assert isinstance(message, Ping)
    return Pong(number=message.number)


async def ask(bus: Bus, subject: str, number: int = 1, timeout_s: float = 10.0) -> Pong:
    return await bus.request(subject, Ping(number=number), Pong, timeout_s=timeout_s)


# Publish and subscribe


async def test_every_subscriber_gets_every_message_in_order(rig: Rig) -> None:
    publisher, first, second = await rig.bus(), await rig.bus(), await rig.bus()
    inboxes = [Inbox(), Inbox(), Inbox()]
    await first.subscribe("a.b", inboxes[0])
    await second.subscribe("a.b", inboxes[1])
    await publisher.subscribe("a.b", inboxes[2])
    for number in range(300):
        await publisher.publish("a.b", Ping(number=number))
    for inbox in inboxes:
        await inbox.has(300)
        assert inbox.numbers == list(range(300))
        assert {subject for _, subject in inbox.messages} == {"a.b"}


@pytest.mark.parametrize(
    ("pattern", "received"),
    [
        ("load.*.w1", ["load.decode.w1", "load.prefill.w1"]),
        ("load.>", ["load.decode.w1", "load.prefill.w1", "load.prefill.w2", "load.x"]),
        ("load.prefill.w1", ["load.prefill.w1"]),
        ("load.*", ["load.x"]),
    ],
)
async def test_wildcards(rig: Rig, pattern: str, received: list[str]) -> None:
    bus, inbox = await rig.bus(), Inbox()
    await bus.subscribe(pattern, inbox)
    for subject in ("load.decode.w1", "load.prefill.w1", "load.prefill.w2", "load.x", "load"):
        await bus.publish(subject, Ping(number=0))
    await inbox.has(len(received))
    await bus.flush()
    assert [subject for _, subject in inbox.messages] == received


async def test_a_queue_group_shares_what_others_get_whole(rig: Rig) -> None:
    bus = await rig.bus()
    members, outsider = [Inbox(), Inbox(), Inbox()], Inbox()
    for member in members:
        await (await rig.bus()).subscribe("work", member, queue="workers")
    await (await rig.bus()).subscribe("work", outsider)
    for number in range(300):
        await bus.publish("work", Ping(number=number))
    await outsider.has(300)
    await until(lambda: sum(len(member.messages) for member in members) == 300)
    assert sorted(n for member in members for n in member.numbers) == list(range(300))
    assert all(member.messages for member in members)


async def test_a_failing_handler_is_counted_and_goes_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    bus, inbox = await rig.bus(), Inbox()

    async def handler(message: Message, subject: str) -> None:
        await inbox(message, subject)
        if inbox.numbers[-1] == 0:
            raise ZeroDivisionError("on purpose")

    subscription = await bus.subscribe("s", handler)
    await bus.publish("s", Ping(number=0))
    await bus.publish("s", Ping(number=1))
    await inbox.has(2)
    assert (subscription.num_received, subscription.num_failed) == (2, 1)
    assert "ZeroDivisionError: on purpose" in caplog.text


async def test_an_unknown_message_is_counted_and_skipped(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    bus, stranger, inbox = await rig.bus(), await rig.bus(STRANGE_CODEC), Inbox()
    subscription = await bus.subscribe("s", inbox)
    await stranger.publish("s", Stranger())
    await stranger.flush()
    await bus.publish("s", Ping(number=1))
    await inbox.has(1)
    assert inbox.numbers == [1]
    assert (subscription.num_received, subscription.num_failed) == (2, 1)
    assert "unknown message 'Stranger'" in caplog.text


async def test_overflow_drops_the_oldest(rig: Rig) -> None:
    bus, inbox = await rig.bus(), Inbox()
    started, may_go_on = asyncio.Event(), asyncio.Event()

    async def slow(message: Message, subject: str) -> None:
        started.set()
        await may_go_on.wait()
        await inbox(message, subject)

    subscription = await bus.subscribe("s", slow, max_pending=3)
    await bus.publish("s", Ping(number=0))
    await started.wait()
    for number in range(1, 10):
        await bus.publish("s", Ping(number=number))
    await until_received(subscription, 10)
    may_go_on.set()
    await inbox.has(4)
    assert inbox.numbers == [0, 7, 8, 9]
    assert subscription.num_dropped == 6


async def until_received(subscription: Subscription, count: int) -> None:
    await until(lambda: subscription.num_received >= count)


async def test_unsubscribe_handles_what_has_arrived_and_then_nothing(rig: Rig) -> None:
    bus, inbox = await rig.bus(), Inbox()
    subscription = await bus.subscribe("s", inbox)
    for number in range(100):
        await bus.publish("s", Ping(number=number))
    await subscription.unsubscribe()
    assert inbox.numbers == list(range(100))
    await bus.publish("s", Ping(number=100))
    await bus.flush()
    await subscription.unsubscribe()
    assert len(inbox.messages) == 100


async def test_unsubscribe_waits_for_the_handler_until_its_deadline(rig: Rig) -> None:
    bus, started, was_cancelled = await rig.bus(), asyncio.Event(), asyncio.Event()

    async def endless(message: Message, subject: str) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    subscription = await bus.subscribe("s", endless)
    await bus.publish("s", Ping(number=0))
    await bus.publish("s", Ping(number=1))
    await started.wait()
    await until_received(subscription, 2)
    await subscription.unsubscribe(timeout_s=0.01)
    assert was_cancelled.is_set()
    assert subscription.num_dropped == 1


async def test_a_handler_may_end_its_own_subscription_or_the_bus(rig: Rig) -> None:
    bus, ended, closed = await rig.bus(), asyncio.Event(), asyncio.Event()
    subscriptions: list[Subscription] = []

    async def ending(message: Message, subject: str) -> None:
        await subscriptions[0].unsubscribe()
        ended.set()

    async def closing(message: Message) -> Message:
        await bus.close()
        closed.set()
        return Pong(number=0)

    subscriptions.append(await bus.subscribe("s", ending))
    await bus.publish("s", Ping(number=0))
    await ended.wait()
    await bus.serve("t", closing)
    await bus.publish("t", Ping(number=0))
    await closed.wait()


async def test_a_message_larger_than_max_payload_is_refused(rig: Rig) -> None:
    bus, inbox = await rig.bus(), Inbox()
    await bus.subscribe("s", inbox)
    with pytest.raises(ProtocolError, match="max_payload of 65536 bytes"):
        await bus.publish("s", Ping(number=0, padding=bytes(MAX_PAYLOAD_BYTES)))
    await bus.publish("s", Ping(number=1, padding=bytes(MAX_PAYLOAD_BYTES - 100)))
    await inbox.has(1)
    assert inbox.numbers == [1]


@pytest.mark.parametrize("subject", ["", "a b", "a..b", ".a", "a.\r\nPING"])
async def test_what_is_no_subject_is_refused(rig: Rig, subject: str) -> None:
    bus = await rig.bus()
    with pytest.raises(ValueError, match="not a subject"):
        await bus.publish(subject, Ping(number=0))
    with pytest.raises(ValueError, match="not a subject"):
        await ask(bus, subject)
    with pytest.raises(ValueError, match="not a subject"):
        await bus.subscribe(subject, Inbox())


@pytest.mark.parametrize("pattern", ["a.>.b", "a.b*", "a.>b"])
async def test_a_misplaced_wildcard_is_refused(rig: Rig, pattern: str) -> None:
    bus = await rig.bus()
    with pytest.raises(ValueError, match="wildcard"):
        await bus.subscribe(pattern, Inbox())


# Request and reply


async def test_requests_get_their_own_answers(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()
    await server.serve("echo", echo)
    answers = await asyncio.gather(*(ask(client, "echo", number) for number in range(100)))
    assert [answer.number for answer in answers] == list(range(100))


async def test_requests_are_served_concurrently_up_to_a_bound(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()
    may_answer, running = asyncio.Event(), 0

    async def waiting(message: Message) -> Message:
        nonlocal running
        running += 1
        await may_answer.wait()
        return await echo(message)

    subscription = await server.serve("slow", waiting, max_concurrency=3)
    requests = [asyncio.create_task(ask(client, "slow", number)) for number in range(3)]
    await until_received(subscription, 3)
    with pytest.raises(RemoteError) as overloaded:
        await ask(client, "slow")
    assert overloaded.value.code == "Overloaded"
    assert subscription.num_dropped == 1
    may_answer.set()
    assert [answer.number for answer in await asyncio.gather(*requests)] == [0, 1, 2]
    assert running == 3
    assert (await ask(client, "slow")).number == 1


async def test_one_member_of_a_queue_group_answers(rig: Rig) -> None:
    client = await rig.bus()
    served: list[int] = []

    async def count(message: Message) -> Message:
        assert isinstance(message, Ping)
        served.append(message.number)
        return await echo(message)

    for _ in range(3):
        await (await rig.bus()).serve("work", count, queue="workers")
    await asyncio.gather(*(ask(client, "work", number) for number in range(50)))
    assert sorted(served) == list(range(50))


async def test_nobody_there_is_known_at_once(rig: Rig) -> None:
    bus = await rig.bus()
    with pytest.raises(NoResponder, match=r"nobody\.here"):
        await ask(bus, "nobody.here", timeout_s=600.0)


async def test_no_answer_in_time(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def silent(message: Message) -> Message:
        await asyncio.Event().wait()
        return message

    subscription = await server.serve("silent", silent)
    with pytest.raises(BusTimeout, match="silent"):
        await ask(client, "silent", timeout_s=0.02)
    await subscription.unsubscribe(timeout_s=0.0)


async def test_an_error_of_ours_is_an_answer(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def refuse(message: Message) -> Message:
        raise Refused("queue is full", retry_after_s=1.0)

    subscription = await server.serve("r", refuse)
    with pytest.raises(RemoteError, match="queue is full") as refused:
        await ask(client, "r")
    assert refused.value.code == "Refused"
    assert subscription.num_failed == 0


async def test_an_error_of_anybody_is_answered_logged_and_counted(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def broken(message: Message) -> Message:
        raise KeyError("lost")

    subscription = await server.serve("r", broken)
    with pytest.raises(RemoteError, match="KeyError") as failed:
        await ask(client, "r")
    assert failed.value.code == "InternalError"
    assert subscription.num_failed == 1
    assert "Traceback" in caplog.text


async def test_an_unknown_request_is_answered(rig: Rig) -> None:
    server, stranger = await rig.bus(), await rig.bus(STRANGE_CODEC)
    subscription = await server.serve("r", echo)
    with pytest.raises(RemoteError, match="Stranger") as unknown:
        await stranger.request("r", Stranger(), Pong, timeout_s=10.0)
    assert unknown.value.code == "UnknownMessage"
    assert subscription.num_failed == 1


async def test_a_reply_of_another_type_is_a_protocol_error(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()
    await server.serve("r", echo)
    with pytest.raises(ProtocolError, match="Pong instead of a Ping"):
        await client.request("r", Ping(number=1), Ping, timeout_s=10.0)


async def test_a_reply_that_is_too_large_is_still_answered(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def boast(message: Message) -> Message:
        return Ping(number=1, padding=bytes(MAX_PAYLOAD_BYTES))

    await server.serve("r", boast)
    with pytest.raises(RemoteError, match="max_payload") as failed:
        await client.request("r", Ping(number=1), Ping, timeout_s=10.0)
    assert failed.value.code == "ProtocolError"


async def test_a_published_request_is_handled_without_a_reply(rig: Rig) -> None:
    bus, handled = await rig.bus(), asyncio.Event()

    async def handle(message: Message) -> Message:
        handled.set()
        return Pong(number=0)

    subscription = await bus.serve("r", handle)
    await bus.publish("r", Ping(number=0))
    await handled.wait()
    assert subscription.num_failed == 0


async def test_a_request_cut_off_by_the_end_of_the_service_is_answered(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def endless(message: Message) -> Message:
        await asyncio.Event().wait()
        return message

    subscription = await server.serve("r", endless)
    request = asyncio.create_task(ask(client, "r"))
    await until_received(subscription, 1)
    await server.close(timeout_s=0.1)
    with pytest.raises(RemoteError) as cut:
        await request
    assert cut.value.code == "Cancelled"
    with pytest.raises(NoResponder):
        await ask(client, "r")


async def test_close_lets_running_requests_finish(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()
    may_answer = asyncio.Event()

    async def waiting(message: Message) -> Message:
        await may_answer.wait()
        return await echo(message)

    subscription = await server.serve("r", waiting)
    request = asyncio.create_task(ask(client, "r", 7))
    await until_received(subscription, 1)
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0)
    may_answer.set()
    assert (await request).number == 7
    await closing
    assert not server.is_connected


async def test_a_broadcast_gathers_the_answers_of_all(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    client = await rig.bus()

    async def fail(message: Message) -> Message:
        raise Refused("not now", retry_after_s=1.0)

    for name in ("a", "b", "c"):

        async def answer(message: Message, name: str = name) -> Message:
            return Pong(number=0, server=name)

        await (await rig.bus()).serve("snapshot", answer)
    found = await client.request_many("snapshot", Ping(number=0), Pong, timeout_s=600.0, expected=3)
    assert {answer.server for answer in found} == {"a", "b", "c"}
    await (await rig.bus()).serve("snapshot", fail)
    found = await client.request_many("snapshot", Ping(number=0), Pong, timeout_s=0.2)
    assert {answer.server for answer in found} == {"a", "b", "c"}
    assert "Refused: not now" in caplog.text


async def test_a_broadcast_to_nobody_ends_at_once(rig: Rig) -> None:
    bus = await rig.bus()
    assert await bus.request_many("n", Ping(number=0), Pong, timeout_s=600.0) == []
    assert await bus.request_many("n", Ping(number=0), Pong, timeout_s=600.0, expected=0) == []


# Connection


async def test_nothing_works_once_closed(rig: Rig) -> None:
    bus = await rig.bus()
    subscription = await bus.subscribe("s", Inbox())
    await bus.close()
    await bus.close()
    await subscription.unsubscribe()
    assert not bus.is_connected
    assert bus.connected_since_s() is None
    for attempt in (
        bus.publish("s", Ping(number=0)),
        ask(bus, "s"),
        bus.request_many("s", Ping(number=0), Pong, timeout_s=1.0),
        bus.subscribe("s", Inbox()),
        bus.serve("s", echo),
        bus.flush(),
        bus.lease_store(1.0),
    ):
        with pytest.raises(BusDisconnected):
            await attempt


async def test_a_request_under_way_fails_when_the_bus_is_closed(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def silent(message: Message) -> Message:
        await asyncio.Event().wait()
        return message

    subscription = await server.serve("silent", silent)
    request = asyncio.create_task(ask(client, "silent", timeout_s=600.0))
    await until_received(subscription, 1)
    await client.close()
    with pytest.raises(BusDisconnected):
        await request
    await subscription.unsubscribe(timeout_s=0.0)


async def test_requests_under_way_fail_when_the_broker_dies(rig: Rig) -> None:
    server, client = await rig.bus(), await rig.bus()

    async def silent(message: Message) -> Message:
        await asyncio.Event().wait()
        return message

    subscription = await server.serve("silent", silent)
    request = asyncio.create_task(ask(client, "silent", timeout_s=600.0))
    many = asyncio.create_task(client.request_many("silent", Ping(number=0), Pong, timeout_s=600.0))
    await until_received(subscription, 2)
    await rig.crash()
    with pytest.raises(BusDisconnected):
        await request
    with pytest.raises(BusDisconnected):
        await many
    with pytest.raises(BusDisconnected):
        await client.publish("silent", Ping(number=0))
    assert not client.is_connected
    assert client.connected_since_s() is None
    assert not client.may_judge_leases(0.0)


async def test_everything_works_again_after_the_broker_came_back(rig: Rig) -> None:
    server, client, inbox = await rig.bus(), await rig.bus(), Inbox()
    await server.serve("echo", echo)
    await server.subscribe("s", inbox, queue="q")
    assert client.may_judge_leases(3600.0)
    before_s = client.connected_since_s()
    assert before_s is not None
    for number in range(2):
        await rig.crash()
        await reconnected(server, client, meanwhile=rig.come_back)
        assert (await ask(client, "echo", number)).number == number
        await client.publish("s", Ping(number=number))
        await inbox.has(number + 1)
    after_s = client.connected_since_s()
    assert after_s is not None
    assert after_s > before_s
    assert client.may_judge_leases(0.0)
    assert not client.may_judge_leases(3600.0)


async def test_a_removed_or_failing_listener_disturbs_nobody(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    bus, calls = await rig.bus(), []

    async def removed() -> None:
        calls.append("removed")

    async def failing() -> None:
        raise ZeroDivisionError("on purpose")

    remove = bus.add_reconnect_listener(removed)
    bus.add_reconnect_listener(failing)
    remove()
    remove()
    await rig.crash()
    await reconnected(bus, meanwhile=rig.come_back)
    assert calls == []
    assert "ZeroDivisionError: on purpose" in caplog.text


async def test_close_while_the_broker_is_away(rig: Rig) -> None:
    bus, inbox = await rig.bus(), Inbox()
    await bus.subscribe("s", inbox)
    await bus.publish("s", Ping(number=0))
    await inbox.has(1)
    await rig.crash()
    await bus.close()
    await rig.come_back()
    assert not bus.is_connected


async def test_connecting_to_nobody_fails_with_a_clear_error(tmp_path: Path) -> None:
    async with open_rig("nats", tmp_path) as rig:
        await rig.crash()
        assert isinstance(rig, NatsRig)
        bus = NatsBus(CODEC, rig.server.url, name="test", connect_timeout_s=0.3)
        with pytest.raises(BusDisconnected, match="no connection to NATS at nats://127"):
            await bus.connect()
        await bus.close()
