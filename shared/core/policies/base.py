"""The interface of every batching policy.

A policy owns the order of the waiting requests and nothing else. It is told what happens, is given
the time, and answers with batches; the live scheduler, the engine and the simulator call the same
object the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.request import Request, RequestKey


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthEstimate:
    """Predicted output length in tokens: P50 orders, P90 reserves memory."""

    p50_tokens: int
    p90_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedRequest:
    """A waiting request as a policy sees it; ``arrival_s`` is on the scheduler's own clock."""

    request: Request
    arrival_s: float
    estimate: LengthEstimate | None = None

    @property
    def key(self) -> RequestKey:
        """Identity of the attempt."""
        return self.request.key


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSlot:
    """One prefill instance that can take one more batch now."""

    instance: str
    max_batched_tokens: int
    max_requests: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What could be started now: slots, least loaded first, and KV blocks that decoding has left.

    ``free_decode_blocks`` counts what all decode instances together have free; which of them takes
    which request is routing's matter. ``pool_blocks`` is what the largest of them has in all.
    """

    slots: tuple[PrefillSlot, ...]
    free_decode_blocks: int
    block_size: int
    pool_blocks: int

    def blocks_for(self, request: Request) -> int:
        """Blocks reserved when a prefill starts: its tokens and, if there is one, one more."""
        return min(-(-request.num_tokens // self.block_size) + 1, self.pool_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillBatch:
    """Requests to prefill together at ``instance``; ``reason`` says why these and why now."""

    instance: str
    requests: tuple[QueuedRequest, ...]
    reason: str


class Policy(ABC):
    """Base of all policies: they order and pack. Not thread-safe; one owner calls it.

    The waiting set is kept here; a subclass says in what order it leaves and how it is packed.
    """

    name: str

    def __init__(self) -> None:
        self._waiting: dict[RequestKey, QueuedRequest] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def waiting(self) -> tuple[QueuedRequest, ...]:
        """The waiting requests, in no promised order."""
        return tuple(self._waiting.values())

    def on_arrival(self, queued: QueuedRequest, now_s: float) -> None:
        """A request came, or came back because it could not be started; ``arrival_s`` is kept."""
        self._waiting[queued.key] = queued

    def on_prediction(self, key: RequestKey, estimate: LengthEstimate, now_s: float) -> None:
        """A length prediction arrived; unknown keys have left already and are ignored."""
        queued = self._waiting.get(key)
        if queued is not None:
            self._waiting[key] = QueuedRequest(
                request=queued.request, arrival_s=queued.arrival_s, estimate=estimate
            )

    def on_progress(self, key: RequestKey, num_output_tokens: int, now_s: float) -> None:
        """A running request has produced ``num_output_tokens`` in all."""
        return None

    def on_finish(self, key: RequestKey, now_s: float) -> bool:
        """The request is over or was withdrawn; returns whether it was still waiting."""
        return self._waiting.pop(key, None) is not None

    @abstractmethod
    def next_prefill_batches(self, now_s: float, capacity: Capacity) -> list[PrefillBatch]:
        """Batches to start now, at most one a slot. What is returned has left the waiting set."""

    @abstractmethod
    def decode_key(self, queued: QueuedRequest, now_s: float) -> tuple[float, ...]:
        """Order of admission in an engine: the smallest goes first, the largest is the victim."""

    def should_preempt(
        self, running: Sequence[QueuedRequest], waiting: QueuedRequest, now_s: float
    ) -> RequestKey | None:
        """Which running request should yield to ``waiting`` although memory does not force it."""
        return None
