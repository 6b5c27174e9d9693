"""What only PostgreSQL does: it goes away, comes back, and hangs."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import select, text

from bench.postgres import Postgres
from bench.suite import free_port
from shared.db import Database, Tenant
from shared.db.database import POOL_SIZE
from shared.errors import DatabaseError, DatabaseRefused


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create(f"test_{uuid.uuid4().hex}")


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await made.migrate()
    yield made
    await made.close()


async def names(database: Database) -> list[str]:
    async with database.session() as session:
        return list((await session.scalars(select(Tenant.name))).all())


async def test_a_server_that_comes_back_is_used_again(
    postgres: Postgres, database: Database
) -> None:
    async with database.session() as session:
        session.add(Tenant(name="acme"))
    await asyncio.to_thread(postgres.stop)
    try:
        for _ in range(2):
            with pytest.raises(DatabaseError):
                await names(database)
    finally:
        await asyncio.to_thread(postgres.start)
    assert await names(database) == ["acme"]


async def test_a_server_that_goes_away_in_a_transaction_is_an_error_there(
    postgres: Postgres, database: Database
) -> None:
    try:
        with pytest.raises(DatabaseError) as error:
            async with database.session() as session:
                session.add(Tenant(name="acme"))
                await session.flush()
                await asyncio.to_thread(postgres.stop)
        assert not isinstance(error.value, DatabaseRefused)
    finally:
        await asyncio.to_thread(postgres.start)
    assert await names(database) == []


async def test_a_statement_that_hangs_ends_at_the_deadline(database: Database) -> None:
    async with database.session() as locking:
        await locking.execute(text("LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(DatabaseError, match=r"no answer within 0\.2 s"):
            async with database.session(timeout_s=0.2) as session:
                await session.execute(select(Tenant))
    assert await names(database) == []


async def test_more_users_than_connections_wait_for_one(database: Database) -> None:
    are_over = asyncio.Event()
    taken = asyncio.Semaphore(0)

    async def hold() -> None:
        async with database.session() as session:
            await session.execute(select(Tenant))
            taken.release()
            await are_over.wait()

    holding = [asyncio.create_task(hold()) for _ in range(POOL_SIZE)]
    for _ in holding:
        await taken.acquire()
    with pytest.raises(DatabaseError, match="no answer"):
        async with database.session(timeout_s=0.2) as session:
            await session.execute(select(Tenant))
    waiting = [asyncio.create_task(hold()) for _ in range(10)]
    are_over.set()
    await asyncio.gather(*holding, *waiting)


@pytest.mark.parametrize("what", ["nobody listens", "no such database", "no such host"])
async def test_what_cannot_be_reached_says_so_soon(postgres: Postgres, what: str) -> None:
    urls = {
        "nobody listens": f"postgresql://banyan@127.0.0.1:{free_port()}/x",
        "no such database": postgres.url("no_such_database"),
        "no such host": "postgresql://banyan@no-such-host.invalid/x",
    }
    database = Database(urls[what])
    async with asyncio.timeout(20):
        with pytest.raises(DatabaseError):
            await database.migrate()
    await database.close()
