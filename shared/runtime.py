"""The life of a service process. This module alone owns signals, tasks, health and the drain order.

A service's ``__main__`` is::

    if __name__ == "__main__":
        main(GatewayService, GatewaySettings)

Its life, with the exit code at the end::

    start ─▶ ready ─▶ SIGTERM, SIGINT or stop()
                      ─▶ stop intake ─▶ drain ─▶ tasks ─▶ bus ─▶ transport ─▶ device ─▶ 0
    start, a task or a thread raises
                      ─▶ stop intake ──────────▶ tasks ─▶ bus ─▶ transport ─▶ device ─▶ 1
    a signal during start
                      ─────────────────────────▶ tasks ─▶ bus ─▶ transport ─▶ device ─▶ 0

Every stage has a deadline; one that misses it is cancelled and logged, the next one follows, and
the exit code is 1. A crashed process does not drain: others take over what it held, and the sooner
it is gone the sooner they do. Exit code 2: the settings are wrong.

====================  ========================================================================
SIGTERM, SIGINT       shut down; once more: exit at once with 128 + the signal's number
SIGHUP                shut down; never more than that (the terminal or the supervisor is gone)
SIGUSR1               print every thread's stack to stderr and go on
====================  ========================================================================

A supervised process (``BANYAN_PARENT_PID``) ignores SIGINT, which a terminal sends to the whole
process group: its supervisor decides. A process that cannot end, because its event loop is stuck or
a thread does not return, is ended by a timer.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any, NoReturn, TypeVar

from shared import logging as structured_logging
from shared.config import ServiceSettings
from shared.errors import ConfigError
from shared.health import Health, HealthServer, Phase
from shared.metrics import SHORT_BUCKETS_S, Metrics
from shared.process import ExitTimer, set_parent_death_signal, signal_name, write_whole

_log = logging.getLogger(__name__)

_LOOP_LAG_PERIOD_S = 0.1
_CANCEL_DEADLINE_S = 2.0
_EXIT_DEADLINE_S = 2.0

T = TypeVar("T")
S = TypeVar("S", bound=ServiceSettings)


class Release(IntEnum):
    """What a process holds, in the order in which it lets go once no work is left."""

    BUS = 0
    TRANSPORT = 1
    DEVICE = 2


class Service(ABC):
    """One of the suite's services: what only it knows about starting and stopping.

    All methods run on the event loop and are called at most once, in this order.
    """

    @abstractmethod
    async def start(self, runtime: "Runtime") -> None:
        """Open what is needed, register its release, and begin to serve; return when ready.

        Each resource is handed to ``runtime.on_release`` as soon as it is open, so that a start
        that fails or is interrupted half-way gives back just what it took. May be cancelled.
        """

    @abstractmethod
    async def stop_intake(self) -> None:
        """Take no new work; what is in flight goes on. Also called after a crash."""

    @abstractmethod
    async def drain(self, deadline_s: float) -> None:
        """Return when nothing is in flight any more.

        After ``deadline_s`` what is left is to be handed over, which may take
        ``Deadlines.hand_over_s``; then this call is cancelled. Not called after a crash.
        """


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long each stage of the shutdown may take, in seconds."""

    stop_intake_s: float = 5.0
    drain_s: float = 30.0
    hand_over_s: float = 2.0
    release_s: float = 10.0
    """For each registered release, and for the tasks together."""

    def total_s(self, num_releases: int) -> float:
        """The longest that a shutdown can take while the event loop runs."""
        drain_s = self.stop_intake_s + self.drain_s + self.hand_over_s
        release_s = self.release_s * (num_releases + 1)
        return drain_s + release_s + _CANCEL_DEADLINE_S * (num_releases + 3)


