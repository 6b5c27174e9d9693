"""The loop that drives any engine through a workload, and what it saw.

Standard library only: it also runs in the peers' environments.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.workload import OfflineRequest

Emit = Callable[[Iterable[tuple[int, int]]], None]
"""Takes ``(request's index, number of new tokens)`` of every request that got any."""


class WrongOutput(RuntimeError):
    """An engine gave too few tokens or too many."""


class Serving(Protocol):
    """An engine under test. Greedy or not does not matter; ends of sequence are ignored."""

    def add(self, index: int, request: OfflineRequest) -> None:
        """Take a request; ``index`` is its name and free again when all its tokens are out."""

    def step(self, emit: Emit) -> None:
        """Compute for a while, at best one iteration; call ``emit`` whenever tokens come out."""


@dataclass(slots=True)
class Run:
    """What one run over all requests of a workload took."""

    wall_s: float = 0.0
    num_output_tokens: int = 0
    decode_steps_s: list[float] = field(default_factory=list)
    """Times between two emissions, of those in which nobody waited for a first token."""
    ttfts_s: list[float] = field(default_factory=list)
    """From each request's arrival to its first token."""

    @property
    def output_tokens_per_s(self) -> float:
        """All output tokens over the whole time, prefill included."""
        return self.num_output_tokens / self.wall_s

    @property
    def decode_step_s(self) -> float | None:
        """Median of the pure decode steps, ``None`` without any."""
        return statistics.median(self.decode_steps_s) if self.decode_steps_s else None


class _Watch:
    """Counts tokens and takes the time of every emission."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.run = Run()
        self.remaining: dict[int, int] = {}
        self.arrived_s: dict[int, float] = {}
        """Of those without a first token."""
        self._clock = clock
        self._last_s = clock()

    def take(self, index: int, request: OfflineRequest, arrived_s: float) -> None:
        self.remaining[index] = request.output_len
        self.arrived_s[index] = arrived_s

    def start_step(self) -> None:
        self._last_s = self._clock()

    def emit(self, tokens: Iterable[tuple[int, int]]) -> None:
        now_s = self._clock()
        if not self.arrived_s:
            self.run.decode_steps_s.append(now_s - self._last_s)
        self._last_s = now_s
        for index, count in tokens:
            left = self.remaining.get(index, 0) - count
            if left < 0 or count < 1:
                raise WrongOutput(f"{count} tokens for request {index}, {left + count} were due")
            self.run.num_output_tokens += count
            if index in self.arrived_s:
                self.run.ttfts_s.append(now_s - self.arrived_s.pop(index))
            if left:
                self.remaining[index] = left
            else:
                del self.remaining[index]


def serve(
    serving: Serving,
    requests: Sequence[OfflineRequest],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Run:
    """Give ``requests`` to ``serving`` when they arrive, until every token is out.

    Raises ``WrongOutput`` if a request gets more tokens than it asked for.
    """
    coming = deque(sorted(enumerate(requests), key=lambda item: item[1].at_s))
    started_s = clock()
    watch = _Watch(clock)
    while coming or watch.remaining:
        while coming and coming[0][1].at_s <= clock() - started_s:
            index, request = coming.popleft()
            watch.take(index, request, started_s + request.at_s)
            serving.add(index, request)
        if watch.remaining:
            watch.start_step()
            serving.step(watch.emit)
        else:
            sleep(max(0.0, coming[0][1].at_s - (clock() - started_s)))
    watch.run.wall_s = clock() - started_s
    return watch.run
