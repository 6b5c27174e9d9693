"""Who is alive, judged by what they report and by nothing else.

An instance is alive while it reports. Silence is judged only while this process itself was able to
hear: after a lost bus connection, or after the judge itself was frozen, one whole ``ttl_s`` has to
pass before anybody is declared dead.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class _Seen:
    sequence: int
    last_seen_s: float


class Membership:
    """Liveness of instances on this process's own monotonic clock."""

    def __init__(self, *, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._seen: dict[str, _Seen] = {}
        self._judge_from_s = 0.0
        self._last_tick_s: float | None = None

    def __contains__(self, instance: str) -> bool:
        return instance in self._seen

    @property
    def instances(self) -> tuple[str, ...]:
        """All that are alive."""
        return tuple(self._seen)

    def on_report(self, instance: str, sequence: int, now_s: float) -> bool | None:
        """A report came: ``True`` if the instance has joined by it, ``None`` if it is outdated."""
        seen = self._seen.get(instance)
        if seen is None:
            self._seen[instance] = _Seen(sequence, now_s)
            return True
        if sequence <= seen.sequence:
            return None
        seen.sequence, seen.last_seen_s = sequence, now_s
        return False

    def on_reconnect(self, now_s: float) -> None:
        """The bus was away: nobody is judged for one ``ttl_s`` from now."""
        self._judge_from_s = max(self._judge_from_s, now_s + self.ttl_s)

    @property
    def judges_from_s(self) -> float:
        """Before this time nobody is declared dead."""
        return self._judge_from_s

    def remove(self, instance: str) -> bool:
        """The instance is known to be gone (it said so, or nobody serves its subjects)."""
        return self._seen.pop(instance, None) is not None

    def expired(self, now_s: float) -> list[str]:
        """Remove and return those that were silent for ``ttl_s``. Call it several times a TTL."""
        last_tick_s, self._last_tick_s = self._last_tick_s, now_s
        if last_tick_s is not None and now_s - last_tick_s > self.ttl_s / 2:
            # This process did not run: reports are waiting unread, so silence proves nothing.
            self.on_reconnect(now_s)
        if now_s < self._judge_from_s:
            return []
        dead = [name for name, seen in self._seen.items() if now_s - seen.last_seen_s > self.ttl_s]
        for name in dead:
            del self._seen[name]
        return dead
