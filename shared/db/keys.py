"""API keys in the database: made, listed and revoked by the command line, read by gateways."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from shared.api_key import KeyText
from shared.db.database import Database
from shared.db.tables import ApiKey, Tenant
from shared.errors import DatabaseRefused


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRecord:
    """What is known of a key. Times are aware and UTC; ``tenant`` is its name."""

    id: str
    tenant: str
    name: str
    secret_sha256: bytes
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class KeysMarker(NamedTuple):
    """Differs after a key was made, revoked or deleted: small, and quick to read."""

    num_keys: int
    num_revoked: int
    last_created_at: datetime | None
    last_revoked_at: datetime | None


class KeyStore:
    """The keys of one database. Every method raises ``DatabaseError``.

    ``timeout_s`` is the deadline of each call; by default the database's own.
    """

    def __init__(self, database: Database, *, timeout_s: float | None = None) -> None:
        self._database = database
        self._timeout_s = timeout_s

    async def create(
        self, key: KeyText, tenant: str, name: str, expires_at: datetime | None, now: datetime
    ) -> KeyRecord:
        """Keep ``key``, without its secret; the tenant is made if there is none of that name.

        Raises ``DatabaseRefused`` for names that are too long, and for an id that is taken.
        """
        try:
            return await self._create(key, tenant, name, expires_at, now)
        except DatabaseRefused:  # perhaps somebody made the same tenant at this moment
            return await self._create(key, tenant, name, expires_at, now)

    async def records(self) -> list[KeyRecord]:
        """Every key there is, the oldest first."""
        async with self._reading() as session:
            return await _records(session)

    async def changes(self, marker: KeysMarker | None) -> tuple[KeysMarker, list[KeyRecord]] | None:
        """Every key and their marker, or ``None`` if ``marker`` says that they are known."""
        async with self._reading() as session:
            # The marker first: what changes between the two makes the next one differ again.
            found = KeysMarker(*(await session.execute(_MARKER)).one())
            return None if found == marker else (found, await _records(session))

    async def revoke(self, key_id: str, now: datetime) -> KeyRecord | None:
        """End a key, unless that was done before; its record, ``None`` if there is no such key."""
        async with self._database.session(timeout_s=self._timeout_s) as session:
            is_meant = (ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            await session.execute(update(ApiKey).where(*is_meant).values(revoked_at=now))
            records = await _records(session, ApiKey.id == key_id)
        return records[0] if records else None

    def _reading(self) -> AbstractAsyncContextManager[AsyncSession]:
        return self._database.session(timeout_s=self._timeout_s, is_read_only=True)

    async def _create(
        self, key: KeyText, tenant: str, name: str, expires_at: datetime | None, now: datetime
    ) -> KeyRecord:
        async with self._database.session(timeout_s=self._timeout_s) as session:
            owner = await session.scalar(select(Tenant).where(Tenant.name == tenant))
            if owner is None:
                owner = Tenant(name=tenant, created_at=now)
                session.add(owner)
                await session.flush()
            row = ApiKey(
                id=key.id,
                tenant_id=owner.id,
                name=name,
                secret_sha256=key.digest(),
                created_at=now,
                expires_at=expires_at,
            )
            session.add(row)
            await session.flush()
            [record] = await _records(session, ApiKey.id == key.id)
        return record


_MARKER = select(
    func.count(ApiKey.id),
    func.count(ApiKey.revoked_at),
    func.max(ApiKey.created_at),
    func.max(ApiKey.revoked_at),
)


_KEYS = (
    select(
        ApiKey.id,
        Tenant.name.label("tenant"),
        ApiKey.name,
        ApiKey.secret_sha256,
        ApiKey.created_at,
        ApiKey.expires_at,
        ApiKey.revoked_at,
    )
    .join(Tenant, Tenant.id == ApiKey.tenant_id)
    .order_by(ApiKey.created_at, ApiKey.id)
)


async def _records(session: AsyncSession, *conditions: ColumnElement[bool]) -> list[KeyRecord]:
    rows = await session.execute(_KEYS.where(*conditions))
    return [KeyRecord(**row._asdict()) for row in rows]
