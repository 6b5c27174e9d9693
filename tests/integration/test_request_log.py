"""The request log: what it says of each request, and that no database can make a request fail."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select, text

from bench.equality import BUNDLED
from bench.postgres import Postgres
from bench.suite import free_port
from services.gateway.config import GatewaySettings
from services.gateway.ended_request import EndedRequest
from services.gateway.generation import GenerationRequest
from services.gateway.request_log import RequestLog
from services.gateway.service import GatewayService
from shared.bus.base import Bus
from shared.core.lifecycle import RequestState
from shared.core.request import FinishReason, SamplingParams
from shared.db import Database, RequestRow
from shared.db.tables import utc_now
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.requests import Done, SubmitReply, SubmitRequest, SubmitStatus
from shared.messages.tokens import TokenBatch, TokenDelta
from shared.metrics import Metrics
from tests.gateway_app import CHAT, TEXT, token_ids
from tests.integration.service_rig import open_world

MODEL = "tiny-chat"
STOP_TOKEN = 2
FLUSH_S = 30.0
WRITTEN = "banyan_gateway_log_written_requests_total"
LOST = "banyan_gateway_log_lost_requests_total"
PENDING = "banyan_gateway_log_pending_requests"


# The log by itself


def ended(request_id: str, **more: Any) -> EndedRequest:
    request: dict[str, Any] = {
        "request_id": request_id,
        "index": 0,
        "model": MODEL,
        "prompt_token_ids": (1, 2, 3),
        "sampling": SamplingParams(max_tokens=9),
    }
    known: dict[str, Any] = {
        "state": RequestState.FINISHED,
        "num_attempts": 1,
        "num_cached_tokens": 0,
        "num_output_tokens": 5,
        "finish_reason": FinishReason.LENGTH,
        "error": None,
        "accepted_s": 10.0,
        "first_token_s": 10.5,
        "last_token_s": 12.5,
        "ended_s": 12.5,
    }
    request |= {name: more.pop(name) for name in list(more) if name not in known}
    return EndedRequest(request=GenerationRequest(**request), **{**known, **more})


@dataclass
class Rig:
    log: RequestLog
    metrics: Metrics
    failures: "Failures"

    def add(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.log.add(ended(request_id))

    def lost(self, reason: str) -> float:
        return self.metrics.value(LOST, {"reason": reason}) or 0.0

    @property
    def num_lost(self) -> float:
        return sum(self.lost(reason) for reason in ("full", "refused", "shutdown"))

    async def until_it_failed(self) -> None:
        """Return once writing has failed once more."""
        self.failures.event.clear()
        async with asyncio.timeout(20):
            await self.failures.event.wait()


class Failures(logging.Handler):
    """Hears what the log says of each failure."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "cannot be written" in record.getMessage():
            self.event.set()


@contextlib.asynccontextmanager
async def running_log(
    url: str,
    *,
    timeout_s: float = 10.0,
    now: Callable[[], datetime] = utc_now,
    **settings: Any,
) -> AsyncIterator[Rig]:
    database, metrics = Database(url, timeout_s=timeout_s), Metrics()
    loaded = GatewaySettings.load(instance="gate-1", model=str(BUNDLED), **settings)
    request_log = RequestLog(database, loaded, metrics, prompt_text=lambda _: "a\0 prompt", now=now)
    running = asyncio.create_task(request_log.run())
    failures, logger = Failures(), logging.getLogger(RequestLog.__module__)
    logger.addHandler(failures)
    logger.setLevel(logging.DEBUG)
    try:
        yield Rig(request_log, metrics, failures)
    finally:
        logger.removeHandler(failures)
        running.cancel()
        await asyncio.wait([running])
        await database.close()


async def rows_of(url: str) -> Sequence[RequestRow]:
    database = Database(url)
    async with database.session() as session:
        found = (await session.scalars(select(RequestRow).order_by(RequestRow.request_id))).all()
    await database.close()
    return found


async def count(url: str) -> int:
    database = Database(url)
    async with database.session() as session:
        number = (await session.execute(select(func.count()).select_from(RequestRow))).scalar_one()
    await database.close()
    return number


