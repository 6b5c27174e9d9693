"""The state of a suite for people, as a table, and for programs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.bus import BusAddress
from cli.census import Report, leaders_of
from shared.messages.load import InstanceState, ServiceReport, WorkerReport
from shared.messages.placement import Placement

PADDING = 1
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, kw_only=True)
class SuiteView:
    """Everything there is to show. ``placements`` are by model."""

    address: BusAddress
    reports: Sequence[Report]
    placements: Mapping[str, Placement] = field(default_factory=dict)
    is_connected: bool = True

    def layers_of(self, report: WorkerReport) -> list[tuple[int, int]]:
        """The runs ``[lo, hi)`` of layers that the worker has; all of them if no placer says."""
        placement = self.placements.get(report.model)
        if placement is not None:
            found = {
                (stage.lo, stage.hi)
                for chain in placement.chains
                for stage in chain
                if stage.instance == report.instance
            }
            if found:
                return sorted(found)
        return [(0, report.num_layers)] if report.num_layers else []


@dataclass(frozen=True, kw_only=True)
class KVUse:
    """KV in one instance: blocks of a worker's pool, or of a store, which has no count of them."""

    used_bytes: int
    capacity_bytes: int
    used_blocks: int
    capacity_blocks: int | None

    @property
    def share(self) -> float:
        """0..1; of the bytes, or of the blocks where their size is not known."""
        if self.capacity_bytes:
            return self.used_bytes / self.capacity_bytes
        return self.used_blocks / self.capacity_blocks if self.capacity_blocks else 0.0


def kv_use(report: Report) -> KVUse | None:
    """The KV that an instance holds, ``None`` of one that holds none."""
    if isinstance(report, WorkerReport):
        used_blocks = report.num_blocks - report.num_free_blocks
        block_bytes = report.kv_bytes_per_token * report.block_size
        return KVUse(
            used_bytes=used_blocks * block_bytes,
            capacity_bytes=report.num_blocks * block_bytes,
            used_blocks=used_blocks,
            capacity_blocks=report.num_blocks,
        )
    gauges = report.gauges
    if "used_bytes" not in gauges or not gauges.get("capacity_bytes"):
        return None
    return KVUse(
        used_bytes=int(gauges["used_bytes"]),
        capacity_bytes=int(gauges["capacity_bytes"]),
        used_blocks=int(gauges.get("num_blocks", 0.0)),
        capacity_blocks=None,
    )


# For programs


def as_data(view: SuiteView) -> dict[str, Any]:
    """The reports as they came, with the KV and layers of each, and who leads."""
    leaders = leaders_of(view.reports)
    return {
        "url": view.address.url,
        "nats_url": view.address.nats_url,
        "is_connected": view.is_connected,
        "leader": max(leaders, key=lambda leader: leader.epoch).instance if leaders else None,
        "leaders": [
            {"model": leader.model, "instance": leader.instance, "epoch": leader.epoch}
            for leader in leaders
        ],
        "instances": [_plain(report, view) for report in view.reports],
    }


def _plain(report: Report, view: SuiteView) -> dict[str, Any]:
    data = {name: getattr(report, name) for name in report.__struct_fields__}
    use = kv_use(report)
    if use is not None:
        data["kv"] = {
            "used_bytes": use.used_bytes,
            "capacity_bytes": use.capacity_bytes,
            "used_blocks": use.used_blocks,
            "capacity_blocks": use.capacity_blocks,
            "share": round(use.share, 4),
        }
    if isinstance(report, WorkerReport):
        data["layers"] = [list(run) for run in view.layers_of(report)]
    return data


# For people


@dataclass(frozen=True)
class _Column:
    """``rank``: the highest goes first where there is too little room, 0 always stays."""

    heading: str
    cell: Callable[[Report, SuiteView], str]
    rank: int = 0
    is_number: bool = False


def as_renderable(view: SuiteView, width: int | None = None) -> Group:
    """A summary and a table no wider than ``width``; ``None`` shows every column."""
    return Group(*(Text(line, style="bold") for line in _summary(view)), as_table(view, width))


def as_table(view: SuiteView, width: int | None = None) -> Table:
    """A row an instance, as many columns as there is room for; empty ones are left out."""
    cells = {
        column.heading: [column.cell(report, view) for report in view.reports]
        for column in _COLUMNS
    }
    columns = [column for column in _COLUMNS if not column.rank or any(cells[column.heading])]
    while width is not None and _width(columns, cells) > width:
        least = max(columns, key=lambda column: column.rank)
        if not least.rank:
            break
        columns.remove(least)
    table = Table(box=None, padding=(0, PADDING, 0, 0))
    for column in columns:
        table.add_column(
            column.heading, justify="right" if column.is_number else "left", no_wrap=True
        )
    for number, report in enumerate(view.reports):
        style = "yellow" if report.state is InstanceState.DRAINING else None
        table.add_row(*(cells[column.heading][number] for column in columns), style=style)
    return table


def _width(columns: Sequence[_Column], cells: Mapping[str, Sequence[str]]) -> int:
    return sum(
        max(map(len, (column.heading, *cells[column.heading]))) + PADDING for column in columns
    )


