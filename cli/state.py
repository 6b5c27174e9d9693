"""The suites that run on this machine, as files: ``~/.cache/banyan/current-<port>.json``.

``banyan up`` writes one as soon as its bus runs and removes it at its end; the other commands read
them to find the bus. A file has the password of the ``cli`` user, so only its owner may read it.
"""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cli.errors import CommandFailed
from shared.directories import cache_dir

DEFAULT_PORT = 8000
_STARTTIME = 19
"""Of the fields of ``/proc/<pid>/stat`` behind the name, counted from 0."""


class SuiteState(msgspec.Struct, frozen=True, kw_only=True):
    """A running suite: its gateways, its bus as user ``nats_user``, its processes.

    ``pid`` is that of ``banyan up``, ``pids`` those of the others by instance. ``pid_started``
    tells that process from a later one with the same number. Until ``is_ready`` no gateway need
    answer yet.
    """

    pid: int
    pid_started: str = ""
    is_ready: bool = True
    port: int
    url: str
    urls: tuple[str, ...]
    model: str
    nats_url: str
    nats_user: str
    nats_password: str
    log_dir: str
    pids: dict[str, int]


def state_path(port: int) -> Path:
    """The file of the suite whose first gateway is at ``port``."""
    return cache_dir() / f"current-{port}.json"


def write_private(path: Path, data: bytes) -> None:
    """Write ``path``, whole or not at all, readable by nobody else at any moment.

    Raises ``CommandFailed`` if that cannot be done.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        is_ours = path.is_relative_to(cache_dir())
        hint = ": let XDG_CACHE_HOME name a directory that can" if is_ours else ""
        raise CommandFailed(f"{path} cannot be written ({error.strerror}){hint}") from error


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
        if state is not None and _is_running(state):
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


def process_start(pid: int) -> str:
    """When ``pid`` was started, in ticks since the boot that is named too; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The command's name may hold anything but is closed by the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{boot}/{fields[_STARTTIME]}"


def _is_running(state: SuiteState) -> bool:
    """Whether the ``banyan up`` that wrote ``state`` lives, and not just one with its number."""
    if not is_alive(state.pid):
        return False
    return state.pid_started in ("", process_start(state.pid))


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
