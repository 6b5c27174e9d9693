"""The placer process: hears the workers, answers where the layers are."""

import asyncio
import logging
import time
from collections.abc import Callable

from services.placer.config import PlacerSettings
from services.placer.topology import Topology
from shared.bus.base import Subscription
from shared.clock import Clock, MonotonicClock
from shared.messages import subjects
from shared.messages.base import Message, expect
from shared.messages.load import InstanceExited, WorkerReport
from shared.messages.placement import GetPlacement
from shared.reporting import OpenBus, Reporter, connect_bus
from shared.runtime import Runtime, Service

log = logging.getLogger(__name__)

QUEUE_GROUP = "placer"
WORKER_ROLES = ("prefill", "decode")
TICKS_PER_TTL = 10


def version_from_wall_clock() -> int:
    """Milliseconds since 1970: above every version of a placer that ran on this host before."""
    return time.time_ns() // 1_000_000


class PlacerService(Service):
    """Keeps the topology and places by it."""

    def __init__(
        self,
        settings: PlacerSettings,
        *,
        open_bus: OpenBus = connect_bus,
        clock: Clock | None = None,
        first_version: Callable[[], int] = version_from_wall_clock,
    ) -> None:
        self._settings = settings
        self._open_bus = open_bus
        self._clock = clock or MonotonicClock()
        self._topology = Topology(ttl_s=settings.instance_ttl_s, first_version=first_version())

    async def start(self, runtime: Runtime) -> None:
        """Join the bus, hear the workers, answer."""
        settings = self._settings
        self._runtime = runtime
        metrics = runtime.metrics
        self._workers = metrics.gauge("placer", "live", "instances", "Workers that are alive")
        self._changes = metrics.counter("placer", "topology_change", "events", "Topology changes")
        self._answered = metrics.counter("placer", "answered", "requests", "Placements given out")
        bus = await self._open_bus(settings, runtime)
        bus.add_reconnect_listener(self._on_reconnect)
        for role in WORKER_ROLES:
            await bus.subscribe(subjects.load_of_role(role), self._on_report)
        self._questions: Subscription = await bus.serve(
            subjects.placement(), self._on_get, queue=QUEUE_GROUP
        )
        self._reporter = Reporter(
            bus, role="placer", instance=settings.instance, gauges=self._gauges
        )
        runtime.spawn(self._judge(), name="membership")
        runtime.spawn(self._reporter.run(), name="reports")

    async def stop_intake(self) -> None:
        """Leave the queue group; what has come is still answered."""
        await self._reporter.drain()
        await self._questions.unsubscribe()

    async def drain(self, deadline_s: float) -> None:
        """Nothing is in flight: an answer is given in one go."""
        await self._reporter.leave()

    def _gauges(self) -> dict[str, float]:
        topology = self._topology
        self._workers.set(len(topology))
        return {
            "num_workers": float(len(topology)),
            "num_models": float(len(topology.models)),
            "placement_version": float(topology.version),
        }

    async def _on_reconnect(self) -> None:
        self._topology.membership.on_reconnect(self._clock.now_s())

    async def _on_report(self, message: Message, subject: str) -> None:
        match message:
            case WorkerReport():
                if self._topology.on_report(message, self._clock.now_s()):
                    self._changed(f"{message.role} {message.instance} is on {message.device}")
            case InstanceExited():
                if self._topology.remove(message.instance):
                    self._changed(f"{message.role} {message.instance} exited")

    async def _judge(self) -> None:
        """Find those that fell silent; a tick late by itself judges nobody (``Membership``)."""
        while True:
            await asyncio.sleep(self._settings.instance_ttl_s / TICKS_PER_TTL)
            for instance in self._topology.expired(self._clock.now_s()):
                self._changed(f"{instance} fell silent")

    def _changed(self, what: str) -> None:
        self._changes.inc()
        log.info("topology %d: %s", self._topology.version, what)

    async def _on_get(self, message: Message) -> Message:
        question = expect(message, GetPlacement)
        self._answered.inc()
        return self._topology.placement(question.model)
