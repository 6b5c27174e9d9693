"""Services in this process, over the memory bus and transport or over a real server and TCP."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from shared.bus.base import Bus
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.nats import NatsBus
from shared.bus.server import EmbeddedNats
from shared.config import ServiceSettings
from shared.messages import CODEC
from shared.metrics import Metrics
from shared.reporting import connect_bus, serve_drain
from shared.runtime import Deadlines, Release, Runtime, Service
from shared.transport.base import Transport
from shared.transport.memory import MemoryFabric, MemoryTransport
from shared.transport.tcp import TcpTransport


class World(ABC):
    """A control plane and a data plane, and what was opened on them."""

    def __init__(self) -> None:
        self._opened = contextlib.AsyncExitStack()

    def settings(self) -> dict[str, Any]:
        """What a service has to be told to find this world."""
        return {}

    @abstractmethod
    async def open_bus(self, settings: ServiceSettings, runtime: Runtime) -> Bus:
        """The bus of a service."""

    @abstractmethod
    def new_bus(self) -> Bus:
        """A bus that is not connected yet."""

    @abstractmethod
    def new_transport(self, *, verify: bool = True) -> Transport:
        """A transport that is not started yet."""

    async def bus(self) -> Bus:
        """A connected bus, closed with the world."""
        bus = self.new_bus()
        await bus.connect()
        self._opened.push_async_callback(bus.close)
        return bus

    async def transport(self, *, verify: bool = True) -> Transport:
        """A started transport, closed with the world."""
        transport = self.new_transport(verify=verify)
        await transport.start()
        self._opened.push_async_callback(transport.close)
        return transport

    @contextlib.asynccontextmanager
    async def running(self, service: Service, settings: ServiceSettings) -> AsyncIterator[Runtime]:
        """The service, ready; at the end it is stopped, and has to stop cleanly."""
        runtime = Runtime(settings, Metrics(), Deadlines(drain_s=5.0))
        assert await runtime.start(service)
        try:
            yield runtime
        finally:
            runtime.stop("the test is over")
            await runtime.wait_until_stopping()
            assert await runtime.shut_down(service) == 0

    async def close(self) -> None:
        """Close whatever was opened."""
        await self._opened.aclose()


class MemoryWorld(World):
    """All in this event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()
        self.fabric = MemoryFabric()

    async def open_bus(self, settings: ServiceSettings, runtime: Runtime) -> Bus:
        bus = self.new_bus()
        await bus.connect()
        runtime.on_release(Release.BUS, "bus", bus.close)
        await serve_drain(bus, runtime)
        return bus

    def new_bus(self) -> Bus:
        return MemoryBus(CODEC, self.broker)

    def new_transport(self, *, verify: bool = True) -> Transport:
        return MemoryTransport(self.fabric, verify=verify)


class RealWorld(World):
    """A nats-server of its own, and TCP on loopback."""

    def __init__(self, server: EmbeddedNats) -> None:
        super().__init__()
        self._server = server

    def settings(self) -> dict[str, Any]:
        return {"nats_url": self._server.url}

    async def open_bus(self, settings: ServiceSettings, runtime: Runtime) -> Bus:
        return await connect_bus(settings, runtime)

    def new_bus(self) -> Bus:
        return NatsBus(CODEC, self._server.url, name="test")

    def new_transport(self, *, verify: bool = True) -> Transport:
        return TcpTransport(verify=verify)


@contextlib.asynccontextmanager
async def open_world(kind: str, directory: Path) -> AsyncIterator[World]:
    """The world called ``kind``: ``memory`` or ``real``."""
    if kind == "memory":
        memory = MemoryWorld()
        try:
            yield memory
        finally:
            await memory.close()
        return
    async with EmbeddedNats(directory) as server:
        real = RealWorld(server)
        try:
            yield real
        finally:
            await real.close()
