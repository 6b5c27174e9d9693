"""What a new leader finds: the attempts that instances already hold. Pure bookkeeping."""

from dataclasses import dataclass, field

from shared.core.request import RequestKey
from shared.messages.workers import HeldRequest, RequestStage, WorkerSnapshot


@dataclass(slots=True)
class FoundAttempt:
    """One attempt as the instances' snapshots show it together."""

    gateway: str
    prefill: str = ""
    decode: str = ""
    reserved_at: str = ""
    has_handed_over: bool = False

    @property
    def is_running(self) -> bool:
        """Whether somebody computes it; a mere reservation is not running."""
        return bool(self.prefill or self.has_handed_over)


@dataclass(slots=True)
class Findings:
    """All snapshots of one takeover. ``silent`` are the live workers that did not answer."""

    attempts: dict[RequestKey, FoundAttempt] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def add(self, snapshot: WorkerSnapshot) -> None:
        """Take one worker's answer."""
        for held in snapshot.requests:
            self._add(snapshot.instance, held)

    def _add(self, instance: str, held: HeldRequest) -> None:
        key = RequestKey(held.request_id, held.attempt)
        found = self.attempts.setdefault(key, FoundAttempt(held.gateway))
        if held.stage is RequestStage.RESERVED:
            found.reserved_at = instance
            found.decode = found.decode or instance
        elif held.stage in (RequestStage.PREFILL, RequestStage.SENDING):
            found.prefill = instance
            found.decode = held.peer or instance
        elif held.stage is RequestStage.DECODE or not found.is_running:
            found.decode = instance
            found.prefill = found.prefill or instance
            found.has_handed_over = True

    def take_running(self, key: RequestKey) -> FoundAttempt | None:
        """The attempt, if somebody computes it; it is claimed by its gateway from now on."""
        found = self.attempts.get(key)
        if found is None or not found.is_running:
            return None
        return self.attempts.pop(key)

    def take_reservation(self, key: RequestKey) -> str:
        """Where a mere reservation of this attempt lies, or an empty string."""
        found = self.attempts.get(key)
        if found is None or found.is_running:
            return ""
        del self.attempts[key]
        return found.reserved_at
