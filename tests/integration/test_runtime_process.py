"""The runtime as a process: signals, exit codes, logs and the supervisor's death."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

SERVICE = """
import asyncio, logging, sys, threading, time
from typing import ClassVar
from shared.config import ServiceSettings
from shared.errors import ConfigError
from shared.runtime import Release, Runtime, Service, main

log = logging.getLogger("probe")

class ProbeSettings(ServiceSettings):
    service: ClassVar[str] = "probe"
    behaviour: str = "good"

class ProbeService(Service):
    def __init__(self, settings):
        self.behaviour = settings.behaviour
        if self.behaviour == "impossible":
            raise ConfigError("BANYAN_PROBE_BEHAVIOUR='impossible': no")

    async def start(self, runtime):
        self.runtime = runtime
        runtime.on_release(Release.DEVICE, "device", self.release)
        log.info("loop", extra={"loop": type(asyncio.get_running_loop()).__module__})
        if self.behaviour == "stuck start":
            log.info("starting")
            await asyncio.to_thread(threading.Event().wait)
        if self.behaviour == "task dies":
            runtime.spawn(self.die(), name="pump")
        if self.behaviour == "thread dies":
            threading.Thread(target=lambda: 1 / 0, name="engine").start()
        if self.behaviour == "stuck loop":
            asyncio.get_running_loop().call_later(0.01, self.block)

    async def die(self):
        raise LookupError("boom")

    def block(self):
        log.info("blocking")
        while True:
            time.sleep(60)

    async def stop_intake(self):
        log.info("stop intake")

    async def drain(self, deadline_s):
        log.info("drain", extra={"deadline_s": deadline_s})
        if self.behaviour == "slow drain":
            await asyncio.Event().wait()

    async def release(self):
        log.info("release")

if sys.argv[1:] == ["no-uvloop"]:
    sys.modules["uvloop"] = None
