"""Time as a port: the live clock, and one that a test or a simulator moves by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock. Never compared across hosts; messages carry ages instead."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start."""
        ...


class MonotonicClock:
    """The clock of this process."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """Seconds since an arbitrary start."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move the clock forward by ``seconds`` (not negative)."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back by {seconds} s")
        self._now_s += seconds