async def test_what_is_added_is_written_once(new_database: Callable[[], str]) -> None:
    url = new_database()
    async with running_log(url, log_prompts=True) as rig:
        rig.add("a", "b", "a")
        rig.log.add(ended("c", state=RequestState.FAILED, error=ValueError("x\0" * 999)))
        await rig.log.flush(FLUSH_S)
        assert rig.metrics.value(PENDING) == 0
    rows = await rows_of(url)
    assert [row.request_id for row in rows] == ["a", "b", "c"]
    assert (rows[0].tpot_s, rows[0].e2e_s) == (0.5, 2.5)
    assert (rows[0].gateway, rows[0].prompt) == ("gate-1", "a prompt")
    assert abs(rows[0].received_at - datetime.now(UTC)) < timedelta(seconds=60)
    assert (rows[2].state, rows[2].error_code) == ("failed", "internal_error")


async def test_many_are_written_in_batches(new_database: Callable[[], str]) -> None:
    url = new_database()
    async with running_log(url) as rig:
        rig.add(*(f"{number:04}" for number in range(1234)))
        await rig.log.flush(FLUSH_S)
        assert rig.metrics.value(WRITTEN) == 1234
    assert await count(url) == 1234


async def test_what_does_not_fit_is_lost_and_counted(new_database: Callable[[], str]) -> None:
    url = new_database()
    async with running_log(url, request_log_max_pending=3) as rig:
        rig.add("a", "b", "c", "d", "e")  # the task that writes has had no turn yet
        assert (rig.metrics.value(PENDING), rig.lost("full")) == (3, 2)
        await rig.log.flush(FLUSH_S)
    assert [row.request_id for row in await rows_of(url)] == ["a", "b", "c"]


async def test_rows_wait_for_a_database_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("")
    url = f"sqlite:///{tmp_path}/in-the-way/banyan.db"
    async with running_log(url, request_log_max_pending=4) as rig:
        rig.add("a", "b")
        await rig.until_it_failed()
        rig.add("c", "d", "e")
        assert (rig.metrics.value(PENDING), rig.lost("full")) == (4, 1)
        (tmp_path / "in-the-way").unlink()
        await rig.log.flush(FLUSH_S)
        assert rig.metrics.value(WRITTEN) == 4
    assert await count(url) == 4


async def test_what_cannot_be_written_by_the_end_is_lost_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("")
    async with running_log(f"sqlite:///{tmp_path}/in-the-way/banyan.db") as rig:
        rig.add("a", "b")
        await rig.until_it_failed()
        rig.add("c")
        await rig.log.flush(0.1)
        rig.add("d")
        assert (rig.lost("shutdown"), rig.metrics.value(PENDING)) == (4, 0)


async def test_one_row_that_is_refused_does_not_keep_the_others_out(postgres: Postgres) -> None:
    url = postgres.create(f"test_{uuid.uuid4().hex}")
    async with running_log(url) as rig:
        rig.add("a")
        rig.log.add(ended("b", tenant="t" * 65))
        rig.add("c")
        await rig.log.flush(FLUSH_S)
        assert (rig.metrics.value(WRITTEN), rig.lost("refused")) == (2, 1)
    assert [row.request_id for row in await rows_of(url)] == ["a", "c"]


async def test_nothing_is_lost_while_the_server_is_stopped_and_started(postgres: Postgres) -> None:
    url = postgres.create(f"test_{uuid.uuid4().hex}")
    async with running_log(url) as rig:
        rig.add(*(f"before-{number}" for number in range(700)))
        await asyncio.sleep(0)  # its first batch is on its way, perhaps
        await asyncio.to_thread(postgres.stop)
        try:
            rig.add(*(f"while-{number}" for number in range(700)))
            await rig.until_it_failed()
        finally:
            await asyncio.to_thread(postgres.start)
        rig.add(*(f"after-{number}" for number in range(100)))
        await rig.log.flush(FLUSH_S)
        assert rig.num_lost == 0
    assert await count(url) == 1500


