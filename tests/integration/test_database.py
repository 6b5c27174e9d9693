"""Schema, migrations and sessions, on SQLite and on a real PostgreSQL alike."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from shared.db import ApiKey, Base, BatchJob, Database, File, FilePart, Placement, Tenant
from shared.db import database as database_module
from shared.db.migrate import Migrations
from shared.db.url import database_url
from shared.errors import DatabaseError, DatabaseRefused

TABLES = {"tenants", "api_keys", "requests", "files", "file_parts", "batch_jobs", "placements"}
HEAD = Migrations().head

MIGRATE = """
import asyncio, sys
from shared.db import Database

async def main():
    database = Database(sys.argv[1])
    await database.migrate()
    await database.close()

asyncio.run(main())
"""


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await made.migrate()
    yield made
    await made.close()


async def test_migrations_give_just_the_tables_of_the_models(database: Database) -> None:
    def difference(connection: Connection) -> list[object]:
        assert set(inspect(connection).get_table_names()) == TABLES | {"alembic_version"}
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))

    async with database.session() as session:
        connection = await session.connection()
        assert await connection.run_sync(difference) == []


async def test_a_difference_between_tables_and_models_would_be_found(database: Database) -> None:
    def difference(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))

    async with database.session() as session:
        await session.execute(text("ALTER TABLE tenants ADD COLUMN colour VARCHAR(9)"))
        await session.execute(text("DROP INDEX ix_requests_received_at"))
        connection = await session.connection()
        assert len(await connection.run_sync(difference)) == 2


async def test_migrating_again_changes_nothing(database: Database) -> None:
    async with database.session() as session:
        session.add(Tenant(name="acme"))
    await database.migrate()
    async with database.session() as session:
        assert (await session.scalars(select(Tenant.name))).all() == ["acme"]


async def test_processes_and_tasks_may_all_migrate_at_once(url: str) -> None:
    root = Path(__file__).resolve().parents[2]
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", MIGRATE, url),
            env={**os.environ, "PYTHONPATH": str(root)},
            stderr=asyncio.subprocess.PIPE,
        )
        for _ in range(3)
    ]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    databases = [Database(url) for _ in range(4)]
    await asyncio.gather(*(database.migrate() for database in databases))
    await asyncio.gather(*(database.close() for database in databases))


async def test_tasks_may_migrate_different_databases_at_once(
    new_database: Callable[[], str],
) -> None:
    databases = [Database(new_database()) for _ in range(4)]
    await asyncio.gather(*(database.migrate() for database in databases))
    for database in databases:
        async with database.session() as session:
            assert (await session.scalars(select(Tenant))).all() == []
        await database.close()


async def test_a_migration_that_fails_leaves_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Migrations):
        def upgrade(self, connection: Connection) -> tuple[str, ...]:
            super().upgrade(connection)
            connection.execute(text("SELECT * FROM no_such_table"))
            return ()

    monkeypatch.setattr(database_module, "Migrations", Failing)
    failing = Database(url)
    with pytest.raises(DatabaseError):
        await failing.migrate()
    await failing.close()
    engine = create_async_engine(database_url(url))
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await engine.dispose()
    assert names == []


async def test_a_database_of_a_newer_version_is_left_alone(database: Database) -> None:
    async with database.session() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match=f"9999.*it knows {HEAD}"):
        await database.migrate()


async def test_every_table_takes_and_gives_back_a_row(database: Database) -> None:
    now = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    async with database.session() as session:
        tenant = Tenant(name="acme", tokens_per_minute=2**40, created_at=now)
        session.add(tenant)
        await session.flush()
        session.add(ApiKey(id="k1", tenant_id=tenant.id, name="ci", secret_sha256=bytes(range(32))))
        session.add(
            File(
                id="file-1",
                tenant="acme",
                filename="in.jsonl",
                purpose="batch",
                num_bytes=2**33,
                status="processed",
            )
        )
        await session.flush()
        session.add(FilePart(file_id="file-1", position=0, data=b"\0\xff"))
        session.add(
            BatchJob(
                id="batch_1",
                tenant="acme",
                endpoint="/v1/completions",
                completion_window="24h",
                status="validating",
                input_file_id="file-1",
                user_metadata={"run": "7"},
            )
        )
        session.add(Placement(model="m", version=3, json={"stages": [[0, 12]]}))
    async with database.session(is_read_only=True) as session:
        [tenant] = (await session.scalars(select(Tenant))).all()
        assert (tenant.created_at, tenant.tokens_per_minute) == (now, 2**40)
        assert tenant.created_at.tzinfo is UTC
        [key] = (await session.scalars(select(ApiKey))).all()
        assert key.secret_sha256 == bytes(range(32))
        assert (key.expires_at, key.revoked_at) == (None, None)
        [part] = (await session.scalars(select(FilePart))).all()
        assert part.data == b"\0\xff"
        [job] = (await session.scalars(select(BatchJob))).all()
        assert (job.user_metadata, job.num_total, job.output_file_id) == ({"run": "7"}, 0, None)
        [placement] = (await session.scalars(select(Placement))).all()
        assert placement.json == {"stages": [[0, 12]]}


async def test_a_deleted_file_takes_its_bytes_along_and_leaves_its_job(database: Database) -> None:
    file = {
        "tenant": "",
        "filename": "f",
        "purpose": "batch",
        "num_bytes": 1,
        "status": "processed",
    }
    async with database.session() as session:
        session.add(File(id="file-1", **file))
        await session.flush()
        session.add(FilePart(file_id="file-1", position=0, data=b"x"))
        session.add(
            BatchJob(
                id="batch_1",
                tenant="",
                endpoint="/v1/completions",
                completion_window="24h",
                status="completed",
                input_file_id="file-1",
            )
        )
    async with database.session() as session:
        await session.execute(text("DELETE FROM files"))
    async with database.session() as session:
        assert (await session.scalars(select(FilePart))).all() == []
        assert (await session.scalars(select(BatchJob.input_file_id))).all() == [None]


async def test_a_session_commits_whole_or_not_at_all(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.session() as session:
            session.add(Tenant(name="gone"))
            await session.flush()
            raise ZeroDivisionError
    async with database.session() as session:
        session.add(Tenant(name="kept"))
        await session.commit()  # a user's own commit does no harm
    async with database.session() as session:
        assert (await session.scalars(select(Tenant.name))).all() == ["kept"]


async def test_what_the_database_does_not_take_is_told_from_its_absence(
    database: Database,
) -> None:
    async with database.session() as session:
        session.add(Tenant(name="acme"))
    with pytest.raises(DatabaseRefused, match=r"(?i)unique"):
        async with database.session() as session:
            session.add(Tenant(name="acme"))
    with pytest.raises(DatabaseRefused, match=r"(?i)foreign"):
        async with database.session() as session:
            session.add(ApiKey(id="k", tenant_id=77, name="", secret_sha256=bytes(32)))
    with pytest.raises(DatabaseRefused, match="no time zone"):
        async with database.session() as session:
            session.add(Tenant(name="naive", created_at=datetime(2026, 1, 1)))
    with pytest.raises(DatabaseRefused):
        async with database.session() as session:
            session.add(Tenant(name="huge", tokens_per_minute=2**70))
    with pytest.raises(DatabaseError, match="no_such_table") as error:
        async with database.session() as session:
            await session.execute(text("SELECT * FROM no_such_table"))
    assert not isinstance(error.value, DatabaseRefused)


async def test_writers_wait_for_each_other(database: Database) -> None:
    """Each reads before it writes, which is what SQLite's default transactions fail at."""
    async with database.session() as session:
        session.add(Tenant(name="acme", requests_per_minute=0))

    async def count() -> None:
        async with database.session() as session:
            tenant = (await session.scalars(select(Tenant).with_for_update())).one()
            await asyncio.sleep(0)
            tenant.requests_per_minute = (tenant.requests_per_minute or 0) + 1

    await asyncio.gather(*(count() for _ in range(20)))
    async with database.session() as session:
        assert (await session.scalars(select(Tenant.requests_per_minute))).all() == [20]


async def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    async with database.session() as writing:
        writing.add(Tenant(name="acme"))
        await writing.flush()
        async with database.session(timeout_s=2, is_read_only=True) as reading:
            assert (await reading.scalars(select(Tenant))).all() == []


async def test_a_revision_can_be_written_without_a_database() -> None:
    """What `alembic check` does: its environment works, and finds nothing to write."""
    root = Path(__file__).resolve().parents[2]
    await asyncio.to_thread(command.check, Config(root / "shared/db/alembic.ini"))
