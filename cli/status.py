"""``banyan status``: what every instance says about itself, heard on the bus."""

import asyncio
import contextlib
from typing import TextIO

import msgspec
from rich.console import Console
from rich.live import Live

from cli.bus import BusAddress, connected
from cli.census import Census, Report
from cli.errors import CommandFailed
from cli.status_view import SuiteView, as_data, as_renderable
from shared.bus.nats import NatsBus
from shared.errors import BusError
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import WorkerReport
from shared.messages.placement import GetPlacement, Placement

LISTEN_S = 0.7
"""Longer than the period of any report."""
REFRESH_S = 0.5
PLACEMENT_TIMEOUT_S = 0.5
PIPE_WIDTH = 300


def run_status(address: BusAddress, *, as_json: bool, watch: bool, output: TextIO) -> int:
    """Listen and print; returns the exit code.

    Raises ``CommandFailed`` if nobody says anything; as JSON that is an empty list and exit code 1.
    """
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(_status(address, as_json=as_json, watch=watch, output=output))
    return 0


async def _status(address: BusAddress, *, as_json: bool, watch: bool, output: TextIO) -> int:
    async with connected(address, "banyan status") as bus:
        listener = Listener(bus, address)
        await listener.start()
        await asyncio.sleep(LISTEN_S)
        view = await listener.view()
        if not watch:
            _print(view, as_json=as_json, output=output)
            if not view.reports and not as_json:
                raise CommandFailed(_why_nobody(address))
            return 0 if view.reports else 1
        if as_json:
            while True:
                _print(await listener.view(), as_json=True, output=output)
                await asyncio.sleep(REFRESH_S)
        console = Console(file=output)
        with Live(console=console, auto_refresh=False, screen=False) as live:
            while True:
                live.update(as_renderable(await listener.view(), _width(console)), refresh=True)
                await asyncio.sleep(REFRESH_S)


class Listener:
    """Hears every report; asks the placer when other workers are there than before."""

    def __init__(self, bus: NatsBus, address: BusAddress) -> None:
        self._bus = bus
        self._address = address
        self._census = Census()
        self._loop = asyncio.get_running_loop()
        self._placements: dict[str, Placement] = {}
        self._placed: frozenset[str] = frozenset()

    async def start(self) -> None:
        """Begin to listen."""
        await self._bus.subscribe(subjects.all_load(), self._hear)

    async def view(self) -> SuiteView:
        """What is known now."""
        reports = self._census.reports(self._loop.time())
        await self._ask_placer(reports)
        return SuiteView(
            address=self._address,
            reports=reports,
            placements=self._placements,
            is_connected=self._bus.is_connected,
        )

    async def _hear(self, message: Message, subject: str) -> None:
        self._census.hear(message, self._loop.time())

    async def _ask_placer(self, reports: list[Report]) -> None:
        workers = [report for report in reports if isinstance(report, WorkerReport)]
        present = frozenset(worker.instance for worker in workers)
        if present == self._placed:
            return
        try:
            for model in sorted({worker.model for worker in workers}):
                self._placements[model] = await self._bus.request(
                    subjects.placement(),
                    GetPlacement(model=model),
                    Placement,
                    timeout_s=PLACEMENT_TIMEOUT_S,
                )
        except BusError:  # without a placer every worker runs all layers
            self._placements.clear()
        else:
            self._placed = present


def _width(console: Console) -> int | None:
    """Columns there is room for; a pipe or a file takes all."""
    return console.width if console.is_terminal else None


def _print(view: SuiteView, *, as_json: bool, output: TextIO) -> None:
    if as_json:
        output.write(msgspec.json.encode(as_data(view)).decode() + "\n")
        output.flush()
        return
    console = Console(file=output)
    if not console.is_terminal:
        console = Console(file=output, width=PIPE_WIDTH)
    if view.reports:
        console.print(as_renderable(view, _width(console)))


def _why_nobody(address: BusAddress) -> str:
    if address.log_dir is not None:
        hint = f"the logs in {address.log_dir} say why"
        if not address.is_ready:
            hint = f"the suite still starts, and {hint} if it does not come"
        return f"the bus at {address.nats_url} answers, but no service reports: {hint}"
    return (
        f"the bus at {address.nats_url} answers, but no service reports: see that the services run "
        "with this address in BANYAN_NATS_URL"
    )
