import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import pytest

from shared.config import ServiceSettings
from shared.health import Phase
from shared.metrics import Metrics
from shared.runtime import Deadlines, Release, Runtime, Service

SHORT = Deadlines(stop_intake_s=0.05, drain_s=0.05, hand_over_s=0.05, release_s=0.05)


class RecordingSettings(ServiceSettings):
    service: ClassVar[str] = "recording"


class RecordingService(Service):
    """Writes down what is asked of it; ``during`` replaces what a stage does."""

    def __init__(self, **during: Callable[[], Awaitable[None]]) -> None:
        self.calls: list[str] = []
        self._during = during
        self.runtime: Runtime | None = None

    async def _do(self, stage: str) -> None:
        self.calls.append(stage)
        if stage in self._during:
            await self._during[stage]()

    async def start(self, runtime: Runtime) -> None:
        self.runtime = runtime
        runtime.on_release(Release.DEVICE, "pool", lambda: self._do("device"))
        runtime.on_release(Release.BUS, "bus", lambda: self._do("bus"))
        runtime.on_release(Release.BUS, "leases", lambda: self._do("leases"))
        runtime.on_release(Release.TRANSPORT, "tcp", lambda: self._do("transport"))
        await self._do("start")

    async def stop_intake(self) -> None:
        await self._do("stop_intake")

    async def drain(self, deadline_s: float) -> None:
        await self._do("drain")


RELEASED = ["leases", "bus", "transport", "device"]


def make_runtime(deadlines: Deadlines | None = None, **settings: object) -> Runtime:
    return Runtime(RecordingSettings.load(**settings), Metrics(), deadlines or Deadlines())


async def live(runtime: Runtime, service: Service) -> int:
    """A whole life; ``runtime`` or ``service`` says when it ends."""
    await runtime.start(service)
    return await end(runtime, service)


async def end(runtime: Runtime, service: Service) -> int:
    """The rest of a life that has been started."""
    await runtime.wait_until_stopping()
    return await runtime.shut_down(service)


async def never() -> None:
    await asyncio.Event().wait()


async def boom() -> None:
    raise RuntimeError("boom")


async def test_a_stop_drains_in_order_and_exits_with_0() -> None:
    runtime = make_runtime()

    async def stop_once_ready() -> None:
        runtime.stop("test")

    service = RecordingService(start=stop_once_ready)
    assert await live(runtime, service) == 0
    assert service.calls == ["start", "stop_intake", "drain", *RELEASED]


async def test_drain_is_told_its_deadline() -> None:
    told: list[float] = []

    class Told(RecordingService):
        async def drain(self, deadline_s: float) -> None:
            told.append(deadline_s)

    runtime = make_runtime(Deadlines(drain_s=12.5))
    service = Told()
    assert await runtime.start(service)
    runtime.stop("test")
    assert await end(runtime, service) == 0
    assert told == [12.5]


async def test_the_phase_follows_the_life_of_the_process() -> None:
    seen: list[tuple[str, Phase, bool]] = []

    def note(stage: str) -> Callable[[], Awaitable[None]]:
        async def noting() -> None:
            assert service.runtime is not None
            health = service.runtime.health
            seen.append((stage, health.phase, health.readiness().ok))

        return noting

    service = RecordingService(
        start=note("start"), stop_intake=note("intake"), drain=note("drain"), bus=note("bus")
    )
    runtime = make_runtime()
    assert await runtime.start(service)
    assert runtime.health.readiness().ok
    runtime.stop("test")
    await end(runtime, service)
    assert seen == [
        ("start", Phase.STARTING, False),
        ("intake", Phase.DRAINING, False),
        ("drain", Phase.DRAINING, False),
        ("bus", Phase.STOPPED, False),
    ]


async def test_tasks_live_through_the_drain_and_end_before_the_bus() -> None:
    service = RecordingService()
    runtime = make_runtime()

    async def background() -> None:
        try:
            await never()
        finally:
            service.calls.append("task ended")

    assert await runtime.start(service)
    task = runtime.spawn(background(), name="background")
    runtime.stop("test")
    assert await end(runtime, service) == 0
    assert task.cancelled()
    assert service.calls == ["start", "stop_intake", "drain", "task ended", *RELEASED]


async def test_a_task_may_end_and_give_its_result() -> None:
    runtime = make_runtime()

    async def answer() -> int:
        return 42

    assert await runtime.spawn(answer(), name="answer") == 42
    assert not runtime.is_stopping


async def test_a_task_that_raises_crashes_the_process_without_a_drain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = RecordingService()
    runtime = make_runtime()
    assert await runtime.start(service)
    runtime.spawn(boom(), name="pump")
    assert await end(runtime, service) == 1
    assert service.calls == ["start", "stop_intake", *RELEASED]
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert "pump" in record.getMessage()
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "boom"


async def test_a_crash_cuts_a_running_drain_short() -> None:
    async def drain_for_ever() -> None:
        assert service.runtime is not None
        service.runtime.spawn(boom(), name="pump")
        await never()

    service = RecordingService(drain=drain_for_ever)
    runtime = make_runtime()
    assert await runtime.start(service)
    runtime.stop("test")
    assert await end(runtime, service) == 1
    assert service.calls == ["start", "stop_intake", "drain", *RELEASED]


async def test_a_start_that_raises_gives_back_what_it_took() -> None:
    service = RecordingService(start=boom)
    assert await live(make_runtime(), service) == 1
    assert service.calls == ["start", *RELEASED]


async def test_a_start_is_interrupted_by_a_stop() -> None:
    async def stop_and_wait() -> None:
        runtime.stop("test")
        await never()

    service = RecordingService(start=stop_and_wait)
    runtime = make_runtime()
    assert not await runtime.start(service)
    assert await end(runtime, service) == 0
    assert service.calls == ["start", *RELEASED]


