"""The scheduler's record of live requests: a view, not the truth (that is their gateways')."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from shared.core.request import Request, RequestKey


class EntryStatus(StrEnum):
    """How far the scheduler is with an attempt."""

    WAITING = "waiting"
    PLACING = "placing"
    PLACED = "placed"
    LOST = "lost"


@dataclass(slots=True)
class Entry:
    """One attempt. ``prefill`` equals ``decode`` when one instance serves it to the end."""

    request: Request
    gateway: str
    arrival_s: float
    status: EntryStatus = EntryStatus.WAITING
    prefill: str = ""
    decode: str = ""
    batch_id: int = 0
    has_handed_over: bool = False
    lost_reason: str = ""
    missed_audits: int = 0
    unowned_audits: int = 0

    @property
    def key(self) -> RequestKey:
        """Identity of the attempt."""
        return self.request.key

    @property
    def instances(self) -> tuple[str, ...]:
        """Who can be asked for its tokens, the likeliest first."""
        return tuple(dict.fromkeys(name for name in (self.decode, self.prefill) if name))

    def dies_with(self, instance: str) -> bool:
        """Whether the attempt cannot end if ``instance`` is gone."""
        if self.status is EntryStatus.LOST:
            return False
        return instance == self.decode or (instance == self.prefill and not self.has_handed_over)


@dataclass(slots=True)
class Batch:
    """A prefill batch that has not finished: the attempts still in it."""

    instance: str
    keys: set[RequestKey] = field(default_factory=set)


class RequestTable:
    """Entries by request id, and the prefill batches they are in."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._batches: dict[int, Batch] = {}
        self._num_assigned: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    def get(self, request_id: str) -> Entry | None:
        """The entry of a request, whatever its attempt."""
        return self._entries.get(request_id)

    def current(self, key: RequestKey) -> Entry | None:
        """The entry of exactly this attempt."""
        entry = self._entries.get(key.request_id)
        return entry if entry is not None and entry.key == key else None

    def put(self, entry: Entry) -> None:
        """Add an entry; it replaces an older attempt of the same request."""
        self._entries[entry.request.request_id] = entry

    def remove(self, request_id: str) -> Entry | None:
        """Forget a request and take it out of its batch."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.leave_batch(entry)
            self.unassign(entry)
        return entry

    def assign(self, entry: Entry, *, prefill: str, decode: str) -> None:
        """Give an attempt to its instances."""
        self.unassign(entry)
        entry.prefill, entry.decode = prefill, decode
        self._num_assigned.update(entry.instances)

    def unassign(self, entry: Entry) -> None:
        """Take an attempt from its instances."""
        self._num_assigned.subtract(entry.instances)
        entry.prefill = entry.decode = ""

    def enter_batch(self, batch_id: int, instance: str, entries: list[Entry]) -> None:
        """Record a batch given to ``instance``."""
        self._batches[batch_id] = Batch(instance, {e.key for e in entries})
        for entry in entries:
            entry.batch_id = batch_id

    def leave_batch(self, entry: Entry) -> bool:
        """The attempt is no longer being prefilled; returns whether its batch ended by that."""
        batch = self._batches.get(entry.batch_id)
        if batch is None:
            return False
        batch.keys.discard(entry.key)
        if batch.keys:
            return False
        del self._batches[entry.batch_id]
        return True

    def mark_lost(self, entry: Entry, reason: str) -> None:
        """The attempt is over without an end."""
        self.leave_batch(entry)
        self.unassign(entry)
        entry.status = EntryStatus.LOST
        entry.lost_reason = reason

    def homes_of_groups(self) -> dict[str, str]:
        """Where requests of each group are being prefilled."""
        homes = {}
        for batch in self._batches.values():
            for entry in map(self.current, batch.keys):
                if entry is not None and entry.request.group_id is not None:
                    homes[entry.request.group_id] = batch.instance
        return homes

    def num_batches(self) -> dict[str, int]:
        """Unfinished prefill batches by instance."""
        return Counter(batch.instance for batch in self._batches.values())

    def num_assigned(self) -> dict[str, int]:
        """Attempts by the instance they were given to."""
        return self._num_assigned

    def of_instance(self, instance: str) -> list[Entry]:
        """Entries that cannot go on without ``instance``."""
        return [entry for entry in self._entries.values() if entry.dies_with(instance)]

    def of_gateway(self, gateway: str) -> list[Entry]:
        """Entries that ``gateway`` owns."""
        return [entry for entry in self._entries.values() if entry.gateway == gateway]
