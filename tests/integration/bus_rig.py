"""Two worlds for the same tests: the memory broker, and a real nats-server of one's own."""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from shared.bus import Bus
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.nats import NatsBus
from shared.bus.server import EmbeddedNats
from shared.messages.base import ErrorReply, Message, MessageCodec


class Ping(Message, frozen=True, kw_only=True):
    """A test message."""

    number: int
    padding: bytes = b""


class Pong(Message, frozen=True, kw_only=True):
    """A test reply."""

    number: int
    server: str = ""


class Stranger(Message, frozen=True, kw_only=True):
    """A message the codec under test does not know."""


CODEC = MessageCodec((Ping, Pong, ErrorReply))
STRANGE_CODEC = MessageCodec((Stranger, Pong, ErrorReply))
MAX_PAYLOAD_BYTES = 65_536


class Rig(ABC):
    """A broker, and the buses connected to it."""

    def __init__(self) -> None:
        self._buses: list[Bus] = []

    @abstractmethod
    def new_bus(self, codec: MessageCodec = CODEC) -> Bus:
        """A bus that is not connected yet."""

    @abstractmethod
    async def crash(self) -> None:
        """The broker dies without notice."""

    @abstractmethod
    async def come_back(self) -> None:
        """The broker is started again."""

    async def bus(self, codec: MessageCodec = CODEC) -> Bus:
        """A connected bus, closed with the rig."""
        bus = self.new_bus(codec)
        await bus.connect()
        self._buses.append(bus)
        return bus

    async def close(self) -> None:
        """Close every bus."""
        for bus in self._buses:
            await bus.close(timeout_s=1.0)


class MemoryRig(Rig):
    """In this process."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker(max_payload_bytes=MAX_PAYLOAD_BYTES)

    def new_bus(self, codec: MessageCodec = CODEC) -> Bus:
        return MemoryBus(codec, self.broker)

    async def crash(self) -> None:
        self.broker.stop()

    async def come_back(self) -> None:
        self.broker.start()


class NatsRig(Rig):
    """Over a nats-server on a free port."""

    def __init__(self, server: EmbeddedNats) -> None:
        super().__init__()
        self.server = server

    def new_bus(self, codec: MessageCodec = CODEC) -> Bus:
        return NatsBus(codec, self.server.url, name="test", reconnect_wait_s=0.02)

    async def crash(self) -> None:
        await self.server.kill()

    async def come_back(self) -> None:
        await self.server.start()


@contextlib.asynccontextmanager
async def open_rig(kind: str, directory: Path) -> AsyncIterator[Rig]:
    """The rig called ``kind``."""
    if kind == "memory":
        memory = MemoryRig()
        yield memory
        await memory.close()
        return
    async with EmbeddedNats(directory, max_payload_bytes=MAX_PAYLOAD_BYTES) as server:
        nats = NatsRig(server)
        yield nats
        await nats.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells: a counter, a property, another process."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def reconnected(*buses: Bus, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Do ``meanwhile``, and wait until each of ``buses`` has reconnected."""
    events = []
    for bus in buses:
        event = asyncio.Event()
        events.append(event)

        async def listener(event: asyncio.Event = event) -> None:
            event.set()

        bus.add_reconnect_listener(listener)
    await meanwhile()
    async with asyncio.timeout(10.0):
        for event in events:
            await event.wait()
