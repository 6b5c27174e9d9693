"""The gateway process: the HTTP edge on one side, the bus on the other."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import uvicorn

from services.gateway.api import create_app
from services.gateway.auth import KeyCounters, KeyGuard
from services.gateway.config import GatewaySettings
from services.gateway.counters import GatewayCounters
from services.gateway.ended_request import EndedRequest
from services.gateway.generation import GenerationRequest
from services.gateway.identity import Authenticate, let_everybody_in
from services.gateway.request_log import RequestLog
from services.gateway.routes_openai import EdgeLimits
from services.gateway.served_model import ServedModel
from services.gateway.suite import Suite
from services.gateway.tracker import RequestTracker
from shared.clock import Clock, MonotonicClock
from shared.db import Database
from shared.reporting import OpenBus, Reporter, connect_bus
from shared.runtime import Release, Runtime, Service

log = logging.getLogger(__name__)

CLOSE_CONNECTIONS_S = 1.0
MIN_FLUSH_S = 0.5
"""For the request log, even if the drain took all its time; ``Deadlines.hand_over_s`` has it."""
MAX_FLUSH_S = 3.0


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: signals are the runtime's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield


class GatewayService(Service):
    """Serves the OpenAI API and owns each request until its client has the last byte."""

    def __init__(self, settings: GatewaySettings, *, open_bus: OpenBus = connect_bus) -> None:
        self._settings = settings
        self._open_bus = open_bus
        model = ServedModel.from_model_dir(
            Path(settings.model),
            name=settings.served_model_name,
            max_model_len=settings.max_model_len,
        )
        self._models = {model.name: model}
        self._database = Database(settings.database_url)
        self._socket = _listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        """Where clients on this host reach this gateway."""

    async def start(self, runtime: Runtime) -> None:
        """Join the bus and open the port."""
        settings = self._settings
        clock = MonotonicClock()
        bus = await self._open_bus(settings, runtime)
        runtime.on_release(Release.BUS, "database", self._database.close)
        self._log = RequestLog(
            self._database, settings, runtime.metrics, prompt_text=self._prompt_text
        )
        counters = GatewayCounters(runtime.metrics)
        self._tracker = RequestTracker(bus, settings, clock, counters, on_end=self._on_end)
        await self._tracker.start()
        suite = Suite(settings, clock, on_max_model_len=self._limit_context)
        await suite.start(bus)
        runtime.health.add_readiness_check("suite", suite.missing)
        self._reporter = Reporter(
            bus,
            role="gateway",
            instance=settings.instance,
            model=settings.served_model_name,
            gauges=lambda: {"num_live": float(self._tracker.num_live), **counters.totals()},
            labels=lambda: {"url": self.url},
        )
        app = create_app(
            generator=self._tracker,
            models=self._models,
            health=runtime.health,
            metrics=runtime.metrics,
            authenticate=await self._authentication(runtime, clock),
            limits=EdgeLimits(max_body_bytes=settings.max_body_bytes),
            clock=clock,
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ws="none",  # there are none, and uvicorn logs their addresses, with keys in the query
            lifespan="off",
            server_header=False,
        )
        self._server = _Server(config)
        if settings.request_log:
            runtime.spawn(self._log.run(), name="request log")
            runtime.spawn(self._log.run_retention(), name="request log's retention")
        runtime.spawn(self._tracker.run(), name="tracker")
        runtime.spawn(suite.run(), name="suite")
        runtime.spawn(self._reporter.run(), name="reports")
        self._serving = runtime.spawn(self._server.serve([self._socket]), name="http")
        log.info("listening on %s", self.url)

    async def stop_intake(self) -> None:
        """Take no new connection; answers under way go on."""
        await self._reporter.drain()
        self._server.should_exit = True

    async def drain(self, deadline_s: float) -> None:
        """Wait until every answer is written; what is left at the deadline is cancelled."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.wait([self._serving])
                await self._tracker.idle()
        except TimeoutError:
            log.warning("%d requests are cut off", self._tracker.num_live)
            self._server.force_exit = True
            await asyncio.wait([self._serving], timeout=CLOSE_CONNECTIONS_S)
        await self._reporter.leave()
        left_s = deadline - asyncio.get_running_loop().time()
        await self._log.flush(min(MAX_FLUSH_S, max(MIN_FLUSH_S, left_s)))

    async def _authentication(self, runtime: Runtime, clock: Clock) -> Authenticate:
        """How callers are told apart, ready to do so."""
        settings = self._settings
        if settings.require_keys == "never":
            return let_everybody_in
        guard = KeyGuard(
            self._database,
            clock,
            KeyCounters(runtime.metrics),
            is_always_required=settings.require_keys == "always",
            period_s=settings.key_period_s,
        )
        runtime.health.add_readiness_check("keys", guard.missing)
        runtime.spawn(guard.run(), name="keys")
        await guard.first_read()
        return guard.authenticate

    def _on_end(self, ended: EndedRequest) -> None:
        if self._settings.request_log:
            self._log.add(ended)

    def _prompt_text(self, request: GenerationRequest) -> str:
        """For the request log."""
        return self._models[request.model].tokenizer.decode(request.prompt_token_ids)

    def _limit_context(self, max_model_len: int) -> None:
        """A worker holds less context than the model was made for: that is what is served."""
        for name, model in self._models.items():
            if max_model_len < model.max_model_len:
                log.info("the context is limited to %d tokens", max_model_len)
                self._models[name] = replace(model, max_model_len=max_model_len)


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything is started, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener
