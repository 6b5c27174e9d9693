"""API keys: the command line on a real database, and gateways over HTTP that follow it."""

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete
from typer.testing import CliRunner

from cli.errors import CommandFailed
from cli.main import app
from services.gateway.config import GatewaySettings
from services.gateway.service import GatewayService
from shared.api_key import KeyText
from shared.bus.server import EmbeddedNats
from shared.db.database import Database
from shared.db.keys import KeyStore
from shared.db.tables import ApiKey
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.requests import Done, SubmitReply, SubmitRequest, SubmitStatus
from tests.integration.service_rig import MemoryWorld

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny-chat"
CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
DEADLINE_S = 30.0
NEVER_S = 3600.0


# The command line


@dataclass
class Cli:
    """``banyan keys`` on one database."""

    url: str

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["keys", *arguments], env={"BANYAN_DATABASE_URL": self.url})

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state/banyan.db"


@pytest.fixture
def cli(url: str) -> Cli:
    return Cli(url)


def test_a_new_key_is_all_there_is_on_stdout(cli: Cli) -> None:
    result = cli.run("create", "--tenant", "acme", "--expires", "30d")
    key = KeyText.parse(result.stdout.removesuffix("\n"))
    assert key is not None
    assert "not shown again" in result.stderr
    assert key.secret not in result.stderr


def test_the_list_and_the_database_have_every_key_and_no_secret(cli: Cli, tmp_path: Path) -> None:
    first = cli.json("create", "--name", "laptop [red]")
    second = cli.json("create", "--tenant", "acme", "--expires", "2100-01-31")
    cli.json("revoke", first["id"])
    listed = cli.json("list")
    assert [(k["id"], k["tenant"], k["name"], k["state"]) for k in listed] == [
        (first["id"], "default", "laptop [red]", "revoked"),
        (second["id"], "acme", "", "active"),
    ]
    assert listed[1]["expires_at"] == "2100-01-31T00:00:00Z"
    table = cli.run("list").stdout
    assert "laptop [red]" in table
    assert "2100-01-31 00:00" in table
    everything = table + json.dumps(listed)
    everything += "".join(p.read_bytes().decode("latin-1") for p in tmp_path.rglob("banyan.db*"))
    for made in (first, second):
        key = KeyText.parse(made["key"])
        assert key is not None
        assert made["id"] in everything
        assert key.secret not in everything


def test_keys_of_one_tenant_belong_together(cli: Cli) -> None:
    assert {cli.json("create", "--tenant", "acme")["tenant"] for _ in range(2)} == {"acme"}
    assert len(cli.json("list")) == 2


def test_a_key_is_revoked_by_its_id_or_its_text_once_or_twice(cli: Cli) -> None:
    by_id, by_text = cli.json("create"), cli.json("create")
    revoked = cli.json("revoke", by_id["id"])
    assert (revoked["id"], revoked["state"]) == (by_id["id"], "revoked")
    assert cli.json("revoke", by_id["id"]) == revoked
    result = cli.run("revoke", by_text["key"])
    assert f"Key {by_text['id']} of tenant default is revoked." in result.stdout
    assert "gateways let nobody in" in result.stderr


def test_a_key_that_is_not_there_is_not_revoked(cli: Cli) -> None:
    stranger = KeyText.random()
    for text in ("abc", stranger.text):
        error = cli.run("revoke", text).exception
        assert isinstance(error, CommandFailed)
        assert "`banyan keys list`" in str(error)
        assert stranger.secret not in str(error)


