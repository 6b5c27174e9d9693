"""What a process says about itself, and the small HTTP server that says it.

``/health/live``   200 while the event loop answers and every liveness check passes, else 503
``/health/ready``  200 while the service takes work, else 503 with the reasons
``/metrics``       Prometheus text format

The server runs on the service's own event loop: a loop that is stuck does not answer, which is what
a liveness probe looks for.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import h11

from shared.metrics import Metrics

_log = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 16 * 1024
_CONNECTION_DEADLINE_S = 5.0

Check = Callable[[], str | None]
"""Why something is not well, or ``None`` when it is. Called on the event loop; must not block."""


class Phase(StrEnum):
    """Where a process is in its life; it only moves forward."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """The answer to one probe: ``reasons`` maps the failing checks to what they said."""

    ok: bool
    phase: Phase
    reasons: dict[str, str]


class Health:
    """The phase of the process, set by ``shared.runtime``, and the checks its parts add.

    Used from the event loop only. A check that raises counts as failing.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self._live: dict[str, Check] = {}
        self._ready: dict[str, Check] = {}

    def add_liveness_check(self, name: str, check: Check) -> None:
        """Have ``check`` decide, with the others, whether the process should be restarted."""
        self._live[name] = check

    def add_readiness_check(self, name: str, check: Check) -> None:
        """Have ``check`` decide, with the others, whether the process should be given work."""
        self._ready[name] = check

    def liveness(self) -> HealthReport:
        """Whether the process does what it should; ``ok=False`` asks for a restart."""
        reasons = _failing(self._live)
        return HealthReport(ok=not reasons, phase=self.phase, reasons=reasons)

    def readiness(self) -> HealthReport:
        """Whether the process takes work now: started, not draining, every check content."""
        if self.phase is not Phase.READY:
            return HealthReport(ok=False, phase=self.phase, reasons={"phase": self.phase.value})
        reasons = _failing(self._live) | _failing(self._ready)
        return HealthReport(ok=not reasons, phase=self.phase, reasons=reasons)


def _failing(checks: dict[str, Check]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for name, check in checks.items():
        try:
            reason = check()
        except Exception as error:  # a broken check is bad health, not a broken health server
            reason = f"the check itself failed: {error!r}"
        if reason is not None:
            reasons[name] = reason
    return reasons


class HealthServer:
    """Serves ``health`` and ``metrics`` over HTTP, one request a connection."""

    def __init__(self, health: Health, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen on ``host`` and return the port: a free one where ``port`` is 0.

        Raises ``OSError`` when the address cannot be had.
        """
        self._server = await asyncio.start_server(self._accept, host, port)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening and drop the connections that are open."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer), name="health connection")
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADER_BYTES)
        try:
            async with asyncio.timeout(_CONNECTION_DEADLINE_S):
                try:
                    request = await _read_request(protocol, reader)
                    status, content_type, body = self._answer(request)
                except h11.RemoteProtocolError as error:
                    status, content_type, body = error.error_status_hint, "text/plain", b""
                writer.write(_response(protocol, status, content_type, body))
                await writer.drain()
        except (TimeoutError, ConnectionError) as error:
            _log.debug("health connection dropped: %r", error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _answer(self, request: h11.Request) -> tuple[int, str, bytes]:
        path = request.target.decode("ascii").partition("?")[0]
        if request.method not in (b"GET", b"HEAD"):
            return 405, "text/plain", b"only GET and HEAD\n"
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", self._metrics.exposition()
        if path == "/health/live":
            return _as_json(self._health.liveness())
        if path == "/health/ready":
            return _as_json(self._health.readiness())
        return 404, "text/plain", b"/health/live, /health/ready or /metrics\n"


async def _read_request(protocol: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    """The head of the request; raises ``h11.RemoteProtocolError`` for anything else."""
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(await reader.read(4096))
        elif isinstance(event, h11.Request):
            return event
        else:
            raise ConnectionResetError("closed before a request came")


def _response(protocol: h11.Connection, status: int, content_type: str, body: bytes) -> bytes:
    headers = [
        ("content-type", content_type),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    head = protocol.send(h11.Response(status_code=status, headers=headers)) or b""
    return head + (protocol.send(h11.Data(data=body)) or b"")


def _as_json(report: HealthReport) -> tuple[int, str, bytes]:
    body = {"ok": report.ok, "phase": report.phase.value, "reasons": report.reasons}
    return (200 if report.ok else 503), "application/json", json.dumps(body).encode() + b"\n"
