"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopScan:
    """What may be shown of the text so far, and whether a stop string ended it."""

    text: str
    is_stopped: bool = False


class StopMatcher:
    """Finds the first stop string to be completed, however the text is cut into pieces.

    Text that could still become a stop string is held back, so that no part of one is ever shown.
    Where several end at the same character, the one that began first counts.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """``stop_strings`` are not empty; there may be none of them."""
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, stop_strings), default=0)
        self._first_chars = frozenset(stop[0] for stop in stop_strings)
        self._held = ""

    def feed(self, text: str) -> StopScan:
        """Add ``text``; after a stop nothing more may be fed."""
        if not self._stop_strings or not text:
            return StopScan(text)
        # A match has to end inside the new text: one that ended before would have been found.
        text = self._held + text
        start = self._first_match(text, new_from=len(self._held))
        if start is not None:
            self._held = ""
            return StopScan(text[:start], is_stopped=True)
        num_held = self._num_open(text)
        shown = len(text) - num_held
        self._held = text[shown:]
        return StopScan(text[:shown])

    def skip(self, text: str) -> str:
        """Let ``text`` pass without looking at it; returns what may be shown now."""
        shown, self._held = self._held + text, ""
        return shown

    def flush(self) -> str:
        """The text held back: it became no stop string, and nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, new_from: int) -> int | None:
        """Where the stop string that is completed first begins in ``text``."""
        best: tuple[int, int] | None = None
        for stop in self._stop_strings:
            start = text.find(stop, max(0, new_from - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _num_open(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length] not in self._first_chars:
                continue
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0