def test_no_keys_are_said_to_be_none(cli: Cli) -> None:
    assert cli.json("list") == []
    result = cli.run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "There are no keys" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--tenant", ""], "--tenant"),
        (["--tenant", "a b"], "--tenant"),
        (["--tenant", "a" * 65], "--tenant"),
        (["--name", "two\nlines"], "--name"),
        (["--name", "n" * 101], "--name"),
        (["--expires", "soon"], "--expires"),
        (["--expires", "2001-01-01"], "--expires"),
    ],
)
def test_wrong_options_make_no_key(cli: Cli, arguments: list[str], option: str) -> None:
    result = cli.run("create", *arguments)
    assert result.exit_code == 2
    assert option in result.stderr
    assert cli.json("list") == []


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = Cli(f"sqlite:///{tmp_path}/file/banyan.db").run("list").exception
    assert isinstance(error, CommandFailed)
    assert f"{tmp_path}/file/banyan.db" in str(error)
    assert "BANYAN_DATABASE_URL" in str(error)
    error = Cli("postgresql://me:hidden@127.0.0.1:1/banyan").run("list").exception
    assert isinstance(error, CommandFailed)
    assert "127.0.0.1:1" in str(error)
    assert "hidden" not in str(error)


# The keys in the database


async def test_whoever_follows_the_keys_sees_every_change_and_nothing_else(
    new_database: Callable[[], str],
) -> None:
    database = Database(new_database())
    await database.migrate()
    store = KeyStore(database)
    marker = None
    for change in (None, "make", "make", "revoke", "expire", "delete"):
        if change == "make":
            key = await made(store)
        elif change == "revoke":
            await revoke(store, key)
        elif change == "expire":
            key = await made(store, ends_in=timedelta(days=1))
        elif change == "delete":
            async with database.session() as session:
                await session.execute(delete(ApiKey).where(ApiKey.id == key.id))
        changes = await store.changes(marker)
        assert changes is not None, change
        marker, records = changes
        assert records == await store.records()
        assert await store.changes(marker) is None
    assert [record.revoked_at is None for record in records] == [True, False]
    await database.close()


async def test_two_keys_of_a_new_tenant_are_made_at_once(new_database: Callable[[], str]) -> None:
    database = Database(new_database())
    await database.migrate()
    store = KeyStore(database)
    await asyncio.gather(*(made(store, "acme") for _ in range(4)))
    assert [record.tenant for record in await store.records()] == ["acme"] * 4
    await database.close()


# A gateway in this process


@pytest.fixture
async def store(url: str) -> AsyncIterator[KeyStore]:
    database = Database(url)
    await database.migrate()
    yield KeyStore(database)
    await database.close()


async def made(
    store: KeyStore, tenant: str = "acme", *, ends_in: timedelta | None = None
) -> KeyText:
    key, now = KeyText.random(), datetime.now(UTC)
    await store.create(key, tenant, "", None if ends_in is None else now + ends_in, now)
    return key


async def revoke(store: KeyStore, key: KeyText) -> None:
    assert await store.revoke(key.id, datetime.now(UTC)) is not None


@dataclass
class Gateway:
    """A gateway that listens, and what it sends to its scheduler."""

    http: httpx.AsyncClient
    submitted: list[SubmitRequest] = field(default_factory=list)

    async def get(self, token: str | None = None, path: str = "/v1/models") -> httpx.Response:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return await self.http.get(path, headers=headers)

    async def status(self, key: KeyText | None = None) -> int:
        return (await self.get(None if key is None else key.text)).status_code

    async def until(self, status: int, key: KeyText | None = None) -> None:
        """Ask until the answer has this status."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.status(key) != status:
                pass

    async def schedule(self, message: Message) -> Message:
        """Answer as a scheduler that is full."""
        if not isinstance(message, SubmitRequest):
            return Done()
        self.submitted.append(message)
        return SubmitReply(
            request_id=message.request.request_id,
            attempt=message.request.attempt,
            leader_epoch=1,
            status=SubmitStatus.REFUSED,
            reason="full",
            retry_after_s=1.0,
        )


@contextlib.asynccontextmanager
async def gateway(url: str, **changes: Any) -> AsyncIterator[Gateway]:
    """A whole gateway on a free port, over the memory bus."""
    world = MemoryWorld()
    settings = GatewaySettings.load(
        port=0, database_url=url, served_model_name=MODEL, request_log=False, **changes
    )
    service = GatewayService(settings, open_bus=world.open_bus)
    try:
        async with (
            world.running(service, settings),
            httpx.AsyncClient(base_url=service.url, timeout=DEADLINE_S) as http,
        ):
            found = Gateway(http)
            await (await world.bus()).serve(subjects.requests(MODEL), found.schedule)
            yield found
    finally:
        await world.close()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a refusal for its key, which has OpenAI's shape."""
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error: dict[str, Any] = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    return error


