"""What is known of the instances from what they say of themselves. No I/O; told the time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared.messages.base import Message
from shared.messages.load import InstanceExited, InstanceState, ServiceReport, WorkerReport

SILENT_AFTER_S = 2.0
WORKER_ROLES = ("prefill", "decode")

Report = WorkerReport | ServiceReport


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


@dataclass(frozen=True, kw_only=True)
class Leader:
    """The scheduler that leads for ``model``, by the epoch of its lease."""

    model: str
    instance: str
    epoch: int


def leaders_of(reports: Iterable[Report]) -> list[Leader]:
    """Who leads, by model; of two that both say so, the one with the later epoch."""
    latest: dict[str, Leader] = {}
    for report in reports:
        if isinstance(report, ServiceReport) and report.gauges.get("is_leader"):
            epoch = int(report.gauges.get("leader_epoch", 0.0))
            known = latest.get(report.model)
            if known is None or epoch > known.epoch:
                latest[report.model] = Leader(
                    model=report.model, instance=report.instance, epoch=epoch
                )
    return [latest[model] for model in sorted(latest)]


def num_left(report: Report) -> int | None:
    """Requests that the instance still has; ``None`` where that is no question."""
    if isinstance(report, WorkerReport):
        return report.num_running + report.num_waiting + report.num_held + report.num_reserved
    live = report.gauges.get("num_live")
    return None if live is None or report.role != "gateway" else int(live)


def resolve(name: str, reports: Sequence[Report]) -> list[Report]:
    """The instances that ``name`` may mean: the one of that name, else all it is the begin of."""
    exact = [report for report in reports if report.instance == name]
    return exact or [report for report in reports if report.instance.startswith(f"{name}-")]


def only_of_its_kind(report: Report, reports: Iterable[Report]) -> str | None:
    """What the suite lacks without this instance, ``None`` if others can do its work.

    A prefill worker can do what a decode worker does and the other way round. Without predictor,
    placer and KV store everything goes on.
    """
    is_worker = report.role in WORKER_ROLES
    if not is_worker and report.role not in ("gateway", "scheduler"):
        return None
    roles = WORKER_ROLES if is_worker else (report.role,)
    for other in reports:
        is_peer = other.role in roles and other.instance != report.instance
        if is_peer and other.model == report.model and other.state is InstanceState.READY:
            return None
    return "worker" if is_worker else report.role
