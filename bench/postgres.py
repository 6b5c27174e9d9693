"""A PostgreSQL server in a temporary directory, for tests and drills: stopped and started at will.

It takes Debian's ``postgresql`` package, or any server whose ``initdb`` is on the path.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.suite import free_port

DEBIAN = Path("/usr/lib/postgresql")
UNPRIVILEGED = ("postgres", "nobody")
"""As whom it runs if we are root, which PostgreSQL refuses."""
START_S = 60
SETTINGS = (
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "fsync=off",
    "shared_buffers=16MB",
    "max_connections=50",
)


class PostgresMissing(RuntimeError):
    """There is no server on this machine."""


class Postgres:
    """The server; made by ``running_postgres``. Its user needs no password."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self._data = directory / "data"
        self._log = directory / "log"
        self._port = free_port()
        self._user = _unprivileged() if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(directory, self._user, -1)
        self._run(
            "initdb",
            "--auth=trust",
            "--username=banyan",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        )

    def url(self, database: str = "postgres") -> str:
        """The address of one of its databases."""
        return f"postgresql://banyan@127.0.0.1:{self._port}/{database}"

    def create(self, database: str) -> str:
        """Make an empty database; returns its address."""
        self._tool("createdb", database)
        return self.url(database)

    def query(self, statement: str, database: str = "postgres") -> str:
        """What ``psql`` prints for one statement, without headings."""
        return self._tool("psql", "-qAt", "-v", "ON_ERROR_STOP=1", "-c", statement, database)

    def start(self) -> None:
        """Start it, on the same port and data as ever; returns when it takes connections."""
        settings = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"port={self._port}"))
        self._run("pg_ctl", "start", "-w", "-t", str(START_S), "-l", str(self._log), "-o", settings)

    def stop(self) -> None:
        """End it at once, as a crash would; does nothing to one that does not run."""
        if (self._data / "postmaster.pid").exists():
            self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program of the server's side."""
        command: list[str | Path] = [self._binaries / program, "-D", self._data, *arguments]
        done = subprocess.run(
            command,
            cwd=self._data.parent,
            user=self._user,
            stdin=subprocess.DEVNULL,
            # The server keeps what it inherits: a pipe would not end before it does.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=START_S + 30,
            check=False,
        )
        if done.returncode:
            log = self._log.read_text()[-2000:] if self._log.exists() else ""
            raise RuntimeError(f"{program} ended with {done.returncode}\n{log}")

    def _tool(self, program: str, *arguments: str) -> str:
        """Run a program of the client's side."""
        address = ["-h", "127.0.0.1", "-p", str(self._port), "-U", "banyan"]
        done = subprocess.run(
            [self._binaries / program, *address, *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")
        return done.stdout.strip()


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server on a free port of loopback, gone when left. Raises ``PostgresMissing``."""
    binaries = _binaries()
    directory = Path(tempfile.mkdtemp(prefix="banyan-postgres-"))
    try:
        server = Postgres(binaries, directory)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _binaries() -> Path:
    found = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    if initdb is None:
        raise PostgresMissing("no PostgreSQL server here (Debian: apt-get install postgresql)")
    return Path(initdb).resolve().parent


def _unprivileged() -> int:
    for name in UNPRIVILEGED:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    raise PostgresMissing("root cannot run PostgreSQL, and there is no user to run it as")