class Runtime:
    """What a service sees of its process; made by ``run``, or by a test around a loop of its own.

    ``stop`` and ``fail`` may be called from any thread and from signal handlers, everything else
    only on the event loop. Must be made while that loop runs.
    """

    def __init__(self, settings: ServiceSettings, metrics: Metrics, deadlines: Deadlines) -> None:
        self.instance = settings.instance
        self.metrics = metrics
        self.health = Health()
        self._health_server = HealthServer(self.health, metrics)
        self.health_port = 0
        """The port that the health server took; known in ``Service.start``."""
        self._settings = settings
        self._deadlines = deadlines
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._failed = asyncio.Event()
        self._is_clean = True
        self._has_started = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._releases: list[tuple[Release, str, Callable[[], Awaitable[None]]]] = []
        self._loop_lag = metrics.histogram(
            "runtime",
            "loop_lag",
            "seconds",
            "How late the event loop ran a callback that was due",
            buckets=SHORT_BUCKETS_S,
        )

    @property
    def is_stopping(self) -> bool:
        """Whether the process is on its way out."""
        return self._stopping.is_set()

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run ``work`` as a task of this process until it returns or the drain is over.

        If it raises, the process crashes: half-alive is worse than restarted. Work that may fail
        by itself (one request's) catches its errors at its own boundary. Tasks are cancelled after
        ``drain``, before the bus is closed. Raises ``RuntimeError`` after that.
        """
        if self.health.phase is Phase.STOPPED:
            work.close()
            raise RuntimeError(f"task {name!r} spawned after the drain was over")
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def on_release(self, stage: Release, name: str, release: Callable[[], Awaitable[None]]) -> None:
        """Have ``release`` called once in ``stage``, the last registered of a stage first."""
        self._releases.append((stage, name, release))

    def stop(self, reason: str) -> None:
        """Begin the shutdown; a second call changes nothing."""
        self._from_anywhere(self._begin_stopping, reason)

    def fail(self, error: BaseException, source: str) -> None:
        """Crash: log ``error`` with its traceback and begin the shutdown without a drain."""
        self._from_anywhere(self._begin_failing, error, source)

    async def start(self, service: Service) -> bool:
        """Start the health server and ``service``; return whether it is ready.

        If not, it failed (logged) or was told to stop; either way ``shut_down`` comes next.
        """
        began_s = time.monotonic()
        self._measure_loop_lag(self._loop.time())
        try:
            await self._open_health_server()
            self._has_started = await self._until(service.start(self), self._stopping, None)
        except Exception as error:
            self._begin_failing(error, "start")
        if self.is_stopping:
            return False
        self.health.phase = Phase.READY
        _log.info(
            "ready",
            extra={
                "start_s": round(time.monotonic() - began_s, 3),
                "health_host": self._settings.health_host,
                "health_port": self.health_port,
            },
        )
        return True

    async def wait_until_stopping(self) -> None:
        """Return when the process shall stop, for whatever reason."""
        await self._stopping.wait()

    async def shut_down(self, service: Service) -> int:
        """Take ``service`` down in order and return the exit code, 0 if it went as it should."""
        self.health.phase = Phase.DRAINING
        limits = self._deadlines
        if self._has_started:
            await self._stage("stop intake", service.stop_intake, limits.stop_intake_s)
            await self._stage(
                "drain",
                lambda: service.drain(limits.drain_s),
                limits.drain_s + limits.hand_over_s,
                interrupt=self._failed,
            )
        self.health.phase = Phase.STOPPED
        await self._stage("tasks", self._cancel_tasks, limits.release_s)
        for stage in Release:
            for at, name, release in reversed(self._releases):
                if at is stage:
                    await self._stage(f"{stage.name.lower()}: {name}", release, limits.release_s)
        await self._health_server.close()
        exit_code = 0 if self._is_clean and not self._failed.is_set() else 1
        _log.info("stopped", extra={"exit_code": exit_code})
        return exit_code

    def shutdown_limit_s(self) -> float:
        """After how long a shutdown that begins now can only be stuck."""
        return self._deadlines.total_s(len(self._releases)) + _EXIT_DEADLINE_S

    def _from_anywhere(self, change: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending anyway
            self._loop.call_soon_threadsafe(change, *arguments)

    async def _open_health_server(self) -> None:
        host, port = self._settings.health_host, self._settings.health_port
        self.health_port = await self._health_server.start(host, port)
        if self._settings.health_port_file is not None:
            write_whole(self._settings.health_port_file, f"{self.health_port}\n")

    def _begin_stopping(self, reason: str) -> None:
        if not self._stopping.is_set():
            _log.info("stopping", extra={"reason": reason})
            self._stopping.set()

    def _begin_failing(self, error: BaseException, source: str) -> None:
        _log.critical("%s failed", source, exc_info=error)
        self._failed.set()
        self._stopping.set()

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._begin_failing(error, f"task {task.get_name()!r}")

    async def _stage(
        self,
        name: str,
        action: Callable[[], Awaitable[None]],
        deadline_s: float,
        *,
        interrupt: asyncio.Event | None = None,
    ) -> None:
        """Run one stage; whatever goes wrong in it is logged and the next one follows."""
        if interrupt is not None and interrupt.is_set():
            return
        began_s = time.monotonic()
        try:
            if not await self._until(action(), interrupt, deadline_s):
                self._is_clean = False
                _log.error("shutdown stage %r cut off", name, extra={"deadline_s": deadline_s})
        except Exception:
            self._is_clean = False
            _log.exception("shutdown stage %r failed", name)
        took_s = round(time.monotonic() - began_s, 3)
        _log.debug("shutdown stage %r done", name, extra={"took_s": took_s})

    async def _until(
        self, work: Awaitable[None], interrupt: asyncio.Event | None, deadline_s: float | None
    ) -> bool:
        """Await ``work`` until it ends (``True``), or cancel it at the interrupt or deadline."""
        task: asyncio.Future[None] = asyncio.ensure_future(work)
        waiting: set[asyncio.Future[Any]] = {task}
        if interrupt is not None:
            waiting.add(asyncio.ensure_future(interrupt.wait()))
        await asyncio.wait(waiting, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        is_done = task.done()
        for future in waiting:
            future.cancel()
        await asyncio.wait(waiting, timeout=_CANCEL_DEADLINE_S)
        if is_done:
            if task.cancelled():
                raise RuntimeError("the work was cancelled from within")
            task.result()
        elif not task.done():
            _log.error("work that was cancelled did not end", extra={"work": repr(task)})
        elif not task.cancelled() and (error := task.exception()) is not None:
            _log.error("work that was cancelled raised", exc_info=error)
        return is_done

    async def _cancel_tasks(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _measure_loop_lag(self, due_s: float) -> None:
        now_s = self._loop.time()
        self._loop_lag.observe(max(0.0, now_s - due_s))
        if self.health.phase is not Phase.STOPPED:
            next_s = now_s + _LOOP_LAG_PERIOD_S
            self._loop.call_at(next_s, self._measure_loop_lag, next_s)


def main(build: Callable[[S], Service], settings_type: type[S]) -> NoReturn:
    """Load the settings, build the service and ``run`` it; never returns.

    A ``ConfigError`` of either is logged as one record, and the exit code is 2.
    """
    try:
        settings = settings_type.load()
        service = build(settings)
    except ConfigError as error:
        structured_logging.configure(settings_type.service, "")
        _log.critical("wrong settings: %s", error)
        sys.exit(2)
    sys.exit(run(service, settings))


def run(service: Service, settings: ServiceSettings) -> int:
    """Run ``service`` in this process, on the main thread, until it is told to stop.

    Takes over logging, signals and ``threading.excepthook`` of the process. Returns the exit code,
    to be passed to ``sys.exit`` soon: a timer is running.
    """
    structured_logging.configure(
        settings.service, settings.instance, settings.log_level, json=settings.log_json
    )
    settings.log_effective(_log)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    parent_pid = settings.parent_pid
    if parent_pid is not None and not set_parent_death_signal(parent_pid, signal.SIGHUP):
        _log.critical("not a child of BANYAN_PARENT_PID", extra={"parent_pid": parent_pid})
        return 1
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_live(service, settings))


async def _live(service: Service, settings: ServiceSettings) -> int:
    deadlines = Deadlines(drain_s=settings.drain_timeout_s)
    runtime = Runtime(settings, Metrics(process=True), deadlines)
    exit_timer = ExitTimer()
    _take_signals(runtime, exit_timer, is_supervised=settings.parent_pid is not None)
    threading.excepthook = lambda death: _thread_died(runtime, death)
    if await runtime.start(service):
        await runtime.wait_until_stopping()
    exit_timer.arm(runtime.shutdown_limit_s(), 1)
    exit_code = await runtime.shut_down(service)
    exit_timer.arm(_EXIT_DEADLINE_S, exit_code)
    return exit_code


def _take_signals(runtime: Runtime, exit_timer: ExitTimer, *, is_supervised: bool) -> None:
    """Install the handlers of the table above.

    ``signal.signal`` and not the loop's own handlers, which do not run while the loop is stuck.
    """
    seen: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        if seen and signum != signal.SIGHUP:
            os._exit(128 + signum)
        if signum != signal.SIGHUP:
            seen.append(signum)
        exit_timer.arm(runtime.shutdown_limit_s(), 1)
        runtime.stop(f"received {signal_name(signum)}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_supervised else stop)
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    if is_supervised or not is_nohup:
        signal.signal(signal.SIGHUP, stop)


def _thread_died(runtime: Runtime, death: threading.ExceptHookArgs) -> None:
    if death.exc_value is not None and not isinstance(death.exc_value, SystemExit):
        name = death.thread.name if death.thread is not None else "unknown"
        runtime.fail(death.exc_value, f"thread {name!r}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The maker of uvloop's loop where that is installed, else of the standard one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