async def test_without_keys_everybody_is_let_in(url: str) -> None:
    async with gateway(url) as running:
        for token in (None, "none", "sk-whatever", KeyText.random().text):
            assert (await running.get(token)).status_code == 200


async def test_the_first_key_closes_the_door(url: str, store: KeyStore) -> None:
    async with gateway(url, key_period_s=0.05) as running:
        assert await running.status() == 200
        key = await made(store)
        await running.until(401)
        assert await running.status(key) == 200


async def test_every_bad_key_is_refused(url: str, store: KeyStore) -> None:
    good = await made(store)
    expired = await made(store, ends_in=timedelta(seconds=-1))
    revoked = await made(store)
    await revoke(store, revoked)
    wrong = KeyText(id=good.id, secret=revoked.secret)
    unknown = KeyText.random()
    async with gateway(url) as running:
        assert await running.status(good) == 200
        assert "needed" in error_of(await running.get())["message"]
        assert "revoked" in error_of(await running.get(revoked.text))["message"]
        assert "expired at" in error_of(await running.get(expired.text))["message"]
        strange = ["none", good.text[:-1], good.text + "x", good.text.upper(), good.secret]
        tokens = [wrong.text, unknown.text, *strange]
        messages = {error_of(await running.get(token))["message"] for token in tokens}
        assert messages == {"this API key is not known here"}
        # Who does not know the secret does not learn what has become of the key either.
        for known in (expired, revoked):
            guess = KeyText(id=known.id, secret=good.secret)
            assert error_of(await running.get(guess.text))["message"] in messages
        basic = await running.http.get(
            "/v1/models", headers={"authorization": f"Basic {good.text}"}
        )
        assert "needed" in error_of(basic)["message"]
        error_of(await running.get(path=f"/v1/models?api_key={good.text}"))


async def test_every_route_of_the_api_asks_for_a_key_and_no_other_does(
    url: str, store: KeyStore
) -> None:
    await made(store)
    async with gateway(url) as running:
        for path in ("/v1/models", f"/v1/models/{MODEL}"):
            error_of(await running.get(path=path))
        for path in (CHAT, "/v1/completions"):
            error_of(await running.http.post(path, content=b"{"))
        for path in ("/health/live", "/metrics", "/docs", "/openapi.json"):
            assert (await running.get(path=path)).status_code == 200


async def test_a_new_key_works_with_its_first_request(url: str, store: KeyStore) -> None:
    await made(store)
    async with gateway(url, key_period_s=NEVER_S) as running:
        assert await running.status(KeyText.random()) == 401
        key = await made(store)
        await running.until(200, key)  # at once, unless this machine is too slow for its patience


async def test_a_key_ends_by_itself(url: str, store: KeyStore) -> None:
    key = await made(store, ends_in=timedelta(seconds=1))
    async with gateway(url, key_period_s=NEVER_S) as running:
        await running.until(401, key)
        assert "expired at" in error_of(await running.get(key.text))["message"]
        assert await running.status() == 401


async def test_the_last_revocation_opens_no_gateway(url: str, store: KeyStore) -> None:
    key = await made(store)
    async with (
        gateway(url, key_period_s=0.05) as auto,
        gateway(url, key_period_s=0.05, require_keys="always") as always,
    ):
        await revoke(store, key)
        for running in (auto, always):
            await running.until(401, key)
        assert await auto.status() == 401
        assert await always.status() == 401