def _summary(view: SuiteView) -> list[str]:
    """Where, and how much is asked of it."""
    where = view.address.url or view.address.nats_url
    if not view.is_connected:
        return [f"{where}   the bus is away, waiting for it"]
    state = "" if view.address.is_ready else "   still starts"
    speed = sum(r.tokens_per_s for r in view.reports if isinstance(r, WorkerReport))
    lines = [f"{where}{state}   {speed:.0f} tokens/s"]
    leaders = leaders_of(view.reports)
    for leader in leaders:
        lines.append(f"{leader.model}: {leader.instance} leads, epoch {leader.epoch}")
    if not leaders:
        lines.append("no scheduler leads")
    lines.append(_requests(view.reports))
    return lines


def _requests(reports: Sequence[Report]) -> str:
    services = [report for report in reports if isinstance(report, ServiceReport)]
    workers = [report for report in reports if isinstance(report, WorkerReport)]

    def total(role: str, gauge: str) -> str:
        return f"{sum(r.gauges.get(gauge, 0.0) for r in services if r.role == role):.0f}"

    return (
        f"requests: {total('gateway', 'num_live')} live, "
        f"{total('scheduler', 'num_waiting')} queued, "
        f"{sum(worker.num_running for worker in workers)} in a batch; "
        f"{total('gateway', 'total_finished')} finished, "
        f"{total('gateway', 'total_failed')} failed, "
        f"{total('gateway', 'total_cancelled')} cancelled"
    )


def _role(report: Report, view: SuiteView) -> str:
    """Left out where the instance's name says it."""
    return "" if report.instance.startswith(report.role) else report.role


def _state(report: Report, view: SuiteView) -> str:
    if any(leader.instance == report.instance for leader in leaders_of(view.reports)):
        return "leads"
    if report.role == "scheduler" and report.state is InstanceState.READY:
        return "standby"
    return report.state.value


def _layers(report: Report, view: SuiteView) -> str:
    if not isinstance(report, WorkerReport):
        return ""
    return " ".join(f"{lo}:{hi}" for lo, hi in view.layers_of(report))


def _queued(report: Report, view: SuiteView) -> str:
    if isinstance(report, WorkerReport):
        return str(report.num_waiting + report.num_reserved)
    waiting = report.gauges.get("num_waiting")
    return "" if waiting is None else f"{waiting:.0f}"


def _running(report: Report, view: SuiteView) -> str:
    if isinstance(report, WorkerReport):
        return str(report.num_running + report.num_held)
    live = report.gauges.get("num_live")
    return "" if live is None else f"{live:.0f}"


def _kv_share(report: Report, view: SuiteView) -> str:
    use = kv_use(report)
    return "" if use is None else f"{use.share:.0%}"


def _kv_bytes(report: Report, view: SuiteView) -> str:
    use = kv_use(report)
    if use is None or not use.capacity_bytes:
        return ""
    return f"{in_bytes(use.used_bytes)}/{in_bytes(use.capacity_bytes)}"


def _kv_blocks(report: Report, view: SuiteView) -> str:
    use = kv_use(report)
    if use is None:
        return ""
    capacity = "" if use.capacity_blocks is None else f"/{use.capacity_blocks}"
    return f"{use.used_blocks}{capacity}"


def _of_worker(text: Callable[[WorkerReport], str]) -> Callable[[Report, SuiteView], str]:
    return lambda report, view: text(report) if isinstance(report, WorkerReport) else ""


def _transport(report: Report, view: SuiteView) -> str:
    if isinstance(report, WorkerReport):
        return report.transport
    return report.labels.get("transport", "")


_COLUMNS = (
    _Column("role", _role, rank=4),
    _Column("instance", lambda report, view: report.instance),
    _Column("state", _state),
    _Column("layers", _layers, rank=3),
    _Column("queue", _queued, is_number=True),
    _Column("running", _running, is_number=True),
    _Column("KV", _kv_share, is_number=True),
    _Column("KV bytes", _kv_bytes, rank=2, is_number=True),
    _Column("KV blocks", _kv_blocks, rank=7, is_number=True),
    _Column("busy", _of_worker(lambda w: f"{w.compute_utilisation:.0%}"), rank=6, is_number=True),
    _Column("tok/s", _of_worker(lambda w: f"{w.tokens_per_s:.0f}"), rank=1, is_number=True),
    _Column("step ms", _of_worker(lambda w: f"{w.step_s * 1e3:.1f}"), rank=8, is_number=True),
    _Column("transport", _transport, rank=9),
    _Column("device", _of_worker(lambda w: f"{w.device} {w.dtype}".strip()), rank=5),
)


def in_bytes(count: float) -> str:
    """A number of bytes for people, to two or three digits: ``1.2 GB`` is ``1.2GB``."""
    units = iter(_UNITS)
    unit = next(units)
    while count >= 999.5 and unit != _UNITS[-1]:
        count, unit = count / 1000, next(units)
    return f"{count:.1f}{unit}" if 0 < count < 9.95 and unit != "B" else f"{count:.0f}{unit}"
