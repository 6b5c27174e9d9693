"""``banyan drain`` on a real bus: a service of the suite, and instances that behave in odd ways."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import cli.drain
from cli.bus import BusAddress
from cli.drain import DrainRequest, run_drain
from cli.errors import CommandFailed
from services.placer.config import PlacerSettings
from services.placer.service import PlacerService
from shared.bus.nats import NatsBus
from shared.bus.server import EmbeddedNats
from shared.messages import CODEC, subjects
from shared.messages.base import Message
from shared.messages.load import Drain, InstanceExited
from shared.messages.requests import Done
from shared.metrics import Metrics
from shared.reporting import Reporter
from shared.runtime import Deadlines, Runtime


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors report more often than services do."""
    monkeypatch.setattr(cli.drain, "LISTEN_S", 0.3)
    monkeypatch.setattr(cli.drain, "SILENT_AFTER_S", 0.5)
    monkeypatch.setattr(cli.drain, "REQUEST_TIMEOUT_S", 0.5)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with EmbeddedNats(tmp_path / "nats") as server:
        yield server


class Actor:
    """An instance that reports, and answers ``drain`` as it was told to."""

    def __init__(self, bus: NatsBus, role: str, instance: str) -> None:
        self.bus = bus
        self.role = role
        self.instance = instance
        self.reasons: list[str] = []
        self.asked = asyncio.Event()
        self._end = asyncio.Event()
        self._reporter = Reporter(bus, role=role, instance=instance, model="tiny", period_s=0.05)
        self._task = asyncio.create_task(self._reporter.run())

    async def serve(self, *, is_hung: bool = False) -> None:
        async def drain(message: Message) -> Message:
            assert isinstance(message, Drain)
            self.reasons.append(message.reason)
            self.asked.set()
            if is_hung:
                await self._end.wait()
            return Done(count=1)

        await self.bus.serve(subjects.control(self.instance, "drain"), drain)

    async def leave(self, exit_code: int | None = None) -> None:
        message = InstanceExited(role=self.role, instance=self.instance, exit_code=exit_code)
        await self.bus.publish(subjects.load(self.role, self.instance), message)

    async def close(self) -> None:
        self._end.set()
        await self.fall_silent()

    async def fall_silent(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


@asynccontextmanager
async def actors(server: EmbeddedNats, *names: str) -> AsyncIterator[list[Actor]]:
    """Instances called ``<role>-…``, on one connection."""
    async with NatsBus(CODEC, server.url, name="actors") as bus:
        found = [Actor(bus, name.partition("-")[0], name) for name in names]
        try:
            yield found
        finally:
            for actor in found:
                await actor.close()


async def drain(
    server: EmbeddedNats, instance: str, *, pids: dict[str, int] | None = None, **request: Any
) -> str:
    """Run the command as a user would; returns what it wrote."""
    address = BusAddress(nats_url=server.url, user=None, password=None, pids=pids or {})
    output = io.StringIO()
    asked = DrainRequest(instance=instance, **request)
    exit_code = await asyncio.to_thread(run_drain, address, asked, output, io.StringIO())
    assert exit_code == 0
    return output.getvalue()


async def test_a_service_drains_and_ends(server: EmbeddedNats) -> None:
    settings = PlacerSettings.load(instance="placer-0-ab", nats_url=server.url)
    runtime = Runtime(settings, Metrics(), Deadlines(drain_s=5.0))
    service = PlacerService(settings)
    assert await runtime.start(service)

    async def end() -> int:
        await runtime.wait_until_stopping()
        return await runtime.shut_down(service)

    async with asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(drain(server, "placer-0", wait=True, as_json=True))
        ending = tasks.create_task(end())
    assert ending.result() == 0
    assert json.loads(draining.result()) == {
        "instance": "placer-0-ab",
        "role": "placer",
        "has_ended": True,
        "exit_code": None,
        "num_left": None,
    }


@pytest.mark.usefixtures("in_a_hurry")
async def test_without_waiting_the_beginning_is_enough(server: EmbeddedNats) -> None:
    async with actors(server, "placer-0-ab") as (placer,):
        await placer.serve()
        text = await drain(server, "placer-0-ab")
        assert text == "placer-0-ab drains; `banyan status --watch` shows how far it is\n"
        assert "banyan drain" in placer.reasons[0]


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nobody", "no instance nobody; there are: placer-0-ab, placer-1-cd"),
        ("placer", "any of placer-0-ab, placer-1-cd: say which"),
    ],
)
async def test_who_is_meant_has_to_be_clear(server: EmbeddedNats, name: str, says: str) -> None:
    async with actors(server, "placer-0-ab", "placer-1-cd"):
        with pytest.raises(CommandFailed, match=says):
            await drain(server, name)


