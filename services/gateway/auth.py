"""Who may use this gateway: the API keys of the database, as this process last saw them.

A request is judged by a snapshot in memory and never waits for a slow database. The snapshot is
brought up to date every half a second, by one small query while nothing changes: so a revocation
holds within a second on every gateway. A key that the snapshot does not let in has it brought up to
date at once and is judged again: so a new key works with its first request.

=====================  =============================================================================
database               requests
=====================  =============================================================================
reached                judged by what it holds
lost after a read      judged by what it held: new keys are not known, revoked ones still let in
never reached          503, for nobody knows whether keys are needed
=====================  =============================================================================
"""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from services.gateway.errors import AuthenticationFailed
from services.gateway.generation import Unserved
from services.gateway.identity import Identity
from shared.api_key import KeyText
from shared.clock import Clock
from shared.db.database import Database
from shared.db.keys import KeyRecord, KeysMarker, KeyStore
from shared.errors import DatabaseError
from shared.metrics import Metrics

log = logging.getLogger(__name__)

MIN_INTERVAL_S = 0.02
"""Between two looks at the database that requests ask for, however many wrong keys come."""
PATIENCE_S = 0.035
"""How long a request with a key that is not known waits for a look at the database."""
READ_TIMEOUT_S = 2.0
MIGRATE_TIMEOUT_S = 10.0
FIRST_READ_PATIENCE_S = 2.0
"""How long a start waits for the keys; without them every request is answered with 503."""

_NOBODYS_DIGEST = bytes(32)


class KeyRing:
    """All keys at one moment; never changed."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self._records = {record.id: record for record in records}
        self.has_any = bool(self._records)
        """Whether there is a key, be it revoked or expired: the end of a key opens no door."""

    def record_of(self, key: KeyText) -> KeyRecord | None:
        """The record that ``key`` belongs to, ``None`` if its id or its secret is wrong.

        Takes as long for one as for the other, whatever the secret has in common with the right
        one. Says nothing of whether the key is still good.
        """
        record = self._records.get(key.id)
        expected = _NOBODYS_DIGEST if record is None else record.secret_sha256
        return record if hmac.compare_digest(expected, key.digest()) else None


class KeyCounters:
    """The metrics of the keys, made once a process."""

    def __init__(self, metrics: Metrics) -> None:
        self.refused = metrics.counter(
            "gateway", "unauthorized", "requests", "Requests refused for their key", ["reason"]
        )
        self.read_errors = metrics.counter(
            "gateway", "key_read", "errors", "Looks at the keys that failed"
        )
        self.age = metrics.gauge(
            "gateway", "key_age", "seconds", "Since the database last said which keys are good"
        )


class KeyGuard:
    """Tells tenants by their keys; ``authenticate`` is what the application asks for.

    Whoever makes it keeps ``run`` running.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        counters: KeyCounters,
        *,
        is_always_required: bool = False,
        period_s: float = 0.5,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``now`` is the time of day that keys expire by. Nothing is read before ``run``."""
        self._database = database
        self._store = KeyStore(database, timeout_s=READ_TIMEOUT_S)
        self._clock = clock
        self._counters = counters
        self._is_always_required = is_always_required
        self._period_s = period_s
        self._now = now
        self._ring: KeyRing | None = None
        self._marker: KeysMarker | None = None
        self._read_s = clock.now_s()
        counters.age.set_function(lambda: clock.now_s() - self._read_s)
        self._is_failing = False
        self._asked_s = clock.now_s()
        self._is_wanted = asyncio.Event()
        self._next_look = asyncio.Event()

    async def run(self) -> None:
        """Follow the database. Runs until cancelled."""
        while True:
            self._is_wanted.clear()
            look, self._next_look = self._next_look, asyncio.Event()
            await self._look()
            look.set()
            await self._until_due()

    async def first_read(self) -> None:
        """Wait until the keys have been read, but not for a database that does not answer."""
        if self._ring is None:
            await self._next_look_within(FIRST_READ_PATIENCE_S)

    def missing(self) -> str | None:
        """Why nobody can be let in now, or ``None``."""
        return None if self._ring is not None else "the API keys have not been read yet"

    async def authenticate(self, token: str | None) -> Identity:
        """Whose ``token`` is; nobody's in particular where no key is asked for.

        Raises ``AuthenticationFailed``, and ``Unserved`` while the keys have never been read.
        """
        key = None if token is None else KeyText.parse(token)
        ring = self._ring
        record = None if ring is None or key is None else ring.record_of(key)
        if key is not None and record is None:
            await self._next_look_within(PATIENCE_S)
            ring = self._ring
            record = None if ring is None else ring.record_of(key)
        if ring is None:
            self._counters.refused.labels(reason="unread").inc()
            raise Unserved(
                "this gateway has not been able to read its API keys yet", retry_after_s=1.0
            )
        if record is not None:
            return self._identity(record)
        if not (self._is_always_required or ring.has_any):
            return Identity()
        if token is None:
            raise self._refusal(
                "missing", "an API key is needed: send it as 'authorization: Bearer bn-…'"
            )
        raise self._refusal("wrong", "this API key is not known here")

    def _identity(self, record: KeyRecord) -> Identity:
        """Whose a key is whose secret was right, unless it is no longer good."""
        if record.revoked_at is not None:
            raise self._refusal("revoked", "this API key has been revoked")
        if record.expires_at is not None and record.expires_at <= self._now():
            expired_at = record.expires_at.isoformat(timespec="seconds")
            raise self._refusal("expired", f"this API key expired at {expired_at}")
        return Identity(tenant=record.tenant, key_id=record.id)

    def _refusal(self, reason: str, message: str) -> AuthenticationFailed:
        self._counters.refused.labels(reason=reason).inc()
        return AuthenticationFailed(message, field=None)

    async def _next_look_within(self, patience_s: float) -> None:
        """Have the database looked at, and wait for it until patience ends."""
        look = self._next_look
        self._is_wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await look.wait()

    async def _until_due(self) -> None:
        """Wait for the next look: a period, or less if a request asks for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._period_s):
                await self._is_wanted.wait()
                await asyncio.sleep(self._asked_s + MIN_INTERVAL_S - self._clock.now_s())
                self._asked_s = self._clock.now_s()

    async def _look(self) -> None:
        """Bring the snapshot up to date, or leave it as it is."""
        try:
            if self._ring is None:
                await self._database.migrate(timeout_s=MIGRATE_TIMEOUT_S)
            changes = await self._store.changes(self._marker)
        except DatabaseError as error:
            self._note_failure(error)
            return
        if changes is not None:
            self._marker, records = changes
            self._ring = KeyRing(records)
        self._read_s = self._clock.now_s()
        if self._is_failing:
            self._is_failing = False
            log.info("the API keys can be read again")

    def _note_failure(self, error: DatabaseError) -> None:
        """Count it, and say so at the first of a row."""
        self._counters.read_errors.inc()
        if not self._is_failing:
            self._is_failing = True
            meanwhile = "nobody is let in" if self._ring is None else "those known stay as they are"
            log.warning("the API keys cannot be read, %s meanwhile: %s", meanwhile, error)
