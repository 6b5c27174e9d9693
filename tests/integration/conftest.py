"""What tests of several modules run against."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.postgres import Postgres, PostgresMissing, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real server of our own; a test that stops it starts it again."""
    try:
        with running_postgres() as server:
            yield server
    except PostgresMissing as error:
        pytest.skip(str(error))


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes an empty database of either kind; returns its address."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.db"
    server: Postgres = request.getfixturevalue("postgres")
    return lambda: server.create(f"test_{uuid.uuid4().hex}")
