"""The scheduler process: hears every report, stands for leader, serves terms."""

import asyncio
import logging

from services.scheduler.cluster import Cluster
from services.scheduler.config import SchedulerSettings
from services.scheduler.counters import SchedulerCounters
from services.scheduler.term import Term
from shared.bus.base import Bus
from shared.bus.leader import LeaderElection
from shared.clock import Clock, MonotonicClock
from shared.core.policies import create_policy
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited, ServiceReport, WorkerReport
from shared.reporting import OpenBus, Reporter, connect_bus
from shared.runtime import Runtime, Service

log = logging.getLogger(__name__)

TICKS_PER_TTL = 10


class SchedulerService(Service):
    """Leads or stands by; a standby hears all reports, so that it can take over at once."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        open_bus: OpenBus = connect_bus,
        clock: Clock | None = None,
    ) -> None:
        self._open_bus = open_bus
        create_policy(settings.policy)  # a wrong name is a wrong setting, known at start
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._cluster = Cluster(ttl_s=settings.instance_ttl_s)
        self._term: Term | None = None

    async def start(self, runtime: Runtime) -> None:
        """Join the bus, hear the reports, stand for leader."""
        settings = self._settings
        self._runtime = runtime
        self._counters = SchedulerCounters(runtime.metrics)
        self._bus: Bus = await self._open_bus(settings, runtime)
        self._bus.add_reconnect_listener(self._on_reconnect)
        self._listening_since_s = self._clock.now_s()
        await self._bus.subscribe(subjects.all_load(), self._on_report)
        await self._bus.subscribe(subjects.all_request_events(), self._on_event)
        store = await self._bus.lease_store(settings.lease_ttl_s)
        self._election = LeaderElection(
            self._bus,
            store,
            key=f"scheduler.{subjects.token(settings.served_model_name)}",
            candidate=settings.instance,
            on_elected=self._lead,
            on_deposed=self._on_deposed,
            clock=self._clock,
        )
        self._reporter = Reporter(
            self._bus,
            role="scheduler",
            instance=settings.instance,
            model=settings.served_model_name,
            gauges=self._gauges,
            labels=lambda: {"policy": settings.policy},
        )
        self._election_task = runtime.spawn(self._election.run(), name="election")
        runtime.spawn(self._reporter.run(), name="reports")
        runtime.spawn(self._judge(), name="membership")

    async def stop_intake(self) -> None:
        """Give up the lead, so that a standby takes over without waiting for the lease."""
        await self._reporter.leave()
        self._election_task.cancel()
        await asyncio.wait([self._election_task], timeout=self._settings.command_timeout_s)

    async def drain(self, deadline_s: float) -> None:
        """Nothing is in flight here: requests belong to gateways, their work to the workers."""

    def _gauges(self) -> dict[str, float]:
        term = self._term
        waiting = term.dispatcher.policy.num_waiting if term is not None else 0
        self._counters.waiting.set(waiting)
        self._counters.is_leader.set(float(term is not None))
        return {
            "is_leader": float(term is not None),
            "leader_epoch": float(term.epoch if term is not None else 0),
            "num_waiting": float(waiting),
            "num_live": float(len(term.table) if term is not None else 0),
        }

    async def _lead(self, epoch: int) -> None:
        """Serve one term; cancelled when it is over."""
        self._term = Term(
            epoch=epoch,
            election=self._election,
            bus=self._bus,
            cluster=self._cluster,
            settings=self._settings,
            clock=self._clock,
            counters=self._counters,
            listening_since_s=self._listening_since_s,
        )
        await self._reporter.publish()
        try:
            await self._term.run()
        finally:
            self._term = None

    async def _on_deposed(self) -> None:
        log.warning("this scheduler does not lead any more")

    async def _on_reconnect(self) -> None:
        self._cluster.membership.on_reconnect(self._clock.now_s())

    async def _on_report(self, message: Message, subject: str) -> None:
        now_s = self._clock.now_s()
        match message:
            case WorkerReport():
                if message.model != self._settings.served_model_name:
                    return
                joined = self._cluster.on_worker_report(message, now_s)
                if self._term is not None:
                    self._term.on_report(message.instance, joined=joined)
            case ServiceReport():
                self._cluster.on_service_report(
                    message.role, message.instance, message.sequence, now_s
                )
            case InstanceExited():
                if self._cluster.remove(message.instance) is not None:
                    self._gone(message.role, message.instance, "exited")

    async def _on_event(self, message: Message, subject: str) -> None:
        if self._term is not None:
            self._term.on_event(message)

    async def _judge(self) -> None:
        """Find those that fell silent; a tick late by itself judges nobody (Membership)."""
        while True:
            await asyncio.sleep(self._settings.instance_ttl_s / TICKS_PER_TTL)
            if not self._bus.is_connected:  # nobody can be heard, so nobody is silent
                self._cluster.membership.on_reconnect(self._clock.now_s())
            for role, instance in self._cluster.expired(self._clock.now_s()):
                self._gone(role, instance, "fell silent")

    def _gone(self, role: str, instance: str, reason: str) -> None:
        log.warning("%s %s %s", role, instance, reason)
        if self._term is not None:
            self._term.on_instance_gone(role, instance, reason)
