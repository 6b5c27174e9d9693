"""The supervisor with real processes: small services of our own on a real nats-server."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.advice import Progress
from cli.plan import ProcessSpec
from cli.programs import ServiceProgram
from cli.suite import NATS_SLOT, Suite
from cli.supervision import Phase, RestartPolicy, Slot
from cli.supervisor import Change
from shared.bus.nats import NatsBus
from shared.messages import CODEC, subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited, ServiceReport

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0

SERVICE = """
import asyncio, signal, subprocess, sys
from pathlib import Path
from shared.config import ServiceSettings
from shared.messages import subjects
from shared.reporting import Reporter, connect_bus
from shared.runtime import Service, main

class Settings(ServiceSettings):
    service = sys.argv[1]
    behaviour: str = "good"
    diary: Path

class Dummy(Service):
    def __init__(self, settings):
        self.settings = settings
        self.note("born")
        if settings.behaviour == "hopeless":
            print("no use at all", file=sys.stderr)
            sys.exit(3)
        if settings.behaviour == "has a child":
            subprocess.Popen(["sleep", "1000"])

    def note(self, event):
        with self.settings.diary.open("a") as diary:
            diary.write(f"{event} {self.settings.service}\\n")

    async def start(self, runtime):
        if self.settings.behaviour == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        bus = await connect_bus(self.settings, runtime)
        reporter = Reporter(
            bus, role=self.settings.service, instance=self.settings.instance, period_s=0.05
        )
        runtime.spawn(reporter.run(), name="reports")

    async def stop_intake(self):
        self.note("draining")

    async def drain(self, deadline_s):
        self.note("drained")

main(Dummy, Settings)
"""

UP = """
import json, os, sys
from pathlib import Path
import cli.up
from cli.plan import ProcessSpec, UpOptions
from cli.supervision import Slot
from cli.up import UpRequest, run_up

service, port, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
environ = {"BANYAN_GATEWAY_DIARY": str(directory / "diary"),
           "BANYAN_SCHEDULER_DIARY": str(directory / "diary"),
           "BANYAN_SCHEDULER_BEHAVIOUR": sys.argv[4],
           "BANYAN_GATEWAY_HEALTH_PORT": str(port)}
cli.up.plan_suite = lambda options, hardware: [
    ProcessSpec(slot=Slot(role, 0), command=(sys.executable, service, role), environ=environ)
    for role in ("gateway", "scheduler")]
options = UpOptions(model_dir=Path("m"), served_model_name="tiny", port=port,
                    counts={"gateway": 1, "scheduler": 1})
sys.exit(run_up(UpRequest(suite=options, log_dir=directory / "logs",
                          ready_file=directory / "ready.json", as_json=True)))
"""


class Watched:
    """A suite of dummies, and everything it said of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.diary = directory / "diary"
        self.script = directory / "service.py"
        self.script.write_text(SERVICE)
        self.changes: list[Change] = []
        self._news = asyncio.Event()
        self.suite: Suite | None = None

    async def start(
        self, *roles: str, policy: RestartPolicy | None = None, **behaviours: str
    ) -> Suite:
        specs = [self._spec(role, behaviours.get(role, "good")) for role in roles]
        self.suite = Suite(
            specs, run_dir=self.directory, probe_url=None, on_change=self._note, policy=policy
        )
        await self.suite.start()
        return self.suite

    def _spec(self, role: str, behaviour: str) -> ProcessSpec:
        prefix = f"BANYAN_{role.upper()}"
        return ProcessSpec(
            slot=Slot(role, 0),
            command=(sys.executable, str(self.script), role),
            environ={
                "PYTHONPATH": str(ROOT),
                f"{prefix}_BEHAVIOUR": behaviour,
                f"{prefix}_DIARY": str(self.diary),
            },
        )

    def _note(self, change: Change) -> None:
        self.changes.append(change)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when ``condition`` holds, asked after each change."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def instances(self, role: str, phase: Phase) -> list[str]:
        """The processes of ``role`` that ever came to ``phase``."""
        return [c.instance for c in self.changes if c.slot.role == role and c.phase is phase]


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    if watched.suite is not None:
        hurry = asyncio.Event()
        hurry.set()
        await watched.suite.stop(hurry)


async def ready(suite: Suite) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await suite.until_ready()


