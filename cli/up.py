"""``banyan up``: runs the suite in the foreground until it is told to stop."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from cli.errors import CommandFailed
from cli.host import check_ports, find_hardware
from cli.plan import ProcessSpec, UpOptions, plan_suite
from cli.state import (
    DEFAULT_PORT,
    SuiteState,
    is_alive,
    process_start,
    remove_state,
    state_path,
    write_private,
    write_state,
)
from cli.suite import Suite
from cli.supervisor import Change
from cli.view import UpView
from shared import logging as structured_logging
from shared.core.policies import POLICIES
from shared.directories import cache_dir
from shared.errors import ConfigError

log = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 0.25
EXIT_FAILED = 1
EXIT_KILLED = 130
KEPT_RUNS = 5
"""How many directories of former runs are kept."""


@dataclass(frozen=True, kw_only=True)
class UpRequest:
    """The options of the suite, and those of the command itself."""

    suite: UpOptions
    log_dir: Path | None = None
    ready_file: Path | None = None
    as_json: bool = False


class ReadyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--ready-file`` and ``--json`` say, for scripts; ``pids`` are by instance.

    The password of the bus is in ``state_file`` only, which nobody else can read.
    """

    url: str
    urls: tuple[str, ...]
    model: str
    nats_url: str
    pid: int
    pids: dict[str, int]
    log_dir: str
    state_file: str
    ready_after_s: float


def run_up(request: UpRequest) -> int:
    """Run the suite; returns the exit code. Raises a ``BanyanError`` if it cannot even be tried."""
    options = request.suite
    if options.policy is not None and options.policy not in POLICIES:
        raise ConfigError(f"--policy={options.policy}: not one of {', '.join(sorted(POLICIES))}")
    specs = plan_suite(options, find_hardware(options.device))
    check_ports(options.host, options.gateway_ports())
    run_dir = _make_run_dir(request.log_dir)
    if request.ready_file is not None:
        request.ready_file.unlink(missing_ok=True)  # of a former run that was killed
    with (run_dir / "supervisor.log").open("a") as log_file:
        structured_logging.configure("supervisor", "", json=options.json_logs, stream=log_file)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every probe
        try:
            return asyncio.run(_Up(request, run_dir).run(specs))
        finally:
            logging.shutdown()


