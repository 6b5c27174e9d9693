"""Which database an address means, and that its password is shown nowhere."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import make_url

from shared.db import Database
from shared.db.tables import UtcDateTime
from shared.db.url import database_url
from shared.errors import ConfigError

KINDS = ("sqlite", "postgresql+asyncpg")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("sqlite:///kept/banyan.db", "sqlite+aiosqlite:///kept/banyan.db"),
        ("sqlite:////srv/banyan.db", "sqlite+aiosqlite:////srv/banyan.db"),
        ("sqlite+aiosqlite:////srv/banyan.db", "sqlite+aiosqlite:////srv/banyan.db"),
        ("postgresql://u:p@db:5433/banyan", "postgresql+asyncpg://u:p@db:5433/banyan"),
        ("postgres://u:p@db/banyan", "postgresql+asyncpg://u:p@db/banyan"),
        ("postgresql+asyncpg://u@db/banyan", "postgresql+asyncpg://u@db/banyan"),
        ("postgresql://db/banyan?sslmode=require", "postgresql+asyncpg://db/banyan?ssl=require"),
    ],
)
def test_the_usual_addresses_are_taken(text: str, meant: str) -> None:
    assert database_url(text).render_as_string(hide_password=False) == meant


@pytest.mark.parametrize("text", [None, ""])
def test_without_an_address_it_is_a_file_among_the_users_data(
    text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert database_url(text).database == str(tmp_path / "banyan" / "banyan.db")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert database_url(text).database == str(tmp_path / ".local/share/banyan/banyan.db")


@pytest.mark.parametrize(
    "text", ["banyan.db", "mysql://u:hidden@db/x", "//:hidden@", "x://:hidden"]
)
def test_another_address_is_refused_without_repeating_its_password(text: str) -> None:
    with pytest.raises(ConfigError, match="BANYAN_DATABASE_URL") as refusal:
        Database(text)
    assert "hidden" not in str(refusal.value)


def test_a_database_is_named_without_its_password() -> None:
    assert str(Database("postgresql://u:hidden@db/banyan")).endswith("//u:***@db/banyan")


def test_times_come_back_in_utc_from_both_databases() -> None:
    kind = UtcDateTime()
    sqlite, postgresql = (make_url(f"{name}://").get_dialect()() for name in KINDS)
    ahead = datetime(2026, 7, 1, 14, 30, tzinfo=timezone(timedelta(hours=2)))
    stored = kind.process_bind_param(ahead, sqlite)
    assert stored == datetime(2026, 7, 1, 12, 30)
    assert kind.process_result_value(stored, sqlite) == ahead
    stored = kind.process_bind_param(ahead, postgresql)
    assert stored == ahead
    assert stored is not None and stored.tzinfo is UTC
    read = kind.process_result_value(ahead, postgresql)
    assert read is not None and read.tzinfo is UTC
    with pytest.raises(ValueError, match="no time zone"):
        kind.process_bind_param(datetime(2026, 7, 1), sqlite)
