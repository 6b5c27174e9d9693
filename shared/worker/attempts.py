"""The attempts a worker holds, and the fence against commands of the past. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from shared.core.request import Request, RequestKey
from shared.errors import StaleCommand
from shared.messages.workers import HeldRequest, KVTarget, RequestStage


@dataclass(slots=True)
class Attempt:
    """One attempt at this worker.

    ``target``: where its KV goes after the prefill (``None``: it is served to its end here), or,
    while ``RESERVED``, this worker's own reservation.
    """

    request: Request
    gateway: str
    stage: RequestStage
    target: KVTarget | None = None
    peer: str = ""
    batch_id: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens that the prefill found cached, where the prefill was elsewhere."""

    @property
    def key(self) -> RequestKey:
        """Identity of the attempt."""
        return self.request.key


class AttemptTable:
    """Live attempts by key; at most one attempt of a request, the newest."""

    def __init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}
        self._epoch = 0
        self.num_stale = 0
        """Commands and events dropped because they were of an older attempt or epoch."""

    def __len__(self) -> int:
        return len(self._attempts)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(tuple(self._attempts.values()))

    def check_epoch(self, leader_epoch: int) -> None:
        """Let a command of the newest leader pass; raises ``StaleCommand`` for an older one's."""
        if leader_epoch < self._epoch:
            self.num_stale += 1
            raise StaleCommand(f"epoch {leader_epoch} is over, {self._epoch} leads")
        self._epoch = leader_epoch

    def see_epoch(self, leader_epoch: int) -> None:
        """A leader announced itself: commands of older epochs are refused from now on."""
        self._epoch = max(self._epoch, leader_epoch)

    def get(self, key: RequestKey) -> Attempt | None:
        """Exactly this attempt, if it is live here."""
        attempt = self._attempts.get(key.request_id)
        return attempt if attempt is not None and attempt.key == key else None

    def older(self, key: RequestKey) -> Attempt | None:
        """An earlier attempt at the same request that is still here and must make way.

        Raises ``StaleCommand`` when ``key`` itself is the earlier one.
        """
        attempt = self._attempts.get(key.request_id)
        if attempt is None or attempt.key.attempt == key.attempt:
            return None
        if attempt.key.attempt > key.attempt:
            self.num_stale += 1
            raise StaleCommand(f"attempt {key.attempt} is over, {attempt.key.attempt} is here")
        return attempt

    def put(self, attempt: Attempt) -> None:
        """Add a live attempt."""
        self._attempts[attempt.key.request_id] = attempt

    def remove(self, key: RequestKey) -> Attempt | None:
        """Take an attempt out; ``None`` if it is not here."""
        if self.get(key) is None:
            return None
        return self._attempts.pop(key.request_id)

    def held(self) -> tuple[HeldRequest, ...]:
        """All live attempts for a snapshot."""
        return tuple(
            HeldRequest(
                request_id=a.key.request_id,
                attempt=a.key.attempt,
                gateway=a.gateway,
                stage=a.stage,
                num_tokens=a.request.num_tokens + a.num_output_tokens,
                peer=a.peer,
            )
            for a in self._attempts.values()
        )