class _Up:
    """One run of the suite."""

    def __init__(self, request: UpRequest, run_dir: Path) -> None:
        self._request = request
        self._run_dir = run_dir
        self._view = UpView(Console(stderr=True), is_quiet=request.as_json)
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._state: SuiteState | None = None
        self._ready: ReadyInfo | None = None
        options = request.suite
        self._urls = tuple(_url(options.host, port) for port in options.gateway_ports())

    async def run(self, specs: Sequence[ProcessSpec]) -> int:
        """Until a signal comes, or it turns out that the suite cannot work."""
        self._suite = Suite(
            specs,
            run_dir=self._run_dir,
            probe_url=f"{self._urls[0]}/health/ready",
            on_change=self._changed,
        )
        with self._view, _signals(self._on_signal):
            try:
                exit_code = await self._live()
            finally:
                self._view.stopping()
                await self._suite.stop(self._hurry)
                self._clean_up()
        return EXIT_KILLED if self._hurry.is_set() else exit_code

    def _on_signal(self) -> None:
        if self._asked.is_set():
            self._hurry.set()
        self._asked.set()

    async def _live(self) -> int:
        asked = asyncio.create_task(self._asked.wait())
        failed = asyncio.create_task(self._suite.until_failed())
        started = asyncio.create_task(self._start())
        watched = asyncio.create_task(self._watch_progress())
        tasks: set[asyncio.Task[Any]] = {asked, failed, started, watched}
        try:
            await asyncio.wait({asked, failed, started}, return_when=asyncio.FIRST_COMPLETED)
            watched.cancel()
            if started.done():
                started.result()
                self._now_ready()
                await asyncio.wait({asked, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                self._view.failed(failed.result(), str(self._run_dir))
                return EXIT_FAILED
            return 0
        finally:
            for task in tasks:
                task.cancel()

    async def _start(self) -> None:
        await self._suite.start()
        self._publish(self._started())
        await self._suite.until_ready()

    async def _watch_progress(self) -> None:
        """Follow the loading of the models; logs tell of no change, so they are looked at."""
        while True:
            self._view.progressed(self._suite.supervisor.progress())
            await asyncio.sleep(PROGRESS_PERIOD_S)

    def _changed(self, change: Change) -> None:
        self._view.changed(change)
        if self._state is not None:
            try:
                self._publish(self._state)
            except CommandFailed as error:  # a full disk is no reason to stop serving
                log.warning("%s", error)

    def _started(self) -> SuiteState:
        """The bus runs, so that other commands can see how far the rest is."""
        user, password = self._suite.cli_credentials
        options = self._request.suite
        return SuiteState(
            pid=os.getpid(),
            pid_started=process_start(os.getpid()),
            is_ready=False,
            port=options.port,
            url=self._urls[0],
            urls=self._urls,
            model=options.served_model_name,
            nats_url=self._suite.nats_url,
            nats_user=user,
            nats_password=password,
            log_dir=str(self._run_dir),
            pids={},
        )

    def _now_ready(self) -> None:
        assert self._state is not None  # it has started
        state = msgspec.structs.replace(self._state, is_ready=True)
        self._ready = ReadyInfo(
            url=state.url,
            urls=state.urls,
            model=state.model,
            nats_url=state.nats_url,
            pid=state.pid,
            pids={},
            log_dir=state.log_dir,
            state_file=str(state_path(state.port)),
            ready_after_s=round(self._view.elapsed_s, 3),
        )
        self._publish(state)
        self._view.running()
        if self._request.as_json:
            sys.stdout.write(msgspec.json.encode(self._ready).decode() + "\n")
        else:
            sys.stdout.write(_greeting(self._ready, state.port))
        sys.stdout.flush()

    def _publish(self, state: SuiteState) -> None:
        """Write the files again, with the processes of this moment."""
        pids = self._suite.supervisor.pids()
        self._state = msgspec.structs.replace(state, pids=pids)
        write_state(self._state)
        if self._ready is not None:
            self._ready = msgspec.structs.replace(self._ready, pids=pids)
            if self._request.ready_file is not None:
                write_private(self._request.ready_file, msgspec.json.encode(self._ready))

    def _clean_up(self) -> None:
        if self._state is not None:
            remove_state(self._state)
        if self._ready is not None and self._request.ready_file is not None:
            self._request.ready_file.unlink(missing_ok=True)


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signals.append(signal.SIGHUP)
    for signum in signals:
        loop.add_signal_handler(signum, on_signal)
    try:
        yield
    finally:
        for signum in signals:
            loop.remove_signal_handler(signum)


def _make_run_dir(log_dir: Path | None) -> Path:
    """The directory of this run, made; of former runs the latest few are kept."""
    if log_dir is None:
        former = [
            path
            for path in cache_dir().glob("run-*")
            if not (path.name[4:].isdigit() and is_alive(int(path.name[4:])))
        ]
        former.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in former[KEPT_RUNS - 1 :]:
            shutil.rmtree(path, ignore_errors=True)
        log_dir = cache_dir() / f"run-{os.getpid()}"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir={log_dir}: {error.strerror}") from error
    return log_dir.resolve()


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches a gateway that listens on ``host``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _greeting(info: ReadyInfo, port: int) -> str:
    command = command_name()
    url_option = "" if port == DEFAULT_PORT else f" --url {info.url}"
    question = {
        "model": info.model,
        "messages": [{"role": "user", "content": "What is a banyan tree?"}],
    }
    lines = [
        f"{info.model} is ready at {info.url} (after {info.ready_after_s:.1f} s)",
        "",
        f'  {command} chat{url_option} -m "What is a banyan tree?"',
        f"  {command} status{url_option}",
        f"  curl {info.url}/v1/chat/completions -H 'content-type: application/json' \\",
        f"    -d '{json.dumps(question)}'",
        "",
        f"logs: {info.log_dir}   stop: Ctrl-C",
        "",
    ]
    return "\n".join(lines)


def command_name() -> str:
    """How the user can type ``banyan`` here."""
    script = Path(sys.executable).with_name("banyan")
    if not script.is_file():
        return f"{Path(sys.executable).name} -m cli.main"
    if shutil.which("banyan") == str(script):
        return "banyan"
    with contextlib.suppress(ValueError):
        return str(script.relative_to(Path.cwd()))
    return str(script)
