"""The connection to the database: SQLite in a file, or PostgreSQL. Every call has a deadline."""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import URL, Connection, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from shared.db.migrate import Migrations
from shared.db.url import database_url
from shared.errors import DatabaseError, DatabaseRefused

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
MIGRATE_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
POOL_SIZE = 4
BUSY_TIMEOUT_S = 5.0
"""How long SQLite waits for another process to finish writing."""
MIGRATION_LOCK = 0x62616E79616E  # "banyan"
"""PostgreSQL's advisory lock of who migrates."""


class Database:
    """One database; makes no connection before the first use.

    ``url`` is what ``BANYAN_DATABASE_URL`` may hold; without one it is the user's own SQLite file.
    Raises ``ConfigError`` for an address that is none. Belongs to one event loop, where ``close``
    must be called. Whatever goes wrong with the database is a ``DatabaseError``.
    """

    def __init__(self, url: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """``timeout_s`` is the deadline of a session that names none."""
        self._url = database_url(url)
        self._timeout_s = timeout_s
        self._file: Path | None = None
        if self.is_sqlite and self._url.database not in (None, "", ":memory:"):
            self._file = Path(str(self._url.database))
        self._engine = _engine(self._url, timeout_s)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._reading_engine = self._engine.execution_options(**{_IS_READ_ONLY: True})
        self._reading_sessions = async_sessionmaker(self._reading_engine, expire_on_commit=False)
        self._migrations = Migrations()

    def __str__(self) -> str:
        """The address, its password masked."""
        return self._url.render_as_string(hide_password=True)

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of this host."""
        return self._url.get_backend_name() == "sqlite"

    @contextlib.asynccontextmanager
    async def session(
        self, *, timeout_s: float | None = None, is_read_only: bool = False
    ) -> AsyncIterator[AsyncSession]:
        """A session in one transaction, committed on leaving it, rolled back when that raises.

        The deadline is that of all of it, from connecting to the commit. Raises ``DatabaseRefused``
        for values that the database does not take, and ``DatabaseError`` for everything else that
        it does; a commit that raises may have happened all the same. On SQLite it is the only
        transaction of all processes while it lasts, unless ``is_read_only`` promises that it only
        reads; those run beside others and are never waited for.
        """
        async with self._guarded(timeout_s or self._timeout_s):
            self._make_room()
            sessions = self._reading_sessions if is_read_only else self._sessions
            async with sessions() as session:
                yield session
                await session.commit()

    async def migrate(self, *, timeout_s: float = MIGRATE_TIMEOUT_S) -> None:
        """Bring the schema to this version's; cheap where it is there already.

        Any number of processes may call it at once: one migrates, in one transaction, the others
        wait for it.
        """
        async with self._guarded(timeout_s):
            self._make_room()
            async with self._reading_engine.connect() as connection:
                revision = await connection.run_sync(self._migrations.revision)
            if revision == self._migrations.head:
                return
            async with self._engine.begin() as connection:
                if not self.is_sqlite:  # where the transaction itself is the lock
                    lock = text("SELECT pg_advisory_xact_lock(:key)")
                    await connection.execute(lock, {"key": MIGRATION_LOCK})
                applied = await connection.run_sync(self._migrations.upgrade)
        if applied:
            log.info("%s is at revision %s", self, applied[-1])

    async def close(self) -> None:
        """Let go of every connection; sessions that are open are cut off."""
        async with self._guarded(CLOSE_TIMEOUT_S):
            await self._engine.dispose()

    def _make_room(self) -> None:
        """SQLite makes its file, but not the directory, and lets everybody read it."""
        if self._file is not None and not self._file.exists():
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file.touch(mode=0o600)

    @contextlib.asynccontextmanager
    async def _guarded(self, timeout_s: float) -> AsyncIterator[None]:
        """Everything inside in ``timeout_s``, and errors as ours."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except StatementError as error:
            kind = DatabaseRefused if _is_refusal(error) else DatabaseError
            raise kind(_reason(error)) from error
        except (OverflowError, UnicodeError) as error:  # SQLite's driver lets them through
            raise DatabaseRefused(_reason(error)) from error
        except TimeoutError as error:
            raise DatabaseError(f"no answer within {timeout_s:g} s") from error
        except _FOREIGN_ERRORS as error:
            raise DatabaseError(_reason(error)) from error


_IS_READ_ONLY = "banyan_is_read_only"
"""An execution option of ours."""

_REFUSING_SQLSTATES = ("22", "23")
"""PostgreSQL's classes of errors about data, and about integrity."""

# While connecting, the drivers' errors arrive as they are.
_FOREIGN_ERRORS = (
    SQLAlchemyError,
    OSError,
    EOFError,
    sqlite3.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    CommandError,
    RevisionError,
)


def _is_refusal(error: StatementError) -> bool:
    """Whether it was the values: before they got there, by their form, or by a constraint."""
    if isinstance(error, IntegrityError | DataError):
        return True
    causes = (error.orig, error.orig.__cause__ if error.orig is not None else None)
    if any(isinstance(cause, ValueError | TypeError) for cause in causes):
        return True
    sqlstate = getattr(error.orig, "sqlstate", None) or ""
    return str(sqlstate).startswith(_REFUSING_SQLSTATES)


def _reason(error: BaseException) -> str:
    """One line, without the statement."""
    cause = getattr(error, "orig", None) or error
    cause = cause.__cause__ or cause  # the driver's own words
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _engine(url: URL, timeout_s: float) -> AsyncEngine:
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    return create_async_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=timeout_s,
        pool_pre_ping=True,  # a server that was started again is noticed before it matters
        connect_args={"timeout": CONNECT_TIMEOUT_S, "command_timeout": timeout_s},
    )


def _sqlite(url: URL) -> AsyncEngine:
    # At DEBUG it writes every statement with its values: hashes of keys, texts of prompts.
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    def connected(connection: DBAPIConnection, _record: Any) -> None:
        # Python's module begins transactions only before some statements; `begun` does it instead.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA synchronous=NORMAL")
        # A property of the file. While others are at it this may fail, and a later one succeeds.
        with contextlib.suppress(sqlite3.OperationalError):
            cursor.execute("PRAGMA journal_mode=WAL")
        cursor.close()

    def begun(connection: Connection) -> None:
        # At once for writing: a transaction that reads first and finds, when it begins to write,
        # that another one has written meanwhile would fail without any waiting.
        is_read_only = connection.get_execution_options().get(_IS_READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")

    event.listen(engine.sync_engine, "connect", connected)
    event.listen(engine.sync_engine, "begin", begun)
    return engine
