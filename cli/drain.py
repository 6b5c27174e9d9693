"""``banyan drain``: has an instance finish or hand over what it has, and end.

What ``SIGTERM`` does to a process here, over the bus: it works on another host and in a container
too. ``--wait`` follows it to its end, which is known by

======================  ===========================================================
it says that it leaves  the end; if ``banyan up`` runs it, the exit code follows
``banyan up`` says so   the end, with the exit code
it falls silent         it was killed, or hangs
======================  ===========================================================
"""

import asyncio
import contextlib
import getpass
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

import msgspec
from rich.console import Console

from cli.bus import BusAddress, connected
from cli.census import SILENT_AFTER_S, Census, Report, num_left, only_of_its_kind, resolve
from cli.errors import CommandFailed
from shared.bus.nats import NatsBus
from shared.errors import BusDisconnected, BusError, BusTimeout, NoResponder
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import Drain, InstanceExited, InstanceState
from shared.messages.requests import Done

LISTEN_S = 0.7
"""Longer than the period of any report."""
REQUEST_TIMEOUT_S = 5.0
GOODBYE_S = 10.0
"""From an instance's goodbye to its process's end, of which ``banyan up`` tells the exit code."""
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class DrainRequest:
    """Whom to drain, and whether to wait for the end; ``force`` drains the last of its kind."""

    instance: str
    wait: bool = False
    timeout_s: float | None = None
    force: bool = False
    as_json: bool = False


class DrainOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints. ``num_left`` is ``None`` where the instance does not count."""

    instance: str
    role: str
    has_ended: bool
    exit_code: int | None = None
    num_left: int | None = None


def run_drain(address: BusAddress, request: DrainRequest, output: TextIO, errors: TextIO) -> int:
    """Drain and print; returns the exit code. Raises ``CommandFailed`` if it does not drain."""
    try:
        outcome = asyncio.run(_drain(address, request, Console(file=errors)))
    except KeyboardInterrupt:
        errors.write("not waiting any longer; what has begun to drain goes on\n")
        return EXIT_INTERRUPTED
    if request.as_json:
        output.write(msgspec.json.encode(outcome).decode() + "\n")
    else:
        output.write(_told(outcome) + "\n")
    output.flush()
    return 0


async def _drain(address: BusAddress, request: DrainRequest, console: Console) -> DrainOutcome:
    async with connected(address, "banyan drain") as bus:
        watch = _Watch(bus)
        await watch.start()
        target = await watch.find(request.instance)
        lacking = only_of_its_kind(target, watch.reports())
        if lacking is not None and not request.force and target.state is InstanceState.READY:
            raise CommandFailed(
                f"{target.instance} is the only {lacking} that is ready, so requests would fail: "
                "start another one first, or say --force"
            )
        await _ask(bus, target, address)
        if not request.wait:
            left = num_left(target)
            return DrainOutcome(
                instance=target.instance, role=target.role, has_ended=False, num_left=left
            )
        with _shown(console, is_quiet=request.as_json) as show:
            exit_code = await _until_ended(watch, target, address, request.timeout_s, show)
    if exit_code:
        where = f"; see the logs in {address.log_dir}" if address.log_dir else ""
        how = f"exit code {exit_code}" if exit_code > 0 else f"signal {-exit_code}"
        raise CommandFailed(f"{target.instance} ended by {how} while it drained{where}")
    return DrainOutcome(
        instance=target.instance, role=target.role, has_ended=True, exit_code=exit_code
    )


class _Watch:
    """Everybody's reports, and how those that ended did."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._census = Census(SILENT_AFTER_S)
        self._exits: dict[str, InstanceExited] = {}
        self._news = asyncio.Event()

    async def start(self) -> None:
        """Begin to listen."""
        await self._bus.subscribe(subjects.all_load(), self._hear)

    def reports(self) -> list[Report]:
        """Of those that are there now."""
        return self._census.reports(self._loop.time())

    def report(self, instance: str) -> Report | None:
        """Its latest report; ``None`` if it left, or was silent for too long."""
        return next((r for r in self.reports() if r.instance == instance), None)

    def exit_of(self, instance: str) -> InstanceExited | None:
        """Its goodbye, or what its supervisor said after that."""
        return self._exits.get(instance)

    @property
    def is_connected(self) -> bool:
        """Whether silence means anything."""
        return self._bus.is_connected

    async def find(self, name: str) -> Report:
        """The instance that ``name`` means. Raises ``CommandFailed`` if there is not just one."""
        await asyncio.sleep(LISTEN_S)
        found = resolve(name, self.reports())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(report.instance for report in found)
            raise CommandFailed(f"{name} may be any of {names}: say which")
        present = ", ".join(report.instance for report in self.reports()) or "none"
        raise CommandFailed(f"there is no instance {name}; there are: {present}")

    async def changed(self, timeout_s: float) -> None:
        """Return when something was heard, at the latest after ``timeout_s``."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()

    async def _hear(self, message: Message, subject: str) -> None:
        self._census.hear(message, self._loop.time())
        if isinstance(message, InstanceExited):
            former = self._exits.get(message.instance)
            if former is None or message.exit_code is not None:
                self._exits[message.instance] = message
        self._news.set()


async def _ask(bus: NatsBus, target: Report, address: BusAddress) -> None:
    """Have it begin. Raises ``CommandFailed`` if it does not say that it does."""
    instance = target.instance
    reason = f"banyan drain, by {_user()} on {socket.gethostname()}"
    try:
        await bus.request(
            subjects.control(instance, "drain"),
            Drain(reason=reason),
            Done,
            timeout_s=REQUEST_TIMEOUT_S,
        )
    except NoResponder as error:
        if target.state is InstanceState.DRAINING:
            return  # its end came first
        raise CommandFailed(f"{instance} has just gone; see `banyan status`") from error
    except BusTimeout as error:
        pid = address.pids.get(instance)
        kill = "end its process" if pid is None else f"`kill -9 {pid}` ends it"
        raise CommandFailed(
            f"{instance} does not answer within {REQUEST_TIMEOUT_S:g} s, it may hang; {kill}, and "
            "its requests go on elsewhere"
        ) from error
    except BusDisconnected as error:
        raise CommandFailed(
            "the bus went away; whether it drains is shown by `banyan status`"
        ) from error
    except BusError as error:
        raise CommandFailed(f"{instance} does not drain: {error}") from error


async def _until_ended(
    watch: _Watch,
    target: Report,
    address: BusAddress,
    timeout_s: float | None,
    show: Callable[[str], None],
) -> int | None:
    """Its exit code once it has ended, ``None`` if nobody tells. Raises ``CommandFailed``."""
    instance = target.instance
    loop = asyncio.get_running_loop()
    deadline_s = None if timeout_s is None else loop.time() + timeout_s
    heard_s = loop.time()
    while (exited := watch.exit_of(instance)) is None:
        report = watch.report(instance)
        now_s = loop.time()
        if report is not None or not watch.is_connected:
            heard_s = now_s
        if now_s - heard_s > SILENT_AFTER_S:
            raise CommandFailed(
                f"{instance} fell silent before it was done: it was killed, or hangs; its "
                "requests go on elsewhere, see `banyan status`"
            )
        if deadline_s is not None and now_s >= deadline_s:
            raise CommandFailed(
                f"{instance} has not ended after {timeout_s:g} s{_left(report)}; it goes on to "
                "drain, see `banyan status --watch`"
            )
        show(f"{instance} drains{_left(report)}")
        left_s = SILENT_AFTER_S if deadline_s is None else deadline_s - now_s
        await watch.changed(min(SILENT_AFTER_S, max(0.0, left_s)))
    if exited.exit_code is None and instance in address.pids:
        show(f"{instance} has drained, its process ends")
        exited = await _with_exit_code(watch, exited)
    return exited.exit_code


async def _with_exit_code(watch: _Watch, exited: InstanceExited) -> InstanceExited:
    """What the supervisor says, or the goodbye itself if that does not come in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE_S):
            while exited.exit_code is None:
                await watch.changed(GOODBYE_S)
                exited = watch.exit_of(exited.instance) or exited
    return exited


@contextlib.contextmanager
def _shown(console: Console, *, is_quiet: bool) -> Iterator[Callable[[str], None]]:
    """What says on a terminal how far it is."""
    if is_quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("draining") as status:
        yield status.update


def _left(report: Report | None) -> str:
    left = None if report is None else num_left(report)
    return "" if left is None else f", {_counted(left)} left"


def _counted(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"


def _told(outcome: DrainOutcome) -> str:
    if not outcome.has_ended:
        left = "" if outcome.num_left is None else f" ({_counted(outcome.num_left)} there)"
        return f"{outcome.instance} drains{left}; `banyan status --watch` shows how far it is"
    code = "" if outcome.exit_code is None else f" with exit code {outcome.exit_code}"
    return f"{outcome.instance} has drained and ended{code}"


def _user() -> str:
    """Who asks, for the log of the instance."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())
