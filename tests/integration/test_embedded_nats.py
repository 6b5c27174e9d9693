"""The embedded nats-server, its permissions, and what only a real server can do to a bus."""

import asyncio
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus import LeaseChange, LeaseEvent, lease_bucket
from shared.bus.nats import NatsBus
from shared.bus.server import EmbeddedNats, NatsUser, lease_permissions
from shared.errors import BusDisconnected, BusError, BusTimeout, ConfigError
from shared.messages.base import Message
from tests.integration.bus_rig import CODEC, Ping, Pong, reconnected, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with EmbeddedNats(tmp_path) as server:
        yield server


async def echo(message: Message) -> Message:
    assert isinstance(message, Ping)
    return Pong(number=message.number)


# The process


async def test_it_keeps_port_and_store_over_stop_kill_and_restart(tmp_path: Path) -> None:
    server = EmbeddedNats(tmp_path)
    with pytest.raises(BusError, match="not started"):
        _ = server.url
    await server.start()
    url = server.url
    async with NatsBus(CODEC, url, name="test", reconnect_wait_s=0.02) as bus:
        leases = await bus.lease_store(60.0)
        lease = await leases.try_acquire("k", "me")
        assert lease is not None
        await reconnected(bus, meanwhile=server.restart)
        assert await leases.get("k") == lease
        await server.kill()
        assert not server.is_running
        await reconnected(bus, meanwhile=server.start)
        assert server.url == url
        assert await leases.get("k") == lease
    await server.stop()
    await server.stop()
    assert not server.is_running


async def test_its_configuration_is_private(tmp_path: Path) -> None:
    users = {"alice": NatsUser(password="secret")}
    async with EmbeddedNats(tmp_path, users=users):
        mode = stat.S_IMODE((tmp_path / "nats.conf").stat().st_mode)
        assert mode == 0o600
        assert "secret" in (tmp_path / "nats.conf").read_text()
    assert "secret" not in repr(users)


async def test_a_port_in_use_is_a_clear_error(server: EmbeddedNats, tmp_path: Path) -> None:
    other = EmbeddedNats(tmp_path / "other", port=server.port)
    with pytest.raises(BusError, match="address already in use"):
        await other.start()
    assert not other.is_running


async def test_a_missing_binary_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANYAN_NATS_SERVER", "/nowhere/nats-server")
    with pytest.raises(ConfigError, match="BANYAN_NATS_SERVER='/nowhere/nats-server'"):
        await EmbeddedNats(tmp_path).start()


async def test_ctrl_c_does_not_reach_it(server: EmbeddedNats) -> None:
    assert server.pid is not None
    assert os.getpgid(server.pid) == server.pid != os.getpgid(0)


