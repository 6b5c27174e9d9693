"""What the gateway must know of the rest of the suite: whether anybody serves the model."""

import asyncio
from collections.abc import Callable

from services.gateway.config import GatewaySettings
from shared.bus.base import Bus
from shared.clock import Clock
from shared.core.membership import Membership
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited, InstanceState, ServiceReport, WorkerReport

TICK_S = 0.2


class Suite:
    """Hears the reports of schedulers and workers; answers the readiness probe."""

    def __init__(
        self, settings: GatewaySettings, clock: Clock, on_max_model_len: Callable[[int], None]
    ) -> None:
        self._model = settings.served_model_name
        self._clock = clock
        self._on_max_model_len = on_max_model_len
        self._workers = Membership(ttl_s=settings.instance_ttl_s)
        self._leaders = Membership(ttl_s=settings.instance_ttl_s)

    async def start(self, bus: Bus) -> None:
        """Begin to listen."""
        bus.add_reconnect_listener(self._on_reconnect)
        for role in ("prefill", "decode", "scheduler"):
            await bus.subscribe(subjects.load_of_role(role), self._on_report)

    async def run(self) -> None:
        """Notice who falls silent. Runs until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.now_s()
            self._workers.expired(now_s)
            self._leaders.expired(now_s)

    async def _on_reconnect(self) -> None:
        self._workers.on_reconnect(self._clock.now_s())
        self._leaders.on_reconnect(self._clock.now_s())

    def missing(self) -> str | None:
        """Why the model cannot be served now, or ``None``."""
        if not self._leaders.instances:
            return "no scheduler leads"
        if not self._workers.instances:
            return "no prefill or decode worker is up"
        return None

    async def _on_report(self, message: Message, subject: str) -> None:
        now_s = self._clock.now_s()
        match message:
            case WorkerReport(model=self._model, state=InstanceState.READY):
                if self._workers.on_report(message.instance, message.sequence, now_s):
                    self._on_max_model_len(message.max_model_len)
            case ServiceReport(role="scheduler", model=self._model):
                if message.gauges.get("is_leader"):
                    self._leaders.on_report(message.instance, message.sequence, now_s)
                else:
                    self._leaders.remove(message.instance)
            case InstanceExited():
                self._workers.remove(message.instance)
                self._leaders.remove(message.instance)
