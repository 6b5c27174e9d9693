"""What the scheduler knows of the instances: who is alive and how loaded they say they are."""

from dataclasses import dataclass

from shared.core.membership import Membership
from shared.messages.load import InstanceState, WorkerReport

SERVING_ROLES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One worker: its latest report and what was given to it since.

    ``num_assigned`` counts the requests the scheduler has there now, ``new_blocks`` the KV blocks
    of those it gave after the report was made, ``num_batches`` the prefill batches not finished.
    """

    report: WorkerReport
    num_assigned: int = 0
    new_blocks: int = 0
    num_batches: int = 0

    @property
    def instance(self) -> str:
        """Its name, unique to one run of its process."""
        return self.report.instance

    @property
    def free_blocks(self) -> int:
        """Blocks free now, as far as is known."""
        return max(0, self.report.num_free_blocks - self.new_blocks)

    @property
    def utilisation(self) -> float:
        """``U_d = C_d/C_max + M_d/M_max`` (BanaServe, arXiv 2510.13223), 0..2."""
        memory = 1.0 - self.free_blocks / max(1, self.report.num_blocks)
        return self.report.compute_utilisation + memory

    @property
    def is_ready(self) -> bool:
        """Whether it takes new work."""
        return self.report.state is InstanceState.READY


class Cluster:
    """Live workers and gateways, from their reports. Pure; told the time."""

    def __init__(self, *, ttl_s: float) -> None:
        self.membership = Membership(ttl_s=ttl_s)
        self._reports: dict[str, WorkerReport] = {}
        self._roles: dict[str, str] = {}
        self._new_blocks: dict[str, int] = {}

    def on_worker_report(self, report: WorkerReport, now_s: float) -> bool:
        """Take a report; returns whether the worker has joined by it."""
        joined = self.membership.on_report(report.instance, report.sequence, now_s)
        if joined is None:
            return False
        self._reports[report.instance] = report
        self._roles[report.instance] = report.role
        self._new_blocks[report.instance] = 0
        return joined

    def on_service_report(self, role: str, instance: str, sequence: int, now_s: float) -> None:
        """Take the report of a gateway or any other service."""
        if self.membership.on_report(instance, sequence, now_s) is not None:
            self._roles[instance] = role

    def on_assigned(self, instance: str, num_blocks: int) -> None:
        """Blocks were reserved at ``instance`` after its latest report."""
        if instance in self._new_blocks:
            self._new_blocks[instance] += num_blocks

    def on_blocks_refused(self, instance: str) -> None:
        """``instance`` had no blocks left: count it as full until it reports again."""
        report = self._reports.get(instance)
        if report is not None:
            self._new_blocks[instance] = report.num_free_blocks

    def remove(self, instance: str) -> str | None:
        """The instance is gone; returns its role if it was known to be alive."""
        self._reports.pop(instance, None)
        self._new_blocks.pop(instance, None)
        role = self._roles.pop(instance, None)
        return role if self.membership.remove(instance) else None

    def expired(self, now_s: float) -> list[tuple[str, str]]:
        """Remove and return ``(role, instance)`` of those that fell silent."""
        dead = []
        for instance in self.membership.expired(now_s):
            role = self._roles.pop(instance, "")
            self._reports.pop(instance, None)
            self._new_blocks.pop(instance, None)
            dead.append((role, instance))
        return dead

    def is_alive(self, instance: str) -> bool:
        """Whether the instance has reported lately."""
        return instance in self.membership

    def role_of(self, instance: str) -> str | None:
        """The role of a live instance."""
        return self._roles.get(instance)

    def instances_of(self, role: str) -> tuple[str, ...]:
        """Live instances of ``role``."""
        return tuple(name for name, r in self._roles.items() if r == role)

    def workers(
        self, *, num_assigned: dict[str, int], num_batches: dict[str, int]
    ) -> tuple[Worker, ...]:
        """All live workers with what they were given."""
        return tuple(
            Worker(
                report=report,
                num_assigned=num_assigned.get(name, 0),
                new_blocks=self._new_blocks.get(name, 0),
                num_batches=num_batches.get(name, 0),
            )
            for name, report in self._reports.items()
        )