_PARENT = """
import asyncio, pathlib, sys
from shared.bus.server import EmbeddedNats

async def main():
    server = EmbeddedNats(pathlib.Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PARENT,
        str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    await parent.wait()
    await until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Users and permissions


BUCKET = lease_bucket(1.0)
USERS = {
    "alice": NatsUser(
        password="a",
        publish=("work.>", *lease_permissions(BUCKET, ("alice.*",))[0]),
        subscribe=("news", *lease_permissions(BUCKET)[1]),
    ),
    "bob": NatsUser(
        password="b",
        publish=("news", *lease_permissions(BUCKET)[0]),
        subscribe=("work.>",),
    ),
    "mute": NatsUser(password="m"),
}


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with EmbeddedNats(tmp_path, users=USERS) as server:
        yield server


def bus_of(server: EmbeddedNats, user: str, password: str | None = None) -> NatsBus:
    return NatsBus(CODEC, server.url, name=user, user=user, password=password or user[0])


@pytest.mark.parametrize(("user", "password"), [("alice", "wrong"), ("eve", "e")])
async def test_wrong_credentials_are_refused_at_once(
    guarded: EmbeddedNats, user: str, password: str
) -> None:
    with pytest.raises(ConfigError, match=f"credentials of user '{user}'"):
        await bus_of(guarded, user, password).connect()


async def test_what_is_permitted_works(guarded: EmbeddedNats) -> None:
    async with bus_of(guarded, "alice") as alice, bus_of(guarded, "bob") as bob:
        await bob.serve("work.echo", echo)
        for number in range(3):
            answer = await alice.request("work.echo", Ping(number=number), Pong, timeout_s=10.0)
            assert answer.number == number
        assert alice.num_permission_violations == bob.num_permission_violations == 0


async def test_what_is_forbidden_is_told_or_counted(
    guarded: EmbeddedNats, caplog: pytest.LogCaptureFixture
) -> None:
    async def ignore(message: Message, subject: str) -> None:
        raise AssertionError("nothing may arrive")

    for user, subject in (("alice", "work.echo"), ("alice", "_INBOX_bob.>"), ("mute", "news")):
        async with bus_of(guarded, user) as bus:
            with pytest.raises(BusError, match="forbid"):
                await bus.subscribe(subject, ignore)
            with pytest.raises(BusError, match="forbid"):
                await bus.serve(subject, echo, queue="q")
            with pytest.raises(BusError, match="forbid to publish to news"):
                await bus.request("news", Ping(number=0), Pong, timeout_s=600.0)
            assert bus.num_permission_violations == 3
            await bus.publish("news", Ping(number=0))
            await bus.flush()
            assert bus.num_permission_violations == 4
            assert f"user {user} is not permitted" in caplog.text


async def test_a_restricted_user_holds_and_watches_leases(guarded: EmbeddedNats) -> None:
    async with bus_of(guarded, "alice") as alice, bus_of(guarded, "bob") as bob:
        mine, theirs = await alice.lease_store(1.0), await bob.lease_store(1.0)
        async with theirs.watch("alice.*") as changes:
            lease = await mine.try_acquire("alice.1", "me")
            assert lease is not None
            lease = await mine.renew(lease)
            assert await theirs.get("alice.1") == lease
            await mine.release(lease)
            assert [(await anext(changes)).event for _ in range(2)] == ["acquired", "released"]
            lease = await mine.try_acquire("alice.1", "me")
            assert lease is not None
            assert (await anext(changes)).event is LeaseEvent.ACQUIRED
            assert await anext(changes) == LeaseChange(LeaseEvent.EXPIRED, lease)
        assert alice.num_permission_violations == bob.num_permission_violations == 0
        with pytest.raises(BusError, match="forbid"):
            await mine.try_acquire("bob.1", "me")


# What only a real server can do to a bus


async def test_a_frozen_server_is_noticed_and_welcomed_back(server: EmbeddedNats) -> None:
    bus = NatsBus(CODEC, server.url, name="test", ping_interval_s=0.1, reconnect_wait_s=0.02)
    await bus.connect()
    await bus.serve("echo", echo)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BusTimeout):
            await bus.request("echo", Ping(number=1), Pong, timeout_s=0.01)
        with pytest.raises(BusDisconnected):
            await bus.request("echo", Ping(number=1), Pong, timeout_s=600.0)
        # A slow machine may give up the request before it gives up the connection.
        await until(lambda: not bus.is_connected)
    finally:

        async def thaw() -> None:
            assert server.pid is not None
            os.kill(server.pid, signal.SIGCONT)

        await reconnected(bus, meanwhile=thaw)
    assert (await bus.request("echo", Ping(number=2), Pong, timeout_s=10.0)).number == 2
    await bus.close()


async def test_a_connection_ended_by_an_error_of_the_server_is_made_again(
    server: EmbeddedNats,
) -> None:
    async with NatsBus(CODEC, server.url, name="test", reconnect_wait_s=0.02) as bus:
        await bus.serve("echo", echo)
        too_long_for_the_protocol = "x" * 5000
        await reconnected(
            bus, meanwhile=lambda: bus.publish(too_long_for_the_protocol, Ping(number=0))
        )
        assert (await bus.request("echo", Ping(number=1), Pong, timeout_s=10.0)).number == 1


async def test_a_cancelled_subscribe_leaves_the_connection_whole(server: EmbeddedNats) -> None:
    async with NatsBus(CODEC, server.url, name="test") as bus:
        await bus.serve("echo", echo)
        for _ in range(20):
            task = asyncio.create_task(bus.serve("never", echo))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
        assert (await bus.request("echo", Ping(number=1), Pong, timeout_s=10.0)).number == 1
        await bus.flush()
        assert bus.is_connected


async def test_the_bus_runs_on_uvloop(server: EmbeddedNats) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def exchange() -> int:
        async with NatsBus(CODEC, server.url, name="test") as bus:
            await bus.serve("echo", echo)
            return (await bus.request("echo", Ping(number=3), Pong, timeout_s=10.0)).number

    def run() -> int:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(exchange())

    assert await asyncio.to_thread(run) == 3