def is_running(pid: int) -> bool:
    """Whether ``pid`` runs; one that ended but was not waited for by its parent does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def until_gone(*pids: int) -> None:
    """Return when none of ``pids`` runs; they may be nobody's children we could wait for."""
    async with asyncio.timeout(DEADLINE_S):
        while any(is_running(pid) for pid in pids):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_suite_becomes_ready_and_drains_from_the_edge_to_the_bus(watched: Watched) -> None:
    roles = ("kvstore", "decode", "prefill", "predictor", "placer", "scheduler", "gateway")
    suite = await watched.start(*roles)
    await ready(suite)
    pids = suite.supervisor.pids()
    assert sorted(name.rsplit("-", 2)[0] for name in pids) == sorted([*roles, "nats"])
    assert all(is_running(pid) for pid in pids.values())
    await suite.stop(asyncio.Event())
    assert not any(is_running(pid) for pid in pids.values())
    assert suite.supervisor.pids() == {}
    diary = watched.diary.read_text().split("\n")
    drained = [line.split()[1] for line in diary if line.startswith("drained")]
    assert drained[:2] == ["gateway", "scheduler"]
    assert sorted(drained[2:4]) == ["decode", "prefill"]
    assert sorted(drained[4:]) == ["kvstore", "placer", "predictor"]
    ends = [change for change in watched.changes if change.phase is Phase.ENDED]
    assert ends[-1].slot == NATS_SLOT
    assert {change.detail for change in ends} == {"exit code 0"}


