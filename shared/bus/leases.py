"""The contract of leases, and what both implementations share.

A lease is a key that belongs to a holder for a time to live, unless renewed. The store judges
expiry by its own clock; a holder must judge itself by its own (``LeaderElection`` does): from the
moment before it asked for the renewal that was last confirmed.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

_KEY = re.compile(r"[-/_=a-zA-Z0-9]+(\.[-/_=a-zA-Z0-9]+)*")
_PATTERN = re.compile(r"(>|([-/_=a-zA-Z0-9]+|\*)(\.([-/_=a-zA-Z0-9]+|\*))*(\.>)?)")

MIN_TTL_S = 0.5
"""Below this the server's own timers (about 0.3 s late) are too coarse."""


@dataclass(frozen=True)
class Lease:
    """A key held by whoever wrote ``value``.

    ``revision`` grows strictly with every write to the store, whatever the key: a later holder's
    is larger than any earlier one's.
    """

    key: str
    value: str
    revision: int


class LeaseEvent(StrEnum):
    """What happened to a lease."""

    ACQUIRED = "acquired"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(frozen=True)
class LeaseChange:
    """``lease`` was acquired, released or has expired.

    For an end it is the lease as last seen. Renewals are no change.
    """

    event: LeaseEvent
    lease: Lease


class LeaseWatch(ABC, AsyncIterator[LeaseChange]):
    """The changes of some keys, beginning with an ``ACQUIRED`` for each one held now.

    It outlives reconnects: what changed meanwhile is reported then (a lease that vanished as
    ``EXPIRED`` unless its release can still be seen; of several changes of one key in quick
    succession the middle ones may be missing). The iteration ends when the bus is closed. To be
    used by one task, best in ``async with``, which starts watching; otherwise the first
    ``__anext__`` does.
    """

    @abstractmethod
    async def start(self) -> None:
        """Begin to watch: no later change is missed. Raises ``BusError``s. Does nothing twice."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop watching."""

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        await self.aclose()


class LeaseStore(ABC):
    """Leases of one time to live. Every method may raise ``BusTimeout`` or ``BusDisconnected``.

    A holder is this store object together with the value it wrote: the same value written through
    another store object is another holder, so that two processes with one name cannot both believe
    they hold the key. What a lost acknowledgement left behind is recognised as one's own by the
    next call. A key is dot-separated tokens of ``[-/_=a-zA-Z0-9]``; anything else is a
    ``ValueError``.
    """

    @property
    @abstractmethod
    def ttl_s(self) -> float:
        """How long a lease lasts without renewal."""

    @abstractmethod
    async def try_acquire(self, key: str, value: str) -> Lease | None:
        """Take ``key`` if it is free; ``None`` if somebody else holds it.

        If this holder has it already, that lease is renewed.
        """

    @abstractmethod
    async def renew(self, lease: Lease) -> Lease:
        """The same lease with its full time to live again; use the returned one from now on.

        Raises ``LeaseLost`` if it has expired, even when nobody took it since, or is another's.
        """

    @abstractmethod
    async def release(self, lease: Lease) -> None:
        """Give ``lease`` up. Does nothing if it is not this holder's any more."""

    @abstractmethod
    async def get(self, key: str) -> Lease | None:
        """The lease on ``key``, or ``None`` if nobody holds it."""

    @abstractmethod
    def watch(self, key: str) -> LeaseWatch:
        """Follow ``key``, in which ``*`` stands for one token and a final ``>`` for the rest."""


def lease_bucket(ttl_s: float) -> str:
    """The name of the bucket for leases of ``ttl_s``: one time to live, one bucket."""
    if ttl_s < MIN_TTL_S:
        raise ValueError(f"a lease must last at least {MIN_TTL_S} s, not {ttl_s} s")
    return f"leases_{round(ttl_s * 1000)}ms"


def check_lease_key(key: str) -> None:
    """Raise ``ValueError`` unless ``key`` names exactly one lease."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a lease key: {key!r}")


def check_lease_pattern(pattern: str) -> None:
    """Raise ``ValueError`` unless ``pattern`` is a key or a wildcard over keys."""
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(f"not a lease key or pattern: {pattern!r}")


class LeaseTracker:
    """What one watch knows, and the changes that follow from what it is told. Does no I/O.

    Between ``begin_sync`` and ``end_sync`` the store tells everything it holds; a lease known
    before and not told again has expired meanwhile.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Lease, str]] = {}
        self._unconfirmed: set[str] = set()

    def begin_sync(self) -> None:
        """From here on the store tells all it holds."""
        self._unconfirmed = set(self._held)

    def end_sync(self) -> list[LeaseChange]:
        """The store has told all it holds."""
        changes = [change for key in sorted(self._unconfirmed) for change in self.ended(key)]
        self._unconfirmed = set()
        return changes

    def held(self, lease: Lease, holder: str) -> list[LeaseChange]:
        """The store says that ``holder`` holds ``lease``."""
        self._unconfirmed.discard(lease.key)
        known = self._held.get(lease.key)
        self._held[lease.key] = (lease, holder)
        if known is not None and (known[0].value, known[1]) == (lease.value, holder):
            return []
        changes = [LeaseChange(LeaseEvent.ACQUIRED, lease)]
        if known is not None:
            changes.insert(0, LeaseChange(LeaseEvent.EXPIRED, known[0]))
        return changes

    def ended(self, key: str, event: LeaseEvent = LeaseEvent.EXPIRED) -> list[LeaseChange]:
        """The store says that nobody holds ``key``."""
        self._unconfirmed.discard(key)
        known = self._held.pop(key, None)
        return [] if known is None else [LeaseChange(event, known[0])]