async def test_a_server_that_comes_back_empty_gets_its_tables_again(postgres: Postgres) -> None:
    name = f"test_{uuid.uuid4().hex}"
    url = postgres.create(name)
    async with running_log(url) as rig:
        rig.add("a")
        await rig.log.flush(FLUSH_S)
    postgres.query(f"DROP DATABASE {name} WITH (FORCE)")
    async with running_log(url) as rig:
        rig.add("b")
        await rig.until_it_failed()
        postgres.create(name)
        await rig.log.flush(FLUSH_S)
    assert [row.request_id for row in await rows_of(url)] == ["b"]


async def test_a_database_that_hangs_is_tried_again(postgres: Postgres) -> None:
    url = postgres.create(f"test_{uuid.uuid4().hex}")
    other = Database(url)
    await other.migrate()
    async with running_log(url, timeout_s=0.3) as rig:
        async with other.session() as locking:
            await locking.execute(text("LOCK TABLE requests IN ACCESS EXCLUSIVE MODE"))
            rig.add("a")
            await rig.until_it_failed()
            await rig.until_it_failed()
        await rig.log.flush(FLUSH_S)
    assert await count(url) == 1
    await other.close()


async def test_only_what_is_too_old_is_deleted(new_database: Callable[[], str]) -> None:
    url = new_database()
    today = datetime(2026, 8, 1, tzinfo=UTC)
    async with running_log(url, now=lambda: today - timedelta(days=31)) as rig:
        rig.add(*(f"old-{number}" for number in range(2100)))
        await rig.log.flush(FLUSH_S)
    async with running_log(url, now=lambda: today - timedelta(days=29)) as rig:
        rig.add("new-1", "new-2")
        await rig.log.flush(FLUSH_S)
    async with (
        running_log(url, now=lambda: today) as one,
        running_log(url, now=lambda: today) as another,
    ):
        deleted = await asyncio.gather(one.log.delete_expired(), another.log.delete_expired())
    assert sum(deleted) == 2100
    assert [row.request_id for row in await rows_of(url)] == ["new-1", "new-2"]


# In the gateway


class Answers:
    """The leader and the worker behind it; what they do is chosen by a request's priority."""

    ANSWER, GO_ON, REFUSE, FAIL, STAY_SILENT = range(5)

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._output = (*token_ids("Roots hang from its branches."), STOP_TOKEN)
        self.is_silent = asyncio.Event()

    async def serve(self, message: Message) -> Message:
        if not isinstance(message, SubmitRequest):
            return Done()
        request = message.request
        status = SubmitStatus.QUEUED
        match request.priority:
            case self.ANSWER | self.GO_ON:
                first, rest, last = self._output[:1], self._output[1:-1], self._output[-1:]
                await self._send(message, token_ids=first, num_cached_tokens=2)
                await self._send(message, offset=1, token_ids=rest)
                if request.priority == self.ANSWER:
                    end = {"token_ids": last, "finish_reason": FinishReason.STOP}
                    await self._send(message, offset=1 + len(rest), **end)
            case self.REFUSE:
                status = SubmitStatus.REFUSED
            case self.FAIL:
                await self._send(message, error="the device is gone")
            case _:
                self.is_silent.set()
        return SubmitReply(
            request_id=request.request_id,
            attempt=request.attempt,
            leader_epoch=1,
            status=status,
            reason="the queue is full" if status is SubmitStatus.REFUSED else "",
        )

    async def _send(self, message: SubmitRequest, offset: int = 0, **delta: Any) -> None:
        key = message.request.key
        made = TokenDelta(request_id=key.request_id, attempt=key.attempt, offset=offset, **delta)
        batch = TokenBatch(instance="decode-1", deltas=(made,))
        await self._bus.publish(subjects.tokens_to(message.gateway), batch)


@dataclass
class Gateway:
    http: httpx.AsyncClient
    answers: Answers
    metrics: Metrics


@contextlib.asynccontextmanager
async def running_gateway(directory: Path, url: str, **more: Any) -> AsyncIterator[Gateway]:
    async with open_world("memory", directory) as world:
        bus = await world.bus()
        answers = Answers(bus)
        await bus.serve(subjects.requests(MODEL), answers.serve)
        settings = GatewaySettings.load(
            instance="gate-1", model=str(BUNDLED), port=0, database_url=url, max_failures=1, **more
        )
        service = GatewayService(settings, open_bus=world.open_bus)
        async with (
            world.running(service, settings) as runtime,
            httpx.AsyncClient(base_url=service.url, timeout=30) as http,
        ):
            yield Gateway(http, answers, runtime.metrics)


