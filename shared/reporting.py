"""Joining the suite: the bus of a service process, and its regular report about itself."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from shared.bus.base import Bus
from shared.bus.nats import NatsBus
from shared.config import ServiceSettings
from shared.errors import BusError
from shared.messages import CODEC, subjects
from shared.messages.base import Message, expect
from shared.messages.load import Drain, InstanceExited, InstanceState, ServiceReport
from shared.messages.requests import Done
from shared.runtime import Release, Runtime

log = logging.getLogger(__name__)

SERVICE_REPORT_PERIOD_S = 0.5


OpenBus = Callable[[ServiceSettings, Runtime], Awaitable[Bus]]
"""How a service gets its bus: ``connect_bus``, or a test's own."""


async def connect_bus(settings: ServiceSettings, runtime: Runtime) -> Bus:
    """The process's connection to the bus, closed by the runtime after all work is done."""
    password = settings.nats_password
    bus = NatsBus(
        CODEC,
        settings.nats_url,
        user=settings.nats_user,
        password=password.get_secret_value() if password is not None else None,
        name=settings.instance,
    )
    runtime.on_release(Release.BUS, "bus", bus.close)
    await bus.connect()
    runtime.health.add_readiness_check(
        "bus", lambda: None if bus.is_connected else "not connected to the bus"
    )
    await serve_drain(bus, runtime)
    return bus


async def serve_drain(bus: Bus, runtime: Runtime) -> None:
    """Have operators drain this process over the bus, as SIGTERM does."""

    async def drain(message: Message) -> Message:
        runtime.stop(f"drain: {expect(message, Drain).reason}")
        return Done(count=1)

    await bus.serve(subjects.control(runtime.instance, "drain"), drain)


class Reporter:
    """Publishes a service's report every ``period_s`` until it leaves."""

    def __init__(
        self,
        bus: Bus,
        *,
        role: str,
        instance: str,
        model: str = "",
        gauges: Callable[[], Mapping[str, float]] = dict,
        labels: Callable[[], Mapping[str, str]] = dict,
        period_s: float = SERVICE_REPORT_PERIOD_S,
    ) -> None:
        self._bus = bus
        self._role = role
        self._instance = instance
        self._model = model
        self._gauges = gauges
        self._labels = labels
        self._period_s = period_s
        self._sequence = 0
        self._state = InstanceState.READY

    async def run(self) -> None:
        """Report until cancelled; while the bus is away reports are skipped."""
        while True:
            await self.publish()
            await asyncio.sleep(self._period_s)

    async def publish(self) -> None:
        """Report once, now."""
        self._sequence += 1
        await self._send(
            ServiceReport(
                role=self._role,
                instance=self._instance,
                sequence=self._sequence,
                state=self._state,
                model=self._model,
                gauges=dict(self._gauges()),
                labels=dict(self._labels()),
            )
        )

    async def drain(self) -> None:
        """Report that no new work is taken."""
        self._state = InstanceState.DRAINING
        await self.publish()

    async def leave(self) -> None:
        """Say that this instance is gone for good."""
        await self._send(InstanceExited(role=self._role, instance=self._instance))

    async def _send(self, message: Message) -> None:
        try:
            await self._bus.publish(subjects.load(self._role, self._instance), message)
        except BusError as error:
            log.debug("report not sent: %s", error)
