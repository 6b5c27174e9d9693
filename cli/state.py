"""The suites that run on this machine, as files: ``~/.cache/banyan/current-<port>.json``.

``banyan up`` writes one when it is ready and removes it at its end; the other commands read them to
find the bus. A file has the password of the ``cli`` user, so only its owner may read it.
"""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cli.errors import CommandFailed

DEFAULT_PORT = 8000


class SuiteState(msgspec.Struct, frozen=True, kw_only=True):
    """A running suite: its gateways, its bus as user ``nats_user``, its processes.

    ``pid`` is that of ``banyan up``, ``pids`` those of the others by instance.
    """

    pid: int
    port: int
    url: str
    urls: tuple[str, ...]
    model: str
    nats_url: str
    nats_user: str
    nats_password: str
    log_dir: str
    pids: dict[str, int]


def cache_dir() -> Path:
    """Where Banyan keeps what it can do without: ``$XDG_CACHE_HOME/banyan``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "banyan"


def state_path(port: int) -> Path:
    """The file of the suite whose first gateway is at ``port``."""
    return cache_dir() / f"current-{port}.json"


def write_private(path: Path, data: bytes) -> None:
    """Write ``path``, whole or not at all, readable by nobody else at any moment."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_state(state: SuiteState) -> Path:
    """Say that this suite runs; returns the file."""
    path = state_path(state.port)
    write_private(path, msgspec.json.encode(state))
    return path


def remove_state(state: SuiteState) -> None:
    """This suite is gone; a file that another one has written meanwhile stays."""
    path = state_path(state.port)
    written = _read(path)
    if written is not None and written.pid == state.pid:
        path.unlink(missing_ok=True)


def running_suites() -> list[SuiteState]:
    """The suites that run, by port. Files of those that died without removing them are removed."""
    found = []
    for path in sorted(cache_dir().glob("current-*.json")):
        state = _read(path)
        if state is not None and is_alive(state.pid):
            found.append(state)
        elif state is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda state: state.port)


def find_suite(url: str | None) -> SuiteState | None:
    """The running suite with a gateway at ``url``; without one the only suite, or that on :8000.

    Raises ``CommandFailed`` if there are several and none of them is meant.
    """
    suites = running_suites()
    if url is not None:
        wanted = _port_of(url)
        return next(
            (suite for suite in suites if wanted in [_port_of(u) for u in suite.urls]), None
        )
    if len(suites) <= 1:
        return suites[0] if suites else None
    for suite in suites:
        if suite.port == DEFAULT_PORT:
            return suite
    urls = ", ".join(suite.url for suite in suites)
    raise CommandFailed(f"several suites run; say which with --url: {urls}")


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _port_of(url: str) -> int | None:
    """The port of an address; raises ``CommandFailed`` for one that is none."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError as error:
        raise CommandFailed(f"--url={url}: not an address like http://127.0.0.1:8000") from error
    return port or (443 if parts.scheme == "https" else 80)


def _read(path: Path) -> SuiteState | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=SuiteState)
    except (OSError, msgspec.MsgspecError):
        return None
