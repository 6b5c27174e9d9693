"""The permissions on a real nats-server: each user can do its work, and not another's."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus.nats import NatsBus
from shared.bus.permissions import (
    SERVICES,
    USERS,
    WORKERS,
    flows,
    nats_users,
    password_variable,
    render_deployed_config,
)
from shared.bus.server import EmbeddedNats, find_nats_server
from shared.errors import BusError, ConfigError
from shared.messages import CODEC, subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited
from shared.messages.requests import Done


class Suite:
    """A server with every user connected once."""

    def __init__(self, server: EmbeddedNats, buses: dict[str, NatsBus]) -> None:
        self.server = server
        self.buses = buses

    async def request(self, user: str, subject: str) -> Done:
        return await self.buses[user].request(subject, Done(), Done, timeout_s=5.0)


def bus_of(server: EmbeddedNats, user: str, password: str | None = None) -> NatsBus:
    return NatsBus(
        CODEC, server.url, name=user, user=user, password=password or f"secret-of-{user}"
    )


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Suite]:
    users = nats_users(lambda name: f"secret-of-{name}")
    async with EmbeddedNats(tmp_path, users=users) as server:
        buses = {name: bus_of(server, name) for name in USERS}
        await asyncio.gather(*(bus.connect() for bus in buses.values()))
        yield Suite(server, buses)
        await asyncio.gather(*(bus.close() for bus in buses.values()))


async def answer(message: Message) -> Message:
    return message


async def test_whoever_may_ask_is_answered_by_whoever_may_listen(suite: Suite) -> None:
    for number, flow in enumerate(flow for flow in flows() if flow.receivers):
        for receiver in flow.receivers:
            tokens = flow.subject.split(".")
            subject = ".".join(f"name-{number}" if token == "*" else token for token in tokens)
            subscription = await suite.buses[receiver].serve(subject, answer)
            for sender in flow.senders:
                assert await suite.request(sender, subject) == Done(), (sender, receiver, subject)
            await subscription.unsubscribe()
    assert {
        name: bus.num_permission_violations for name, bus in suite.buses.items()
    } == dict.fromkeys(USERS, 0)


async def test_reports_of_every_service_and_the_news_of_its_death_reach_everybody(
    suite: Suite,
) -> None:
    heard: dict[str, list[Message]] = {name: [] for name in USERS}
    done = {name: asyncio.Event() for name in USERS}

    async def listen(name: str) -> None:
        async def hear(message: Message, subject: str) -> None:
            heard[name].append(message)
            if len(heard[name]) == 2 * len(SERVICES):
                done[name].set()

        await suite.buses[name].subscribe(subjects.all_load(), hear)

    await asyncio.gather(*(listen(name) for name in USERS))
    for role in SERVICES:
        exited = InstanceExited(role=role, instance="x")
        await suite.buses[role].publish(subjects.load(role, "x"), exited)
        await suite.buses["supervisor"].publish(subjects.load(role, "x"), exited)
    async with asyncio.timeout(10):
        await asyncio.gather(*(event.wait() for event in done.values()))


async def test_the_scheduler_alone_may_hold_the_leader_lease(suite: Suite) -> None:
    store = await suite.buses["scheduler"].lease_store(2.0)
    lease = await store.try_acquire("scheduler.some-model", "s0")
    assert lease is not None
    async with store.watch("scheduler.some-model") as changes:
        assert (await anext(changes)).lease == lease
    await store.release(await store.renew(lease))
    for name in USERS:
        if name != "scheduler":
            with pytest.raises(BusError, match="forbid"):
                await suite.buses[name].lease_store(2.0)


@pytest.mark.parametrize("worker", WORKERS)
async def test_a_worker_cannot_pose_as_a_gateway_or_the_leader(suite: Suite, worker: str) -> None:
    bus = suite.buses[worker]
    for subject in (
        subjects.requests("some-model"),
        subjects.worker("decode", "d", "start"),
        subjects.snapshot("d"),
        subjects.control("d", "drain"),
        subjects.tokens_since("d"),
    ):
        with pytest.raises(BusError, match="forbid"):
            await bus.request(subject, Done(), Done, timeout_s=5.0)
    with pytest.raises(BusError, match="forbid"):
        await bus.serve(subjects.requests("some-model"), answer)


async def test_what_is_forbidden_to_say_is_not_heard(suite: Suite) -> None:
    heard: asyncio.Queue[Message] = asyncio.Queue()

    async def hear(message: Message, subject: str) -> None:
        heard.put_nowait(message)

    await suite.buses["gateway"].subscribe(subjects.gateway_events("g"), hear)
    prefill = suite.buses["prefill"]
    await prefill.publish(subjects.gateway_events("g"), Done())
    await prefill.flush()
    await suite.buses["scheduler"].publish(subjects.gateway_events("g"), Done(count=1))
    async with asyncio.timeout(10):
        assert await heard.get() == Done(count=1)
    assert prefill.num_permission_violations == 1


async def test_nobody_reads_the_replies_to_another_user(suite: Suite) -> None:
    for subject in ("_INBOX_scheduler.>", "_INBOX_gateway.>", ">", "_INBOX.>"):
        with pytest.raises(BusError, match="forbid"):
            await suite.buses["prefill"].subscribe(subject, hear_nothing)


async def hear_nothing(message: Message, subject: str) -> None:
    raise AssertionError(f"heard {message} on {subject}")


async def test_nobody_gets_in_with_the_password_of_another(suite: Suite) -> None:
    bus = bus_of(suite.server, "scheduler", "secret-of-prefill")
    with pytest.raises(ConfigError, match="scheduler"):
        await bus.connect()


async def test_a_server_accepts_the_deployed_configuration(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(render_deployed_config())
    passwords = {password_variable(name): f"secret-of-{name}" for name in USERS}
    process = await asyncio.create_subprocess_exec(
        str(find_nats_server()),
        "-t",
        "-c",
        str(config),
        env={**os.environ, **passwords},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
