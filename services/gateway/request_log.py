"""The request log: a row for each request that has ended, written behind the requests' backs.

A row is one request in the glossary's sense: a call with ``n = 3`` leaves three. Calls that were
turned away before they became requests (a wrong key, a bad body) leave none; those that no
scheduler took do.

Nothing here is ever waited for. Rows wait in memory, at most so many, and one task writes them in
batches. While the database is away they go on waiting; what does not fit is lost, the newest first,
and counted. Each row is in the log once, however often its batch had to be repeated.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite

from services.gateway.config import GatewaySettings
from services.gateway.ended_request import EndedRequest
from services.gateway.errors import api_error
from services.gateway.generation import GenerationRequest
from shared.db import Database, RequestRow
from shared.db.tables import ERROR_LENGTH, utc_now
from shared.errors import DatabaseError, DatabaseRefused
from shared.metrics import Metrics

log = logging.getLogger(__name__)

BATCH_ROWS = 500
BATCH_DELAY_S = 0.5
FIRST_RETRY_S = 0.25
LAST_RETRY_S = 5.0
RETENTION_PERIOD_S = 3600.0
RETENTION_FIRST_S = 300.0
DELETE_ROWS = 1000
DELETE_PAUSE_S = 0.1
"""Between two batches of deletions, for whoever else wants to write."""

_TABLE = RequestRow.metadata.tables[RequestRow.__tablename__]

Row = dict[str, Any]
"""The values of a ``RequestRow``; until it is written, its ``prompt`` is the request itself."""


class LogCounters:
    """The metrics of the request log, made once a process."""

    def __init__(self, metrics: Metrics) -> None:
        self.written = metrics.counter(
            "gateway", "log_written", "requests", "Requests written to the log"
        )
        self.lost = metrics.counter(
            "gateway", "log_lost", "requests", "Requests that are missing in the log", ["reason"]
        )
        self.pending = metrics.gauge(
            "gateway", "log_pending", "requests", "Requests that wait to be written to the log"
        )
        self.deleted = metrics.counter(
            "gateway", "log_deleted", "requests", "Requests deleted from the log for their age"
        )
        self.errors = metrics.counter(
            "gateway", "log_database", "errors", "Times that the database failed the request log"
        )


class RequestLog:
    """Takes ended requests and has them written; ``run`` and ``run_retention`` are kept running."""

    def __init__(
        self,
        database: Database,
        settings: GatewaySettings,
        metrics: Metrics,
        *,
        prompt_text: Callable[[GenerationRequest], str],
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """``prompt_text`` is asked for only with ``log_prompts``, in a thread."""
        self._database = database
        self._gateway = settings.instance
        self._max_pending = settings.request_log_max_pending
        self._retention_days = settings.request_log_retention_days
        self._prompt_text = prompt_text if settings.log_prompts else None
        self._now = now
        self._counters = LogCounters(metrics)
        self._pending: deque[Row] = deque()
        self._batch: list[Row] = []
        """What is being written, or was not; goes before everything in ``_pending``."""
        self._is_closed = False
        self._is_schema_known = False
        self._num_failures = 0
        """Of the database in a row."""
        self._num_lost = 0
        """Since the database began to fail."""
        self._has_rows = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._is_due = asyncio.Event()
        self._is_flushing = asyncio.Event()

    def add(self, ended: EndedRequest) -> None:
        """Have ``ended`` written some time; costs microseconds and cannot fail."""
        if self._is_closed or self._num_pending >= self._max_pending:
            self._lose(1, "shutdown" if self._is_closed else "full")
            return
        self._pending.append(self._row(ended))
        self._look_at_pending()

    async def run(self) -> None:
        """Write what was added, into tables made if need be. Runs until cancelled."""
        while True:
            try:
                if not self._is_schema_known:
                    await self._database.migrate()
                    self._is_schema_known = True
                await self._has_rows.wait()
                await _wait(self._is_due, BATCH_DELAY_S)
                await self._write_batch()
            except Exception as error:  # whatever it is, requests go on, and so does their log
                self._note_failure(error)
                await self._pause()

    async def flush(self, deadline_s: float) -> None:
        """Write what waits, now; what is left after ``deadline_s``, or comes later, is lost."""
        self._is_flushing.set()
        self._look_at_pending()
        await _wait(self._is_empty, deadline_s)
        self._is_closed = True
        if self._num_pending:
            self._lose(self._num_pending, "shutdown")
            log.error("%d requests are missing in the log", self._num_lost)
            self._pending.clear()
            self._batch = []
            self._look_at_pending()

    async def run_retention(self) -> None:
        """Delete what is too old, about once an hour. Runs until cancelled."""
        if not self._retention_days:
            return
        await asyncio.sleep(random.uniform(0.0, RETENTION_FIRST_S))
        while True:
            try:
                await self.delete_expired()
            except Exception as error:  # as in ``run``; the next round will find the same rows
                self._counters.errors.inc()
                log.warning("old requests were not deleted from the log: %s", error)
            # Gateways that were started together do not go on doing this together.
            await asyncio.sleep(RETENTION_PERIOD_S * random.uniform(0.5, 1.5))

    async def delete_expired(self) -> int:
        """Delete all rows older than the retention, few at a time; returns their number."""
        oldest = self._now() - timedelta(days=self._retention_days)
        expired = (
            select(_TABLE.c.request_id)
            .where(_TABLE.c.received_at < oldest)
            .limit(DELETE_ROWS)
            .with_for_update(skip_locked=True)  # PostgreSQL: another gateway is at those
        )
        statement = delete(_TABLE).where(_TABLE.c.request_id.in_(expired))
        num_deleted = 0
        while True:
            async with self._database.session() as session:
                connection = await session.connection()
                num_rows = (await connection.execute(statement)).rowcount
            num_deleted += num_rows
            self._counters.deleted.inc(num_rows)
            if num_rows < DELETE_ROWS:
                return num_deleted
            await asyncio.sleep(DELETE_PAUSE_S)

    async def _write_batch(self) -> None:
        """Write the oldest rows and forget them; raises and keeps them if that fails."""
        while self._pending and len(self._batch) < BATCH_ROWS:
            self._batch.append(self._pending.popleft())
        rows = self._batch
        await self._fill_in_prompts(rows)
        try:
            await self._insert(rows)
        except DatabaseRefused:
            await self._insert_one_by_one(rows)
        else:
            self._counters.written.inc(len(rows))
        self._batch = []
        self._look_at_pending()
        if self._num_failures:
            log.info("the request log is written again; %d requests are missing", self._num_lost)
            self._num_failures = self._num_lost = 0

    async def _insert(self, rows: list[Row]) -> None:
        # A batch whose commit was not confirmed may be there already.
        statement = (
            sqlite.insert(_TABLE).on_conflict_do_nothing()
            if self._database.is_sqlite
            else postgresql.insert(_TABLE).on_conflict_do_nothing()
        )
        async with self._database.session() as session:
            await session.execute(statement, rows)

    async def _insert_one_by_one(self, rows: list[Row]) -> None:
        """One row that the database does not take shall not keep all others out.

        Takes each from ``rows`` when it is done with it.
        """
        while rows:
            try:
                await self._insert(rows[:1])
            except DatabaseRefused as error:
                request_id = rows[0]["request_id"]
                log.error("not taken into the log: %s", error, extra={"request_id": request_id})
                self._lose(1, "refused")
            else:
                self._counters.written.inc()
            del rows[0]

    async def _fill_in_prompts(self, rows: list[Row]) -> None:
        render = self._prompt_text
        waiting = [row for row in rows if isinstance(row["prompt"], GenerationRequest)]
        if render is None or not waiting:
            return
        texts = await asyncio.to_thread(lambda: [render(row["prompt"]) for row in waiting])
        for row, text in zip(waiting, texts, strict=True):
            row["prompt"] = _storable(text)

    def _row(self, ended: EndedRequest) -> Row:
        request = ended.request
        error = None if ended.error is None else api_error(ended.error).detail
        return {
            "request_id": request.request_id,
            "client_request_id": request.client_request_id,
            "num_attempts": ended.num_attempts,
            "tenant": request.tenant,
            "key_id": request.key_id,
            "gateway": self._gateway,
            "model": request.model,
            "api": request.api,
            "is_stream": request.is_stream,
            "priority": request.priority,
            "received_at": self._now() - timedelta(seconds=ended.e2e_s),
            "prompt_tokens": len(request.prompt_token_ids),
            "cached_tokens": ended.num_cached_tokens,
            "output_tokens": ended.num_output_tokens,
            "max_tokens": request.sampling.max_tokens,
            "state": ended.state.value,
            "finish_reason": None if ended.finish_reason is None else ended.finish_reason.value,
            "error_code": None if error is None else error.code or error.type,
            "error": None if error is None else _storable(error.message)[:ERROR_LENGTH],
            "ttft_s": ended.ttft_s,
            "tpot_s": ended.tpot_s,
            "e2e_s": ended.e2e_s,
            "slo_ttft_ms": _milliseconds(request.slo.ttft_s),
            "slo_tpot_ms": _milliseconds(request.slo.tpot_s),
            "slo_e2e_ms": _milliseconds(request.slo.e2e_s),
            "is_ttft_met": ended.is_ttft_met,
            "is_tpot_met": ended.is_tpot_met,
            "is_e2e_met": ended.is_e2e_met,
            "prompt": None if self._prompt_text is None else request,
        }

    @property
    def _num_pending(self) -> int:
        return len(self._pending) + len(self._batch)

    def _look_at_pending(self) -> None:
        """Set the events and the gauge to what is pending now."""
        num_pending = self._num_pending
        self._counters.pending.set(num_pending)
        _set_if(self._has_rows, num_pending > 0)
        _set_if(self._is_empty, num_pending == 0)
        _set_if(self._is_due, num_pending >= BATCH_ROWS or self._is_flushing.is_set())

    def _lose(self, num_rows: int, reason: str) -> None:
        self._counters.lost.labels(reason=reason).inc(num_rows)
        if not self._num_lost:
            log.error("the request log has begun to lose requests (%s)", reason)
        self._num_lost += num_rows

    def _note_failure(self, error: Exception) -> None:
        """Count it, and say so aloud at the first of a row."""
        self._counters.errors.inc()
        self._is_schema_known = False  # what comes back may be an empty database
        self._num_failures += 1
        if isinstance(error, DatabaseError):
            level = logging.WARNING if self._num_failures == 1 else logging.DEBUG
            log.log(level, "the request log cannot be written, it is kept in memory: %s", error)
        else:
            log.error("the request log failed", exc_info=error)

    async def _pause(self) -> None:
        """After a failure, longer each time; short when time is running out."""
        if self._is_flushing.is_set():
            await asyncio.sleep(FIRST_RETRY_S)
            return
        pause_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(self._num_failures - 1, 10))
        await _wait(self._is_flushing, pause_s * random.uniform(0.5, 1.0))


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Return when ``event`` is set, after ``timeout_s`` at the latest."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _set_if(event: asyncio.Event, is_set: bool) -> None:
    if is_set:
        event.set()
    else:
        event.clear()


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 6)


def _storable(text: str) -> str:
    """``text`` without what PostgreSQL cannot store."""
    return text.replace("\0", "")