def chat(priority: int = Answers.ANSWER, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is a banyan?"}]
    return {"model": MODEL, "messages": messages, "max_tokens": 40, "priority": priority, **more}


async def test_every_request_leaves_a_row_that_says_what_became_of_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/banyan.db"
    async with running_gateway(tmp_path, url) as gateway:
        http = gateway.http
        slo = {"ttft_ms": 60_000, "e2e_ms": 0.001}
        headers = {"x-request-id": "theirs"}
        response = await http.post(CHAT, json=chat(slo=slo), headers=headers)
        usage = response.json()["usage"]
        two = {"model": MODEL, "prompt": "A banyan", "n": 2, "stream": True, "stop": "hang"}
        assert (await http.post(TEXT, json=two | {"priority": Answers.GO_ON})).status_code == 200
        assert (await http.post(CHAT, json=chat(Answers.REFUSE))).status_code == 429
        assert (await http.post(CHAT, json=chat(Answers.FAIL))).status_code == 500
        leaving = asyncio.create_task(http.post(CHAT, json=chat(Answers.STAY_SILENT)))
        await gateway.answers.is_silent.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        assert (await http.post(CHAT, json=chat(max_tokens="many"))).status_code == 400
    rows = sorted(await rows_of(url), key=lambda row: row.received_at)
    answered, *stopped, refused, failed, gone = rows
    assert (answered.client_request_id, answered.api, answered.is_stream) == (
        "theirs",
        "chat",
        False,
    )
    assert (answered.state, answered.finish_reason, answered.error) == ("finished", "stop", None)
    assert answered.prompt_tokens == usage["prompt_tokens"]
    assert answered.output_tokens == usage["completion_tokens"]
    assert (answered.cached_tokens, answered.max_tokens, answered.num_attempts) == (2, 40, 1)
    assert answered.ttft_s is not None and 0 <= answered.ttft_s <= answered.e2e_s
    assert (answered.slo_ttft_ms, answered.slo_tpot_ms, answered.slo_e2e_ms) == (
        60_000,
        None,
        0.001,
    )
    assert (answered.is_ttft_met, answered.is_tpot_met, answered.is_e2e_met) == (True, None, False)
    assert answered.prompt is None
    assert [row.finish_reason for row in stopped] == ["stop", "stop"]
    assert {row.request_id[-2:] for row in stopped} == {"-0", "-1"}
    assert {(row.api, row.is_stream, row.state) for row in stopped} == {
        ("completion", True, "finished")
    }
    assert (refused.state, refused.error_code) == ("failed", "rate_limit_exceeded")
    assert refused.error == "the queue is full"
    assert (failed.state, failed.error_code, failed.num_attempts) == ("failed", "request_failed", 2)
    assert failed.error == "decode-1: the device is gone"
    assert (gone.state, gone.error_code, gone.ttft_s) == ("cancelled", None, None)


async def test_prompts_are_kept_only_when_that_is_asked_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/banyan.db"
    async with running_gateway(tmp_path, url, log_prompts=True) as gateway:
        assert (await gateway.http.post(CHAT, json=chat())).status_code == 200
    [row] = await rows_of(url)
    assert row.prompt is not None and "What is a banyan?" in row.prompt


async def test_the_log_can_be_switched_off(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/banyan.db"
    async with running_gateway(tmp_path, url, request_log=False) as gateway:
        assert (await gateway.http.post(CHAT, json=chat())).status_code == 200
    database = Database(url)
    await database.migrate()
    await database.close()
    assert await count(url) == 0


async def test_a_gateway_without_its_database_starts_answers_and_stops(tmp_path: Path) -> None:
    url = f"postgresql://banyan@127.0.0.1:{free_port()}/banyan"
    async with running_gateway(tmp_path, url, require_keys="never") as gateway:
        responses = [await gateway.http.post(CHAT, json=chat()) for _ in range(5)]
        assert [response.status_code for response in responses] == [200] * 5
        assert gateway.metrics.value(PENDING) == 5
    assert gateway.metrics.value(LOST, {"reason": "shutdown"}) == 5