async def test_requests_carry_the_tenant_of_their_key(url: str, store: KeyStore) -> None:
    keys = {tenant: await made(store, tenant) for tenant in ("acme", "umbrella")}
    async with gateway(url) as running:
        for key in keys.values():
            headers = {"authorization": f"Bearer {key.text}"}
            answer = await running.http.post(CHAT, json=HELLO, headers=headers)
            assert answer.status_code == 429
        assert [message.request.tenant for message in running.submitted] == ["acme", "umbrella"]


async def test_nobody_names_a_request_of_another_tenant(url: str, store: KeyStore) -> None:
    mine, theirs = await made(store, "acme"), await made(store, "umbrella")
    async with gateway(url) as running:
        for key in (mine, theirs):  # the same name, as far as a client can give one
            headers = {"authorization": f"Bearer {key.text}", "x-request-id": "mine"}
            answer = await running.http.post(CHAT, json=HELLO, headers=headers)
            assert answer.headers["x-request-id"] == "mine"
        first, second = (message.request.request_id for message in running.submitted)
        assert first != second
        assert "mine" not in (first, second)
        for method in ("GET", "DELETE", "POST"):
            path = f"{CHAT}/{first}"
            headers = {"authorization": f"Bearer {theirs.text}"}
            answer = await running.http.request(method, path, headers=headers)
            assert answer.status_code == 404


async def test_known_keys_stay_as_they_are_while_the_database_does_not_answer(
    url: str, store: KeyStore, tmp_path: Path
) -> None:
    key, ended = await made(store), await made(store)
    async with gateway(url, key_period_s=0.05) as running:
        assert await running.status(ended) == 200
        file = sqlite3.connect(tmp_path / "state" / "banyan.db")
        with contextlib.closing(file), file:
            file.execute("ALTER TABLE api_keys RENAME TO hidden")
            file.execute("UPDATE hidden SET revoked_at = created_at WHERE id = ?", (ended.id,))
        errors = "banyan_gateway_key_read_errors_total 0.0\n"
        async with asyncio.timeout(DEADLINE_S):
            while errors in (await running.get(path="/metrics")).text:
                pass
        for known in (key, ended):
            assert await running.status(known) == 200
        assert await running.status(KeyText.random()) == 401
        file = sqlite3.connect(tmp_path / "state" / "banyan.db")
        with contextlib.closing(file), file:
            file.execute("ALTER TABLE hidden RENAME TO api_keys")
        await running.until(401, ended)
        assert await running.status(key) == 200


async def test_keys_are_read_while_somebody_else_writes(
    url: str, store: KeyStore, tmp_path: Path
) -> None:
    await made(store)
    async with gateway(url, key_period_s=NEVER_S) as running:
        key = await made(store)
        file = sqlite3.connect(tmp_path / "state" / "banyan.db", isolation_level=None)
        with contextlib.closing(file):
            file.execute("BEGIN IMMEDIATE")
            await running.until(200, key)
            file.execute("ROLLBACK")


@pytest.fixture
async def deaf_database() -> AsyncIterator[str]:
    """A PostgreSQL that takes connections and says nothing."""
    is_over = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await is_over.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield f"postgresql://me:hidden@127.0.0.1:{port}/banyan"
    is_over.set()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("require_keys", ["auto", "always"])
async def test_nobody_is_let_in_before_the_keys_have_been_read(
    deaf_database: str, require_keys: str
) -> None:
    async with gateway(deaf_database, require_keys=require_keys) as running:
        for token in (None, "none", KeyText.random().text):
            answer = await running.get(token)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == (
                "this gateway has not been able to read its API keys yet"
            )
            assert answer.headers["retry-after"] == "1"
        ready = await running.get(path="/health/ready")
        assert ready.json()["reasons"]["keys"] == "the API keys have not been read yet"


async def test_a_gateway_that_needs_no_keys_needs_no_database(deaf_database: str) -> None:
    async with gateway(deaf_database, require_keys="never") as running:
        assert await running.status() == 200
        assert await running.status(KeyText.random()) == 200


# Gateways as processes