@pytest.mark.usefixtures("in_a_hurry")
async def test_on_an_empty_bus_there_is_nobody(server: EmbeddedNats) -> None:
    with pytest.raises(CommandFailed, match="there are: none"):
        await drain(server, "decode-0")


@pytest.mark.usefixtures("in_a_hurry")
async def test_the_last_of_its_kind_stays_unless_that_is_meant(server: EmbeddedNats) -> None:
    async with actors(server, "gateway-0-ab", "decode-0-ab", "placer-0-ab") as (gateway, *_):
        await gateway.serve()
        with pytest.raises(CommandFailed, match=r"the only gateway.*start another.*--force"):
            await drain(server, "gateway-0")
        assert gateway.reasons == []
        assert "drains" in await drain(server, "gateway-0", force=True)
        assert len(gateway.reasons) == 1


@pytest.mark.usefixtures("in_a_hurry")
async def test_one_that_hangs_is_named_with_what_to_do(server: EmbeddedNats) -> None:
    async with actors(server, "placer-0-ab") as (placer,):
        await placer.serve(is_hung=True)
        with pytest.raises(CommandFailed, match=r"does not answer.*kill -9 77"):
            await drain(server, "placer-0", pids={"placer-0-ab": 77})


@pytest.mark.usefixtures("in_a_hurry")
async def test_one_that_cannot_be_asked_has_gone(server: EmbeddedNats) -> None:
    async with actors(server, "placer-0-ab"):
        with pytest.raises(CommandFailed, match="has just gone"):
            await drain(server, "placer-0")


@pytest.mark.usefixtures("in_a_hurry")
async def test_one_that_is_killed_while_it_drains_is_no_success(server: EmbeddedNats) -> None:
    async with actors(server, "placer-0-ab", "placer-1-cd") as (placer, _):
        await placer.serve()
        draining = asyncio.create_task(drain(server, "placer-0", wait=True))
        await placer.asked.wait()
        await placer.fall_silent()
        with pytest.raises(CommandFailed, match="fell silent"):
            await draining


@pytest.mark.usefixtures("in_a_hurry")
async def test_waiting_has_an_end_if_one_is_given(server: EmbeddedNats) -> None:
    async with actors(server, "placer-0-ab") as (placer,):
        await placer.serve()
        with pytest.raises(CommandFailed, match=r"not ended after 0\.3 s; it goes on"):
            await drain(server, "placer-0", wait=True, timeout_s=0.3)


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize(
    ("exit_code", "says"), [(1, "exit code 1"), (-9, "signal 9"), (0, "exit code 0")]
)
async def test_of_a_process_that_is_supervised_the_exit_code_counts(
    server: EmbeddedNats, exit_code: int, says: str
) -> None:
    async with actors(server, "placer-0-ab") as (placer,):
        await placer.serve()
        pids = {"placer-0-ab": 77}
        draining = asyncio.create_task(drain(server, "placer-0", pids=pids, wait=True))
        await placer.asked.wait()
        await placer.leave()  # by itself, then by its supervisor
        await placer.leave(exit_code)
        if exit_code:
            with pytest.raises(CommandFailed, match=says):
                await draining
        else:
            assert (await draining).endswith(f"has drained and ended with {says}\n")