main(ProbeService, ProbeSettings)
"""

PARENT = """
import os, subprocess, sys
environ = dict(os.environ, BANYAN_PARENT_PID=str(os.getpid()))
child = subprocess.Popen([sys.executable, sys.argv[1]], env=environ)
child.wait()
"""


class Probe:
    """One process under test, started with ``arguments`` and ``environ`` on top of ours."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self.records: list[dict[str, Any]] = []
        self.other_lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_until(self, message: str | None) -> dict[str, Any]:
        """Read logs up to the record with ``message``, or all there will be for ``None``."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if not line.startswith("{"):
                self.other_lines.append(line)
                continue
            self.records.append(json.loads(line))
            if self.records[-1]["msg"] == message:
                return self.records[-1]
        assert message is None, f"{message!r} never came: {self.records} {self.other_lines}"
        return {}

    def end(self) -> int:
        """Read the rest of the logs and return the exit code."""
        self.read_until(None)
        return self.process.wait()

    def messages(self) -> list[str]:
        return [record["msg"] for record in self.records]


class Probes:
    """Starts probes and leaves none behind."""

    def __init__(self, directory: Path) -> None:
        self.service_file = directory / "probe.py"
        self.service_file.write_text(SERVICE)
        self.parent_file = directory / "parent.py"
        self.parent_file.write_text(PARENT)
        self._started: list[Probe] = []

    def start(self, behaviour: str = "good", *arguments: str, **environ: str) -> Probe:
        environ = {"BANYAN_PROBE_BEHAVIOUR": behaviour, **environ}
        return self._keep(Probe(str(self.service_file), *arguments, **environ))

    def start_below_a_parent(self) -> Probe:
        return self.start_script(self.parent_file, str(self.service_file))

    def start_script(self, script: Path, *arguments: str) -> Probe:
        return self._keep(Probe(str(script), *arguments))

    def _keep(self, probe: Probe) -> Probe:
        self._started.append(probe)
        return probe

    def close(self) -> None:
        for probe in self._started:
            probe.process.kill()
            probe.process.wait()
            assert probe.process.stderr is not None
            probe.process.stderr.close()


@pytest.fixture
def probes(tmp_path: Path) -> Iterator[Probes]:
    started = Probes(tmp_path)
    yield started
    started.close()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_exits_with_0(
    probes: Probes, signum: signal.Signals, loop: str
) -> None:
    arguments = [] if loop == "uvloop" else ["no-uvloop"]
    probe = probes.start("good", *arguments, BANYAN_DRAIN_TIMEOUT_S="7")
    probe.read_until("ready")
    probe.process.send_signal(signum)
    assert probe.end() == 0
    messages = probe.messages()
    assert messages.count("effective settings") == 1
    order = ["ready", "stopping", "stop intake", "drain", "release", "stopped"]
    assert [message for message in messages if message in order] == order
    found = {record["msg"]: record for record in probe.records}
    assert found["loop"]["loop"].startswith(loop)
    assert found["stopping"]["reason"] == f"received {signum.name}"
    assert found["drain"]["deadline_s"] == 7
    assert {record["service"] for record in probe.records} == {"probe"}


def test_the_health_port_is_told_by_log_and_file(probes: Probes, tmp_path: Path) -> None:
    file = tmp_path / "port"
    probe = probes.start(BANYAN_HEALTH_PORT_FILE=str(file))
    port = probe.read_until("ready")["health_port"]
    assert file.read_text() == f"{port}\n"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=10) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"process_cpu_seconds_total" in answer.read() or sys.platform != "linux"
    probe.process.terminate()
    assert probe.end() == 0


def test_a_second_signal_ends_the_process_at_once(probes: Probes) -> None:
    probe = probes.start("slow drain", BANYAN_DRAIN_TIMEOUT_S="3600")
    probe.read_until("ready")
    probe.process.send_signal(signal.SIGTERM)
    probe.read_until("drain")
    probe.process.send_signal(signal.SIGHUP)
    probe.process.send_signal(signal.SIGINT)
    assert probe.end() == 128 + signal.SIGINT
    assert "release" not in probe.messages()


def test_a_stuck_event_loop_does_not_keep_a_second_signal_out(probes: Probes) -> None:
    probe = probes.start("stuck loop")
    probe.read_until("blocking")
    probe.process.send_signal(signal.SIGTERM)
    probe.process.send_signal(signal.SIGINT)
    assert probe.end() in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_start_whose_thread_does_not_return_is_given_up(probes: Probes) -> None:
    probe = probes.start("stuck start")
    probe.read_until("starting")
    probe.process.send_signal(signal.SIGTERM)
    assert probe.end() == 0
    assert "release" in probe.messages()
    assert "drain" not in probe.messages()


@pytest.mark.parametrize(
    ("behaviour", "culprit", "error"),
    [("task dies", "pump", "LookupError: boom"), ("thread dies", "engine", "ZeroDivisionError")],
)
def test_a_crash_is_logged_with_its_traceback_and_exits_with_1(
    probes: Probes, behaviour: str, culprit: str, error: str
) -> None:
    probe = probes.start(behaviour)
    assert probe.end() == 1
    (record,) = [record for record in probe.records if record["level"] == "critical"]
    assert culprit in record["msg"]
    assert error in record["exception"]
    assert "drain" not in probe.messages()
    assert "release" in probe.messages()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"BANYAN_HEALTH_PORT": "x"}, "BANYAN_HEALTH_PORT='x'"),
        ({"BANYAN_PROBE_BEHAVIOUR": "impossible"}, "BANYAN_PROBE_BEHAVIOUR='impossible'"),
    ],
)
def test_wrong_settings_exit_with_2_and_say_which(
    probes: Probes, environ: dict[str, str], says: str
) -> None:
    probe = probes.start(**environ)
    assert probe.end() == 2
    (record,) = probe.records
    assert says in record["msg"]
    assert "exception" not in record


def test_sigusr1_prints_the_stacks_and_goes_on(probes: Probes) -> None:
    probe = probes.start("slow drain")
    probe.read_until("ready")
    probe.process.send_signal(signal.SIGTERM)
    probe.read_until("drain")
    probe.process.send_signal(signal.SIGUSR1)
    probe.process.send_signal(signal.SIGTERM)
    assert probe.end() == 128 + signal.SIGTERM
    assert any("most recent call first" in line for line in probe.other_lines)


def test_a_supervised_process_leaves_sigint_to_its_supervisor(probes: Probes) -> None:
    probe = probes.start(BANYAN_PARENT_PID=str(os.getpid()))
    probe.read_until("ready")
    probe.process.send_signal(signal.SIGINT)
    probe.process.send_signal(signal.SIGTERM)
    assert probe.end() == 0
    (record,) = [record for record in probe.records if record["msg"] == "stopping"]
    assert record["reason"] == "received SIGTERM"


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_the_death_of_the_supervisor_drains_its_children(probes: Probes) -> None:
    probe = probes.start_below_a_parent()
    probe.read_until("ready")
    probe.process.kill()
    probe.read_until(None)
    assert probe.messages()[-1] == "stopped"
    (record,) = [record for record in probe.records if record["msg"] == "stopping"]
    assert record["reason"] == "received SIGHUP"


def test_a_process_whose_supervisor_is_gone_already_does_not_start(probes: Probes) -> None:
    probe = probes.start(BANYAN_PARENT_PID="1")
    assert probe.end() == 1
    assert "loop" not in probe.messages()


def test_the_exit_timer_ends_a_process_that_cannot(tmp_path: Path, probes: Probes) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(
        "import threading\n"
        "from shared.process import ExitTimer\n"
        "timer = ExitTimer()\n"
        "timer.arm(3600, 6)\n"
        "timer.arm(0.05, 7)\n"
        "threading.Event().wait()\n"
    )
    probe = probes.start_script(script)
    assert probe.end() == 7
    assert any("stuck.py" in line for line in probe.other_lines)
