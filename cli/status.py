"""``banyan status``: what every instance says about itself, heard on the bus."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TextIO

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cli.errors import CommandFailed
from cli.state import SuiteState, find_suite
from shared.bus.nats import NatsBus
from shared.errors import BusDisconnected
from shared.messages import CODEC, subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited, ServiceReport, WorkerReport

LISTEN_S = 0.7
"""Longer than the period of any report."""
REFRESH_S = 0.5
SILENT_AFTER_S = 2.0
CONNECT_TIMEOUT_S = 3.0

Report = WorkerReport | ServiceReport


@dataclass(frozen=True, kw_only=True)
class BusAddress:
    """Where the bus is, and as whom to connect; ``url`` is the gateway's, if that is known."""

    nats_url: str
    user: str | None
    password: str | None
    url: str | None = None


class Census:
    """The latest report of every instance; those that fell silent or left are forgotten."""

    def __init__(self, silent_after_s: float = SILENT_AFTER_S) -> None:
        self._silent_after_s = silent_after_s
        self._heard: dict[str, tuple[float, Report]] = {}

    def hear(self, message: Message, now_s: float) -> None:
        """Take in what came on ``load.*.*``."""
        match message:
            case WorkerReport() | ServiceReport():
                self._heard[message.instance] = (now_s, message)
            case InstanceExited():
                self._heard.pop(message.instance, None)

    def reports(self, now_s: float) -> list[Report]:
        """By role and name."""
        recent = [
            report for at_s, report in self._heard.values() if now_s - at_s < self._silent_after_s
        ]
        return sorted(recent, key=lambda report: (report.role, report.instance))


def leader_of(reports: list[Report]) -> str | None:
    """The scheduler that leads; of two that both say so, the one with the later epoch."""
    leaders = [
        (report.gauges.get("leader_epoch", 0.0), report.instance)
        for report in reports
        if isinstance(report, ServiceReport) and report.gauges.get("is_leader")
    ]
    return max(leaders)[1] if leaders else None


def find_bus(url: str | None) -> BusAddress:
    """The bus of the environment (``BANYAN_NATS_URL`` …), else that of the suite running here.

    Raises ``CommandFailed`` if there is neither.
    """
    nats_url = os.environ.get("BANYAN_NATS_URL")
    if nats_url:
        return BusAddress(
            nats_url=nats_url,
            user=os.environ.get("BANYAN_NATS_USER") or None,
            password=os.environ.get("BANYAN_NATS_PASSWORD") or None,
            url=url,
        )
    suite: SuiteState | None = find_suite(url)
    if suite is None:
        where = f" with a gateway at {url}" if url else ""
        raise CommandFailed(
            f"no suite runs here{where}: start one with `make up` (or `banyan up`), or name the "
            "bus of another one in BANYAN_NATS_URL, BANYAN_NATS_USER and BANYAN_NATS_PASSWORD"
        )
    return BusAddress(
        nats_url=suite.nats_url,
        user=suite.nats_user,
        password=suite.nats_password,
        url=suite.url,
    )


def run_status(url: str | None, *, as_json: bool, watch: bool, output: TextIO) -> int:
    """Listen and print; returns the exit code, 1 if nobody said anything."""
    logging.getLogger("shared.bus").setLevel(logging.CRITICAL)  # the command itself says it
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(_status(find_bus(url), as_json=as_json, watch=watch, output=output))
    return 0


async def _status(address: BusAddress, *, as_json: bool, watch: bool, output: TextIO) -> int:
    loop = asyncio.get_running_loop()
    census = Census()

    async def hear(message: Message, subject: str) -> None:
        census.hear(message, loop.time())

    async with _connected(address) as bus:
        await bus.subscribe(subjects.all_load(), hear)
        await asyncio.sleep(LISTEN_S)
        reports = census.reports(loop.time())
        if not watch:
            _print(address, reports, as_json=as_json, output=output)
            return 0 if reports else 1
        if as_json:
            while True:
                _print(address, census.reports(loop.time()), as_json=True, output=output)
                await asyncio.sleep(REFRESH_S)
        with Live(console=Console(file=output), auto_refresh=False, screen=False) as live:
            while True:
                live.update(as_table(address, census.reports(loop.time())), refresh=True)
                await asyncio.sleep(REFRESH_S)


@contextlib.asynccontextmanager
async def _connected(address: BusAddress) -> AsyncIterator[NatsBus]:
    bus = NatsBus(
        CODEC,
        address.nats_url,
        name="banyan status",
        user=address.user,
        password=address.password,
        connect_timeout_s=CONNECT_TIMEOUT_S,
    )
    try:
        await bus.connect()
    except BusDisconnected as error:
        raise CommandFailed(
            f"the bus at {address.nats_url} does not answer: is the suite still running?"
        ) from error
    try:
        yield bus
    finally:
        await bus.close(timeout_s=0.0)


def _print(address: BusAddress, reports: list[Report], *, as_json: bool, output: TextIO) -> None:
    if as_json:
        output.write(msgspec.json.encode(as_data(address, reports)).decode() + "\n")
        output.flush()
    else:
        Console(file=output).print(as_table(address, reports))


def as_data(address: BusAddress, reports: list[Report]) -> dict[str, Any]:
    """The state of the suite for programs: the reports as they came, and who leads."""
    return {
        "url": address.url,
        "nats_url": address.nats_url,
        "leader": leader_of(reports),
        "instances": [_plain(report) for report in reports],
    }


def _plain(report: Report) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def as_table(address: BusAddress, reports: list[Report]) -> Table:
    """The state of the suite for people."""
    leader = leader_of(reports)
    title = f"{address.url or address.nats_url}   leader: {leader or 'none'}"
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for heading in ("role", "instance", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("queue", "running", "KV", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("transport", "device"):
        table.add_column(heading, no_wrap=True)
    for report in reports:
        table.add_row(*_row(report, leader))
    return table


def _row(report: Report, leader: str | None) -> list[str]:
    state = report.state.value
    if isinstance(report, ServiceReport):
        if report.instance == leader:
            state = "leads"
        waiting = report.gauges.get("num_waiting")
        running = report.gauges.get("num_live")
        used_bytes, capacity_bytes = (
            report.gauges.get(name) for name in ("used_bytes", "capacity_bytes")
        )
        used = used_bytes / capacity_bytes if used_bytes is not None and capacity_bytes else None
        cells = [_number(waiting), _number(running), _share(used), ""]
        return [report.role, report.instance, state, *cells, report.labels.get("transport", ""), ""]
    used = 1.0 - report.num_free_blocks / report.num_blocks if report.num_blocks else None
    cells = [
        _number(report.num_waiting),
        _number(report.num_running),
        _share(used),
        f"{report.tokens_per_s:.0f}",
    ]
    device = f"{report.device} {report.dtype}".strip()
    return [report.role, report.instance, state, *cells, report.transport, device]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
