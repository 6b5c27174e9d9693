"""What the bus costs over NATS, and how much of that is ours rather than nats-py's.

    python -m bench.micro.bus [--requests N] [--messages N] [--repeats N] [--loop uvloop|asyncio]
                              [--out FILE]

Starts a nats-server, then measures by turns, in this one process with two connections each,
``NatsBus`` and bare nats-py (which moves the same bytes and encodes nothing):

- request/reply, one at a time: microseconds, the median over the repeats of each repeat's p50, p99;
- publishing: messages a second to nobody (``sent``), and to one subscriber until it has handled
  them all (``handled``; both ends share this process's one core).

Prints JSON; ``ratio`` is ``NatsBus`` over nats-py (of times below 1 is better, of rates above).
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nats
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from typing_extensions import override

from shared.bus.nats import NatsBus
from shared.bus.server import EmbeddedNats
from shared.messages.base import ErrorReply, Message, MessageCodec

ROOT = Path(__file__).resolve().parents[2]
PAYLOAD_BYTES = 256


class Load(Message, frozen=True, kw_only=True):
    """What is sent to and fro. Publisher, subscriber: this benchmark. Delivery: core."""

    payload: bytes


CODEC = MessageCodec((Load, ErrorReply))
LOAD = Load(payload=bytes(PAYLOAD_BYTES))
LOAD_BYTES = CODEC.encode(LOAD)


class Contender(ABC):
    """One way to use NATS: an echo service, and a subscriber that counts."""

    def __init__(self) -> None:
        self.num_handled = 0
        self.num_expected = 0
        self.all_handled = asyncio.Event()

    def expect(self, count: int) -> None:
        """Set ``all_handled`` after ``count`` more messages."""
        self.num_handled, self.num_expected = 0, count
        self.all_handled.clear()

    def count(self) -> None:
        """One message was handled."""
        self.num_handled += 1
        if self.num_handled == self.num_expected:
            self.all_handled.set()

    @abstractmethod
    async def request(self) -> None:
        """Ask once."""

    @abstractmethod
    async def publish(self, topic: str) -> None:
        """Send once to ``load``, which is subscribed to, or ``void``, which is not."""

    @abstractmethod
    async def flush(self) -> None:
        """Wait until all is sent."""


class OverNatsBus(Contender):
    """``NatsBus``."""

    def __init__(self, client: NatsBus) -> None:
        super().__init__()
        self._client = client

    @classmethod
    async def open(cls, url: str, stack: AsyncExitStack) -> "OverNatsBus":
        """Connect both sides."""
        client, server = (NatsBus(CODEC, url, name=name) for name in ("client", "server"))
        contender = cls(await stack.enter_async_context(client))
        await stack.enter_async_context(server)

        async def echo(message: Message) -> Message:
            return message

        async def handle(message: Message, subject: str) -> None:
            contender.count()

        await server.serve("bus.echo", echo)
        await server.subscribe("bus.load", handle, max_pending=10_000_000)
        return contender

    @override
    async def request(self) -> None:
        await self._client.request("bus.echo", LOAD, Load, timeout_s=10.0)

    @override
    async def publish(self, topic: str) -> None:
        await self._client.publish(f"bus.{topic}", LOAD)

    @override
    async def flush(self) -> None:
        await self._client.flush(timeout_s=30.0)


class OverNatsPy(Contender):
    """Bare nats-py."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    @classmethod
    async def open(cls, url: str, stack: AsyncExitStack) -> "OverNatsPy":
        """Connect both sides."""
        contender = cls(await stack.enter_async_context(await nats.connect(url)))
        server = await stack.enter_async_context(await nats.connect(url))

        async def echo(msg: Msg) -> None:
            await msg.respond(msg.data)

        async def handle(msg: Msg) -> None:
            contender.count()

        await server.subscribe("raw.echo", cb=echo)
        await server.subscribe("raw.load", cb=handle, pending_msgs_limit=10_000_000)
        await server.flush()
        return contender

    @override
    async def request(self) -> None:
        await self._client.request("raw.echo", LOAD_BYTES, timeout=10.0)

    @override
    async def publish(self, topic: str) -> None:
        await self._client.publish(f"raw.{topic}", LOAD_BYTES)

    @override
    async def flush(self) -> None:
        await self._client.flush()


async def measure_requests(contender: Contender, count: int) -> dict[str, float]:
    """Percentiles of the round trip, one request at a time."""
    samples_us = []
    for _ in range(count):
        start_s = time.perf_counter()
        await contender.request()
        samples_us.append((time.perf_counter() - start_s) * 1e6)
    percentiles = statistics.quantiles(samples_us, n=100)
    return {"p50_us": percentiles[49], "p99_us": percentiles[98]}


async def measure_publishing(contender: Contender, count: int) -> dict[str, float]:
    """Messages a second: sent to nobody, and handled by the one subscriber."""
    start_s = time.perf_counter()
    for _ in range(count):
        await contender.publish("void")
    await contender.flush()
    sent_s = time.perf_counter() - start_s
    contender.expect(count)
    start_s = time.perf_counter()
    for _ in range(count):
        await contender.publish("load")
    await contender.all_handled.wait()
    return {"sent_per_s": count / sent_s, "handled_per_s": count / (time.perf_counter() - start_s)}


async def run(num_requests: int, num_messages: int, repeats: int) -> dict[str, Any]:
    """All measurements: medians over ``repeats``, for each contender, and their ratio."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        server = await stack.enter_async_context(EmbeddedNats(Path(directory)))
        contenders: dict[str, Contender] = {
            "nats_bus": await OverNatsBus.open(server.url, stack),
            "nats_py": await OverNatsPy.open(server.url, stack),
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for contender in contenders.values():
            await measure_requests(contender, num_requests // 10 + 2)
        for _ in range(repeats):
            for name, contender in contenders.items():
                requests = await measure_requests(contender, num_requests)
                publishing = await measure_publishing(contender, num_messages)
                rounds[name].append(requests | publishing)
    medians = {
        name: {key: statistics.median(one[key] for one in all_rounds) for key in all_rounds[0]}
        for name, all_rounds in rounds.items()
    }
    results: dict[str, Any] = {
        name: {key: round(value, 1) for key, value in values.items()}
        for name, values in medians.items()
    }
    results["ratio"] = {
        key: round(value / medians["nats_py"][key], 3) for key, value in medians["nats_bus"].items()
    }
    return results


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    sha = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "git_sha": sha.stdout.strip() or None,
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("nats-py", "msgspec", "uvloop")},
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000, help="requests a repeat")
    parser.add_argument("--messages", type=int, default=20_000, help="messages a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    factory: Callable[[], asyncio.AbstractEventLoop] = (
        uvloop.new_event_loop if arguments.loop == "uvloop" else asyncio.new_event_loop
    )
    with asyncio.Runner(loop_factory=factory) as runner:
        results = runner.run(run(arguments.requests, arguments.messages, arguments.repeats))
    report = {
        "benchmark": "bus",
        "workload": {
            "num_requests": arguments.requests,
            "num_messages": arguments.messages,
            "repeats": arguments.repeats,
            "loop": arguments.loop,
            "message_bytes": len(LOAD_BYTES),
            "seed": None,
        },
        "environment": environment(),
        "results": results,
    }
    text = json.dumps(report, indent=2)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
