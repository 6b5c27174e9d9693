"""What runs in the slots of the suite: processes with a log file each, and the embedded NATS."""

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from cli.advice import Progress, progress_in
from cli.plan import ProcessSpec
from cli.supervision import Slot
from shared.bus.server import EmbeddedNats
from shared.errors import BanyanError, BusError

_NATS_WATCH_PERIOD_S = 0.1
_TAIL_BYTES = 64 * 1024


class Run(Protocol):
    """One process, from its start to its end. ``instance`` names it among all there ever were."""

    instance: str
    pid: int

    async def wait(self) -> int:
        """Return its exit code once it has ended; negative if a signal ended it."""
        ...

    def terminate(self) -> None:
        """Ask it to drain and end."""
        ...

    def kill(self) -> None:
        """End it, and all that it has started, at once."""
        ...


class Program(Protocol):
    """What fills a slot, again and again."""

    slot: Slot
    is_ready_once_started: bool
    """Whether ``start`` returns only when it takes work; otherwise its load reports say so."""

    async def start(self) -> Run:
        """Start it once more. Raises a ``BanyanError`` if that cannot be done."""
        ...

    def log_tail(self, num_lines: int) -> str:
        """The last lines that the latest run wrote."""
        ...

    def progress(self) -> Progress | None:
        """How far the latest run is with loading; ``None`` if it does not say."""
        ...


class ServiceRun:
    """A process of a service, leader of a session of its own: Ctrl-C does not reach it."""

    def __init__(self, instance: str, process: asyncio.subprocess.Process) -> None:
        self.instance = instance
        self.pid = process.pid
        self._process = process

    async def wait(self) -> int:
        """See ``Run``. What the process may have left behind is killed then."""
        exit_code = await self._process.wait()
        self.kill()
        return exit_code

    def terminate(self) -> None:
        """See ``Run``."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """See ``Run``."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class ServiceProgram:
    """A service as ``python -m services.<name>``, writing to ``<log_dir>/<slot>.log``.

    ``connection`` says, at each start, how to reach the bus.
    """

    is_ready_once_started = False

    def __init__(
        self, spec: ProcessSpec, *, log_dir: Path, connection: Callable[[], Mapping[str, str]]
    ) -> None:
        self.slot = spec.slot
        self.log_path = log_dir / f"{spec.slot}.log"
        self._spec = spec
        self._connection = connection
        self._log_offset = 0
        self._read_offset = 0
        self._progress: Progress | None = None

    async def start(self) -> ServiceRun:
        """See ``Program``. Must be called from the main thread: it is whose death is watched."""
        instance = f"{self.slot}-{secrets.token_hex(2)}"
        environ = {**self._spec.environment(os.environ), **self._connection()}
        environ["BANYAN_INSTANCE"] = instance
        environ["BANYAN_PARENT_PID"] = str(os.getpid())
        for name in ("BANYAN_HEALTH_PORT", "BANYAN_HEALTH_PORT_FILE"):
            environ.pop(name, None)  # one port cannot be that of all
        with self.log_path.open("ab") as log:
            self._log_offset = self._read_offset = log.tell()
            self._progress = None
            process = await asyncio.create_subprocess_exec(
                *self._spec.command,
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return ServiceRun(instance, process)

    def log_tail(self, num_lines: int) -> str:
        """See ``Program``."""
        if not self.log_path.is_file():
            return ""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_offset, size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def progress(self) -> Progress | None:
        """See ``Program``. Reads what was logged since the last call."""
        if not self.log_path.is_file():
            return self._progress
        with self.log_path.open("rb") as log:
            log.seek(self._read_offset)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._read_offset += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            self._progress = progress_in(line) or self._progress
        return self._progress


class NatsRun:
    """One life of the embedded NATS server."""

    def __init__(self, server: EmbeddedNats, pid: int, instance: str) -> None:
        self.instance = instance
        self.pid = pid
        self._server = server
        self._is_asked_to_end = False

    async def wait(self) -> int:
        """See ``Run``; the exit code is not known: 0 if the end was asked for, else 1."""
        if hasattr(os, "pidfd_open"):
            await _until_exit(self.pid)
        # On Linux this only waits for asyncio to hear of it too; elsewhere there is nothing better.
        while self._server.is_running and self._server.pid == self.pid:  # noqa: ASYNC110
            await asyncio.sleep(_NATS_WATCH_PERIOD_S)
        return 0 if self._is_asked_to_end else 1

    def terminate(self) -> None:
        """See ``Run``."""
        self._is_asked_to_end = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """See ``Run``."""
        self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        if self._server.is_running and self._server.pid == self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


async def _until_exit(pid: int) -> None:
    """Return once the process ``pid``, a child of ours, has ended. Linux only."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        loop.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class NatsProgram:
    """The embedded NATS server: it comes back on the same port, with what it had stored."""

    is_ready_once_started = True

    def __init__(self, slot: Slot, server: EmbeddedNats) -> None:
        self.slot = slot
        self._server = server

    async def start(self) -> NatsRun:
        """See ``Program``."""
        await self._server.start()
        pid = self._server.pid
        if pid is None:
            raise BusError("nats-server ended at once")
        return NatsRun(self._server, pid, f"{self.slot}-{secrets.token_hex(2)}")

    def log_tail(self, num_lines: int) -> str:
        """See ``Program``."""
        return "\n".join(self._server.log_tail.splitlines()[-num_lines:])

    def progress(self) -> Progress | None:
        """See ``Program``: it has nothing to load."""
        return None


StartError = (BanyanError, OSError)
"""What ``Program.start`` may raise."""
