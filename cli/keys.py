"""``banyan keys``: who may use the gateways. Works on the database; no suite has to be running."""

import os
import re
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cli.errors import CommandFailed
from cli.options import JsonOption
from shared.api_key import PREFIX, KeyText, without_secrets
from shared.errors import DatabaseError

if TYPE_CHECKING:
    from shared.db.keys import KeyRecord, KeyStore

ResultT = TypeVar("ResultT")

_SPAN = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_ID_OF_KEY = re.compile(rf"{PREFIX}([0-9a-f]+)(?:-.*)?")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_MAX_NAME_LENGTH = 100
_PIPED_WIDTH = 200

keys_app = typer.Typer(
    name="keys", help="Make, list and revoke the API keys of the gateways.", no_args_is_help=True
)


@keys_app.command("create")
def create(
    tenant: Annotated[
        str, typer.Option("--tenant", help="Whose key it is; made if there is no such tenant.")
    ] = "default",
    name: Annotated[str, typer.Option("--name", help="What it is for, shown in the list.")] = "",
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", help="When it ends: after 90m, 12h, 30d or 8w, or at a date; else never."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once; the database has no way to tell it again."""
    if not _TENANT.fullmatch(tenant):
        raise typer.BadParameter(
            "up to 64 letters, digits and any of _ . @ -, beginning with a letter or digit",
            param_hint="--tenant",
        )
    if len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise typer.BadParameter(
            f"up to {_MAX_NAME_LENGTH} characters on one line", param_hint="--name"
        )
    now = datetime.now(UTC)
    expires_at = None if expires is None else expiry_of(expires, now)
    key = KeyText.random()
    record = _with_store(lambda store: store.create(key, tenant, name, expires_at, now))
    if as_json:
        _print_json({"key": key.text, **_as_dict(record, now)})
        return
    typer.echo(key.text)
    until = "" if expires_at is None else f" until {_minute(expires_at)} UTC"
    typer.echo(
        f"Key {key.id} of tenant {tenant} is good{until}. It is not shown again: keep it now.",
        err=True,
    )


@keys_app.command("list")
def list_keys(as_json: JsonOption = False) -> None:
    """Show every key there is or was, without its secret."""
    now = datetime.now(UTC)
    records = _with_store(lambda store: store.records())
    if as_json:
        _print_json([_as_dict(record, now) for record in records])
    elif not records:
        typer.echo("There are no keys: gateways ask for none, unless they are told to.", err=True)
    else:
        _print_table(records, now)


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[
        str, typer.Argument(metavar="ID", help="As `banyan keys list` shows it, or the whole key.")
    ],
    as_json: JsonOption = False,
) -> None:
    """End a key for good; gateways refuse it within a second."""
    now = datetime.now(UTC)
    pasted = _ID_OF_KEY.fullmatch(key_id)

    async def end(store: "KeyStore") -> "tuple[KeyRecord | None, list[KeyRecord]]":
        return await store.revoke(pasted[1] if pasted else key_id, now), await store.records()

    record, records = _with_store(end)
    if record is None:
        raise CommandFailed(
            f"there is no key {without_secrets(key_id)!r}; `banyan keys list` shows their ids"
        )
    if as_json:
        _print_json(_as_dict(record, now))
        return
    typer.echo(f"Key {record.id} of tenant {record.tenant} is revoked.")
    if all(record.revoked_at is not None for record in records):
        typer.echo(
            "It was the last one: gateways let nobody in until there is another, unless they run "
            "with BANYAN_GATEWAY_REQUIRE_KEYS=never.",
            err=True,
        )


def expiry_of(text: str, now: datetime) -> datetime:
    """When ``--expires`` means: a time span from ``now``, or an ISO date or time.

    A date is its first moment; what names no time zone is UTC. Raises ``typer.BadParameter``.
    """
    span = _SPAN.fullmatch(text)
    try:
        if span is not None:
            return now + timedelta(**{_UNITS[span[2]]: int(span[1])})
        expires_at = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is neither a time span like 90m, 12h, 30d or 8w nor a date like "
            f"{now.year + 1}-01-31",
            param_hint="--expires",
        ) from None
    if expires_at.tzinfo is None:
        expires_at = expires_at.replace(tzinfo=UTC)
    if expires_at <= now:
        raise typer.BadParameter(f"{text} is past", param_hint="--expires")
    return expires_at.astimezone(UTC)


def _with_store(work: "Callable[[KeyStore], Awaitable[ResultT]]") -> ResultT:
    """Do ``work`` on the keys of the database that the environment names, made if need be.

    Raises ``CommandFailed`` where that cannot be done.
    """
    import asyncio

    from shared.db.database import Database
    from shared.db.keys import KeyStore
    from shared.db.url import SETTING

    async def do() -> ResultT:
        database = Database(os.environ.get(SETTING))
        try:
            await database.migrate()
            return await work(KeyStore(database))
        except DatabaseError as error:
            hint = "may you write there" if database.is_sqlite else "does it run"
            raise CommandFailed(
                f"{database} cannot be used ({error}): {hint}? {SETTING} names another database"
            ) from error
        finally:
            await database.close()

    return asyncio.run(do())


def _state_of(record: "KeyRecord", now: datetime) -> str:
    if record.revoked_at is not None:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= now:
        return "expired"
    return "active"


def _as_dict(record: "KeyRecord", now: datetime) -> dict[str, Any]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "name": record.name,
        "state": _state_of(record, now),
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def _print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(value).decode())


def _print_table(records: "list[KeyRecord]", now: datetime) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("id", "tenant", "name", "state", "created", "expires (UTC)"):
        table.add_column(heading, no_wrap=heading != "name")
    for record in records:
        table.add_row(
            record.id,
            record.tenant,
            record.name,
            _state_of(record, now),
            record.created_at.strftime("%Y-%m-%d"),
            "never" if record.expires_at is None else _minute(record.expires_at),
        )
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    Console(file=sys.stdout, width=width, markup=False, highlight=False).print(table)


def _minute(moment: datetime) -> str:
    """In UTC, which is what a date in ``--expires`` means."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
