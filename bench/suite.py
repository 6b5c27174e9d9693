"""A suite of real processes for tests and benchmarks, started by ``banyan up``."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from bench.postgres import Postgres

ROOT = Path(__file__).resolve().parents[1]
READY_S = 120.0
STOP_S = 60.0
POLL_S = 0.05


class SuiteFailed(RuntimeError):
    """The suite did not do what was waited for; the message has the end of its logs."""


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, kw_only=True)
class Process:
    """One service process of the suite."""

    pid: int
    role: str
    instance: str


class Suite:
    """A running suite; made by ``running_suite``."""

    def __init__(
        self,
        supervisor: subprocess.Popen[bytes],
        url: str,
        log_dir: Path,
        database: "Postgres | Path",
    ) -> None:
        """``database``: the server, or the file of SQLite."""
        self.supervisor = supervisor
        self.url = url
        self.log_dir = log_dir
        self.database = database
        self.client = httpx.Client(base_url=url, timeout=60.0)

    def processes(self, role: str | None = None) -> list[Process]:
        """The service processes alive now, by role and then by name."""
        found = []
        for pid in _descendants(self.supervisor.pid):
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                names = [w.decode() for w in words if w.startswith(b"services.")]
                instance = [e[16:].decode() for e in environ if e.startswith(b"BANYAN_INSTANCE=")]
                if names and instance:
                    service = names[0].removeprefix("services.")
                    found.append(Process(pid=pid, role=service, instance=instance[0]))
        wanted = [p for p in found if role is None or p.role == role]
        return sorted(wanted, key=lambda p: (p.role, p.instance))

    def nats_pid(self) -> int:
        """The process id of the suite's nats-server."""
        for pid in _descendants(self.supervisor.pid):
            with contextlib.suppress(OSError):
                if b"nats-server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    return pid
        raise SuiteFailed("no nats-server among the suite's processes")

    def status(self) -> dict[str, Any]:
        """What ``banyan status --json`` says."""
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "status", "--json", "--url", self.url],
            cwd=ROOT,
            capture_output=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise SuiteFailed(f"banyan status: {done.stderr.decode()[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def workers(self) -> list[dict[str, Any]]:
        """The load reports of all workers."""
        reports = self.status()["instances"]
        return [report for report in reports if report["role"] in ("prefill", "decode")]

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
        """Return when ``condition`` holds; raises ``SuiteFailed`` after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise SuiteFailed(f"{what} did not happen within {timeout_s} s\n{self.logs()}")
            time.sleep(POLL_S)

    def wait_until_blocks_are_free(self, timeout_s: float = 30.0) -> None:
        """Return when every worker says that it holds nothing; a leak makes this fail."""

        def all_free() -> bool:
            workers = self.workers()
            return bool(workers) and all(
                w["num_free_blocks"] == w["num_blocks"]
                and w["num_running"] == w["num_waiting"] == w["num_held"] == w["num_reserved"] == 0
                for w in workers
            )

        self.wait_until(all_free, "the release of every block", timeout_s)

    def metric(self, name: str) -> float:
        """The sum over all samples of one metric of the gateway."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)]
        return sum(values)

    def num_logged(self) -> int:
        """The rows of the request log."""
        statement = "SELECT count(*) FROM requests"
        if not isinstance(self.database, Path):
            return int(self.database.query(statement))
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as file:
            return int(file.execute(statement).fetchone()[0])

    def logs(self, num_bytes: int = 3000) -> str:
        """The end of every log file."""
        parts = []
        for path in sorted(self.log_dir.rglob("*.log")):
            text = path.read_bytes()[-num_bytes:].decode(errors="replace")
            parts.append(f"----- {path.name}\n{text}")
        return "\n".join(parts)

    def kill(self, process: Process, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one service process."""
        os.kill(process.pid, signum)

    def kill_pid(self, pid: int) -> None:
        """SIGKILL any process of the suite."""
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> int:
        """End the suite as Ctrl-C would; returns the exit code."""
        self.client.close()
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(signal.SIGINT)
        try:
            return self.supervisor.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            self.supervisor.kill()
            self.supervisor.wait()
            raise SuiteFailed(f"the suite did not stop\n{self.logs()}") from error


@contextlib.contextmanager
def running_suite(
    *arguments: str,
    env: dict[str, str] | None = None,
    log_dir: Path | None = None,
    postgres: "Postgres | None" = None,
) -> Iterator[Suite]:
    """Run ``banyan up`` with ``arguments`` on a free port; ready when entered, gone when left.

    Without ``postgres`` it has an SQLite file of its own, which is gone with it.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="banyan-suite-") as scratch:
        directory = log_dir or Path(scratch)
        ready_file = Path(scratch) / "ready.json"
        file = Path(scratch) / "banyan.db"
        command = [sys.executable, "-m", "cli.main", "up", "--port", str(port)]
        command += ["--ready-file", str(ready_file), "--log-dir", str(directory), *arguments]
        output = (directory / "banyan-up.log").open("wb")
        supervisor = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "BANYAN_DATABASE_URL": (
                    f"sqlite:///{file}" if postgres is None else postgres.url()
                ),
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        suite = Suite(supervisor, f"http://127.0.0.1:{port}", directory, postgres or file)
        try:
            suite.wait_until(
                lambda: ready_file.exists() or supervisor.poll() is not None, "ready", READY_S
            )
            if supervisor.poll() is not None:
                raise SuiteFailed(f"banyan up exited with {supervisor.returncode}\n{suite.logs()}")
            yield suite
        finally:
            suite.stop()
            output.close()


def _descendants(pid: int) -> Sequence[int]:
    """Process ids of all children, grandchildren …, from ``/proc`` (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name may hold anything but is closed by the last parenthesis.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.append(child)
            waiting.append(child)
    return found
