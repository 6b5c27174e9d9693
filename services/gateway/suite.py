"""What the gateway must know of the rest of the suite: whether anybody serves the model."""

from collections.abc import Callable

from services.gateway.config import GatewaySettings
from shared.bus.base import Bus
from shared.clock import Clock
from shared.core.membership import Membership
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import InstanceExited, InstanceState, ServiceReport, WorkerReport


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
        for role in ("prefill", "decode", "scheduler"):
            await bus.subscribe(subjects.load_of_role(role), self._on_report)

    def missing(self) -> str | None:
        """Why the model cannot be served now, or ``None``."""
        now_s = self._clock.now_s()
        self._workers.expired(now_s)
        self._leaders.expired(now_s)
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
