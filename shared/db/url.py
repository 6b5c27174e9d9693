"""Which database: ``BANYAN_DATABASE_URL``, or a file among the user's data."""

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from shared.directories import data_dir
from shared.errors import ConfigError

SETTING = "BANYAN_DATABASE_URL"

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}


def database_url(text: str | None) -> URL:
    """The address ``text`` with the driver that is used; without one, that of the user's own file.

    ``sqlite:///relative``, ``sqlite:////absolute``, ``postgresql://user:password@host:5432/name``.
    libpq's ``sslmode`` is understood. Raises ``ConfigError`` without repeating the address, which
    may have a password.
    """
    if not text:
        return URL.create("sqlite+aiosqlite", database=str(data_dir() / "banyan.db"))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{SETTING} is no address like {_EXAMPLES}") from None
    driver = _DRIVERS.get(url.drivername)
    if driver is None:
        raise ConfigError(f"{SETTING} begins with {url.drivername}: it must be like {_EXAMPLES}")
    url = url.set(drivername=driver)
    if "sslmode" in url.query:  # asyncpg has another name for it
        mode = url.query["sslmode"]
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    return url


_EXAMPLES = "sqlite:////srv/banyan.db or postgresql://user:password@host/banyan"