async def test_a_killed_process_is_announced_at_once_and_replaced_by_another(
    watched: Watched,
) -> None:
    suite = await watched.start("decode", "gateway")
    await ready(suite)
    user, password = suite.cli_credentials
    heard: asyncio.Queue[Message] = asyncio.Queue()

    async def hear(message: Message, subject: str) -> None:
        assert subject == subjects.load("decode", former)
        if isinstance(message, InstanceExited):
            heard.put_nowait(message)

    (former,) = watched.instances("decode", Phase.READY)
    async with NatsBus(CODEC, suite.nats_url, name="t", user=user, password=password) as bus:
        await bus.subscribe(subjects.load("decode", former), hear)
        os.kill(suite.supervisor.pids()[former], signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            assert await heard.get() == InstanceExited(
                role="decode", instance=former, exit_code=-signal.SIGKILL
            )
    await watched.until(lambda: len(watched.instances("decode", Phase.READY)) == 2)
    restarting = next(c for c in watched.changes if c.phase is Phase.RESTARTING)
    assert restarting.detail == "killed by signal 9, again in 0.2 s"
    assert watched.instances("decode", Phase.READY)[1] != former
    assert len(watched.instances("gateway", Phase.STARTING)) == 1


async def test_nats_comes_back_at_the_same_address_and_no_service_dies(watched: Watched) -> None:
    suite = await watched.start("decode", "gateway")
    await ready(suite)
    url = suite.nats_url
    before = suite.supervisor.pids()
    nats = next(name for name in before if name.startswith("nats"))
    os.kill(before[nats], signal.SIGKILL)
    await watched.until(lambda: len(watched.instances("nats", Phase.READY)) == 2)
    assert suite.nats_url == url
    user, password = suite.cli_credentials
    reporting: set[str] = set()
    everybody = asyncio.Event()

    async def hear(message: Message, subject: str) -> None:
        assert isinstance(message, ServiceReport)
        reporting.add(message.role)
        if reporting == {"decode", "gateway"}:
            everybody.set()

    async with NatsBus(CODEC, url, name="test", user=user, password=password) as bus:
        await bus.subscribe(subjects.all_load(), hear)
        async with asyncio.timeout(DEADLINE_S):
            await everybody.wait()
    after = suite.supervisor.pids()
    assert {name: pid for name, pid in after.items() if not name.startswith("nats")} == {
        name: pid for name, pid in before.items() if name != nats
    }


async def test_what_cannot_start_fails_the_suite_with_the_end_of_its_log(watched: Watched) -> None:
    policy = RestartPolicy(first_pause_s=0.01, max_crashes=3)
    suite = await watched.start("decode", policy=policy, decode="hopeless")
    async with asyncio.timeout(DEADLINE_S):
        failure = await suite.until_failed()
    assert failure.slot == Slot("decode", 0)
    assert "3 times" in failure.reason and "exit code 3" in failure.reason
    assert failure.log_tail == "no use at all"
    assert watched.diary.read_text() == "born decode\n" * 3
    assert (watched.directory / "decode-0.log").read_text() == "no use at all\n" * 3


async def test_the_latest_word_about_loading_is_read_in_the_log(tmp_path: Path) -> None:
    said = (
        "import sys; print('09:00:00.000 INFO    d-0 x.y: loading weights fraction=' + sys.argv[1])"
    )
    both = f"{said}; print('09:00:01.000 INFO    d-0 x.y: half a line fraction=0.9', end='')"
    spec = ProcessSpec(slot=Slot("decode", 0), command=(sys.executable, "-c", both, "0.05"))
    program = ServiceProgram(spec, log_dir=tmp_path, connection=dict)
    assert program.progress() is None
    run = await program.start()
    await run.wait()
    assert program.progress() == Progress(what="loading weights", fraction=0.05)
    assert program.progress() == Progress(what="loading weights", fraction=0.05)
    silent = ProcessSpec(slot=Slot("decode", 0), command=(sys.executable, "-c", ""))
    program = ServiceProgram(silent, log_dir=tmp_path, connection=dict)
    await (await program.start()).wait()
    assert program.progress() is None  # that was another process


async def test_wrong_settings_fail_the_suite_at_once(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANYAN_DECODE_DRAIN_TIMEOUT_S", "-1")
    suite = await watched.start("decode")
    async with asyncio.timeout(DEADLINE_S):
        failure = await suite.until_failed()
    assert failure.reason == "wrong settings"
    assert "BANYAN_DECODE_DRAIN_TIMEOUT_S='-1'" in failure.log_tail
    assert len(watched.instances("decode", Phase.STARTING)) == 1


async def test_what_does_not_drain_in_time_is_killed(watched: Watched) -> None:
    suite = await watched.start("gateway", gateway="deaf")
    await ready(suite)
    pids = suite.supervisor.pids()
    await suite.supervisor.stop(deadline_s=0.2, hurry=asyncio.Event())
    assert not any(is_running(pid) for pid in pids.values())
    ends = {c.slot.role: c.detail for c in watched.changes if c.phase is Phase.ENDED}
    assert ends["gateway"] == "killed by signal 9"
    assert "drained gateway" not in watched.diary.read_text()


async def test_whoever_cannot_wait_has_everything_killed(watched: Watched) -> None:
    suite = await watched.start("gateway", "decode", gateway="deaf")
    await ready(suite)
    pids = suite.supervisor.pids()
    hurry = asyncio.Event()
    stopping = asyncio.create_task(suite.supervisor.stop(deadline_s=3600.0, hurry=hurry))
    asyncio.get_running_loop().call_later(0.05, hurry.set)
    async with asyncio.timeout(DEADLINE_S):
        await stopping
    assert not any(is_running(pid) for pid in pids.values())
    assert "drained" not in watched.diary.read_text()


async def test_the_children_of_a_process_end_with_it(watched: Watched) -> None:
    suite = await watched.start("decode", decode="has a child")
    await ready(suite)
    pid = next(pid for name, pid in suite.supervisor.pids().items() if name.startswith("decode"))
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    await until_gone(int(child))


# The whole command, as a process of its own.


class Command:
    """``banyan up`` with dummies in place of the services."""

    def __init__(self, directory: Path, scheduler: str) -> None:
        self.directory = directory
        service, script = directory / "service.py", directory / "up.py"
        service.write_text(SERVICE)
        script.write_text(UP)
        self.environ = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(directory / "cache")}
        command = [sys.executable, str(script), str(service), str(free_port())]
        self.process = subprocess.Popen(
            [*command, str(directory), scheduler],
            env={**os.environ, **self.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def until_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        info: dict[str, Any] = json.loads(line)
        return info

    def end(self) -> tuple[int, str]:
        """The exit code, and what was written to stderr."""
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, errors

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "cli.main", "status", "--json"]
        done = subprocess.run(
            command, env={**os.environ, **self.environ}, capture_output=True, check=True
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def command(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Command]:
    command = Command(tmp_path, getattr(request, "param", "good"))
    yield command
    command.process.kill()
    command.process.communicate()


async def test_the_command_says_where_everything_is_and_leaves_nothing_behind(
    command: Command,
) -> None:
    info = command.until_ready()
    assert json.loads((command.directory / "ready.json").read_text()) == info
    assert {name.rsplit("-", 1)[0] for name in info["pids"]} == {
        "nats-0",
        "gateway-0",
        "scheduler-0",
    }
    assert all(is_running(pid) for pid in info["pids"].values())
    state_file = Path(info["state_file"])
    assert state_file.stat().st_mode & 0o777 == 0o600
    assert "password" not in info
    status = command.status()
    assert status["url"] == info["url"]
    assert [report["role"] for report in status["instances"]] == ["gateway", "scheduler"]
    command.process.send_signal(signal.SIGINT)
    assert command.end() == (0, "")
    assert not any(is_running(pid) for pid in info["pids"].values())
    assert not state_file.exists()
    assert not (command.directory / "ready.json").exists()
    logs = {path.name for path in Path(info["log_dir"]).iterdir()}
    assert logs == {"gateway-0.log", "scheduler-0.log", "supervisor.log"}


@pytest.mark.parametrize("command", ["deaf"], indirect=True)
async def test_a_second_ctrl_c_kills(command: Command) -> None:
    info = command.until_ready()
    command.process.send_signal(signal.SIGINT)
    await until_gone(*(pid for name, pid in info["pids"].items() if name.startswith("gateway")))
    command.process.send_signal(signal.SIGINT)
    assert command.end()[0] == 130
    assert not any(is_running(pid) for pid in info["pids"].values())


@pytest.mark.parametrize("command", ["hopeless"], indirect=True)
async def test_a_suite_that_cannot_work_says_why_and_where_the_logs_are(command: Command) -> None:
    exit_code, errors = command.end()
    assert exit_code == 1
    assert "scheduler-0 does not start" in errors
    assert "no use at all" in errors
    assert str(command.directory / "logs") in errors


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
async def test_the_death_of_the_command_is_the_death_of_all(command: Command) -> None:
    info = command.until_ready()
    command.process.kill()
    await until_gone(*info["pids"].values())
    assert command.directory.joinpath("diary").read_text().count("drained") == 2