async def test_a_health_port_that_is_taken_is_a_failed_start() -> None:
    first = make_runtime()
    service = RecordingService()
    assert await first.start(service)
    second = RecordingService()
    assert await live(make_runtime(health_port=first.health_port), second) == 1
    assert second.calls == []
    first.stop("test")
    await end(first, service)


@pytest.mark.parametrize("stage", ["stop_intake", "drain", "bus", "transport", "device"])
async def test_a_stage_past_its_deadline_is_cut_off_and_the_rest_follows(stage: str) -> None:
    service = RecordingService(**{stage: never})
    runtime = make_runtime(SHORT)
    assert await runtime.start(service)
    runtime.stop("test")
    assert await end(runtime, service) == 1
    assert service.calls == ["start", "stop_intake", "drain", *RELEASED]


async def cancel_itself() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("failure", [boom, cancel_itself])
@pytest.mark.parametrize("stage", ["stop_intake", "drain", "bus", "transport", "device"])
async def test_a_stage_that_raises_does_not_keep_the_rest_from_its_turn(
    stage: str, failure: Callable[[], Awaitable[None]]
) -> None:
    service = RecordingService(**{stage: failure})
    runtime = make_runtime()
    assert await runtime.start(service)
    runtime.stop("test")
    assert await end(runtime, service) == 1
    assert service.calls == ["start", "stop_intake", "drain", *RELEASED]


async def test_a_drain_may_use_the_time_after_its_deadline_to_hand_over() -> None:
    handed_over: list[str] = []

    class HandsOver(RecordingService):
        async def drain(self, deadline_s: float) -> None:
            try:
                async with asyncio.timeout(deadline_s):
                    await never()
            except TimeoutError:
                await asyncio.sleep(0)
                handed_over.append("all")

    runtime = make_runtime(Deadlines(drain_s=0.01, hand_over_s=30))
    service = HandsOver()
    assert await runtime.start(service)
    runtime.stop("test")
    assert await end(runtime, service) == 0
    assert handed_over == ["all"]


async def test_stop_and_fail_may_come_from_another_thread() -> None:
    for call, exit_code in (
        (lambda runtime: runtime.stop("test"), 0),
        (lambda runtime: runtime.fail(RuntimeError("boom"), "engine"), 1),
    ):
        runtime = make_runtime()
        service = RecordingService()
        assert await runtime.start(service)
        thread = threading.Thread(target=call, args=(runtime,))
        thread.start()
        assert await end(runtime, service) == exit_code
        thread.join()


async def test_nothing_is_spawned_after_the_drain() -> None:
    async def spawn_late() -> None:
        assert service.runtime is not None
        with pytest.raises(RuntimeError, match="late"):
            service.runtime.spawn(never(), name="late")

    service = RecordingService(bus=spawn_late)
    runtime = make_runtime()
    assert await runtime.start(service)
    runtime.stop("test")
    assert await end(runtime, service) == 0


async def test_the_port_file_names_the_port_that_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "port"
    runtime = make_runtime(health_port_file=path)
    service = RecordingService()
    assert await runtime.start(service)
    assert runtime.health_port > 0
    assert path.read_text() == f"{runtime.health_port}\n"
    assert list(tmp_path.iterdir()) == [path]
    runtime.stop("test")
    await end(runtime, service)


async def get(port: int, target: str, *, raw: bytes | None = None) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() if raw is None else raw
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body


async def test_health_over_http() -> None:
    runtime = make_runtime()
    port = 0

    async def probe_while_starting() -> None:
        nonlocal port
        port = runtime.health_port
        assert (await get(port, "/health/live"))[0] == 200
        status, body = await get(port, "/health/ready")
        assert status == 503
        assert json.loads(body)["phase"] == "starting"

    service = RecordingService(start=probe_while_starting)
    assert await runtime.start(service)
    assert (await get(port, "/health/ready?verbose"))[0] == 200
    runtime.health.add_readiness_check("scheduler", lambda: "no leader yet")
    status, body = await get(port, "/health/ready")
    assert status == 503
    assert json.loads(body)["reasons"] == {"scheduler": "no leader yet"}
    assert (await get(port, "/health/live"))[0] == 200
    runtime.health.add_liveness_check("engine", lambda: str(1 / 0))
    status, body = await get(port, "/health/live")
    assert status == 503
    assert "division by zero" in json.loads(body)["reasons"]["engine"]

    runtime.metrics.counter("test", "sent", "messages", "Sent").inc(3)
    status, body = await get(port, "/metrics")
    assert status == 200
    assert b"\nbanyan_test_sent_messages_total 3.0\n" in body
    assert b"banyan_runtime_loop_lag_seconds_bucket" in body

    assert (await get(port, "/nothing"))[0] == 404
    assert (await get(port, "", raw=b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 405
    assert (await get(port, "", raw=b"\x16\x03\x01 hello\r\n\r\n"))[0] == 400
    assert (await get(port, "", raw=b"GET /".ljust(16 * 1024 + 1, b"x")))[0] == 431

    runtime.stop("test")
    await end(runtime, service)
    with pytest.raises(ConnectionRefusedError):
        await get(port, "/health/live")


async def test_a_client_that_says_nothing_does_not_hold_up_the_end() -> None:
    runtime = make_runtime()
    service = RecordingService()
    assert await runtime.start(service)
    reader, writer = await asyncio.open_connection("127.0.0.1", runtime.health_port)
    assert (await get(runtime.health_port, "/health/live"))[0] == 200
    runtime.stop("test")
    assert await end(runtime, service) == 0
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