class Process:
    """A gateway as ``python -m services.gateway`` with debug logs, which are kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._news = asyncio.Condition()
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    async def url(self) -> str:
        """Where it listens, once it does."""
        records = await self._until(lambda record: record["msg"].startswith("listening on "))
        return str(records["msg"]).removeprefix("listening on ")

    async def stop(self) -> None:
        self._process.terminate()
        await self._process.wait()
        await self._reading

    async def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S), self._news:
            while True:
                for line in self.lines:
                    if line.startswith("{") and is_it(json.loads(line)):
                        return dict(json.loads(line))
                await self._news.wait()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            async with self._news:
                self.lines.append(line.decode())
                self._news.notify_all()


@contextlib.asynccontextmanager
async def processes(directory: Path, url: str, count: int) -> AsyncIterator[list[Process]]:
    async with EmbeddedNats(directory) as nats:
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BANYAN_NATS_URL": nats.url,
            "BANYAN_DATABASE_URL": url,
            "BANYAN_GATEWAY_PORT": "0",
            "BANYAN_GATEWAY_ACCEPT_TIMEOUT_S": "0.1",
            "BANYAN_GATEWAY_CLOSE_TIMEOUT_S": "0.1",
            "BANYAN_LOG_LEVEL": "DEBUG",
        }
        running = [
            Process(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "services.gateway"),
                    cwd=ROOT,
                    env=environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                )
            )
            for _ in range(count)
        ]
        try:
            yield running
        finally:
            await asyncio.gather(*(process.stop() for process in running))


async def test_a_revocation_reaches_every_gateway_and_no_key_any_log(
    url: str, store: KeyStore, tmp_path: Path
) -> None:
    good, ended, unknown = await made(store), await made(store), KeyText.random()
    wrong = KeyText(id=good.id, secret=unknown.secret)
    async with processes(tmp_path, url, 2) as both:
        seen = ""
        for process in both:
            async with httpx.AsyncClient(base_url=await process.url(), timeout=30) as http:
                assert await Gateway(http).status(ended) == 200
        await revoke(store, ended)
        for process in both:
            async with httpx.AsyncClient(base_url=await process.url(), timeout=30) as http:
                await Gateway(http).until(401, ended)
                for key in (good, ended, unknown, wrong):
                    seen += await use_everywhere(http, key)
                seen += (await http.get("/metrics")).text
    assert "banyan_gateway_unauthorized_requests_total" in seen
    assert all('"level": "debug"' in process.log for process in both)
    for text in (seen, *(process.log for process in both)):
        for key in (good, ended, unknown):
            assert key.secret not in text


async def use_everywhere(http: httpx.AsyncClient, key: KeyText) -> str:
    """Send ``key`` where it belongs and where it does not; what came back."""
    right = {"authorization": f"Bearer {key.text}"}
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    upgrade["sec-websocket-key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    answers = [
        await http.get("/v1/models", headers=right),
        await http.get(f"/v1/models/{key.text}", headers=right),
        await http.get(f"/v1/models?api_key={key.text}", headers=right),
        await http.get(f"/v1/models?api_key={key.text}"),
        await http.get(f"/v1/{key.text}"),
        await http.get(f"/{key.text}?{key.text}", headers=upgrade),
        await http.get("/v1/models", headers={"authorization": key.text}),
        await http.get("/v1/models", headers={"x-api-key": key.text}),
        await http.get("/v1/models", headers={"authorization": f"Bearer {key.text} {key.text}"}),
        await http.post(CHAT, json={**HELLO, "model": key.text}, headers=right),
        await http.post(CHAT, json={**HELLO, "api_key": key.text}, headers=right),
        await http.post(CHAT, json={**HELLO, "n": key.text}, headers=right),
        await http.post(CHAT, json={**HELLO, "store": key.text}, headers=right),
        await http.post(CHAT, content=key.text, headers=right),
        await http.post(CHAT, content=key.text, headers={**right, "content-type": key.text}),
    ]
    assert all(answer.status_code < 500 or answer.status_code == 503 for answer in answers)
    return "\n".join(answer.text for answer in answers)
