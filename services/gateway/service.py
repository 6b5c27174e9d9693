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
from services.gateway.config import GatewaySettings
from services.gateway.counters import GatewayCounters
from services.gateway.routes_openai import EdgeLimits
from services.gateway.served_model import ServedModel
from services.gateway.suite import Suite
from services.gateway.tracker import RequestTracker
from shared.clock import MonotonicClock
from shared.reporting import OpenBus, Reporter, connect_bus
from shared.runtime import Runtime, Service

log = logging.getLogger(__name__)

CLOSE_CONNECTIONS_S = 1.0


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
        self._socket = _listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        """Where clients on this host reach this gateway."""

    async def start(self, runtime: Runtime) -> None:
        """Join the bus and open the port."""
        settings = self._settings
        clock = MonotonicClock()
        bus = await self._open_bus(settings, runtime)
        self._tracker = RequestTracker(bus, settings, clock, GatewayCounters(runtime.metrics))
        await self._tracker.start()
        suite = Suite(settings, clock, on_max_model_len=self._limit_context)
        await suite.start(bus)
        runtime.health.add_readiness_check("suite", suite.missing)
        self._reporter = Reporter(
            bus,
            role="gateway",
            instance=settings.instance,
            model=settings.served_model_name,
            gauges=lambda: {"num_live": float(self._tracker.num_live)},
            labels=lambda: {"url": self.url},
        )
        app = create_app(
            generator=self._tracker,
            models=self._models,
            health=runtime.health,
            metrics=runtime.metrics,
            limits=EdgeLimits(max_body_bytes=settings.max_body_bytes),
            clock=clock,
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False
        )
        self._server = _Server(config)
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
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.wait([self._serving])
                await self._tracker.idle()
        except TimeoutError:
            log.warning("%d requests are cut off", self._tracker.num_live)
            self._server.force_exit = True
            await asyncio.wait([self._serving], timeout=CLOSE_CONNECTIONS_S)
        await self._reporter.leave()

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
