"""What the data plane costs between two processes, and how far it is from the bare libraries.

    python -m bench.micro.transport [--repeats N] [--depth N] [--loop uvloop|asyncio] [--out FILE]

Bulk face: one process sends pieces of one size, ``depth`` at a time, the other receives them; GB/s
(10**9 bytes), the median over the repeats, in which all contenders take turns. ``verify`` is with
checksums on. ``max_loop_lag_ms`` is the longest that the receiver's event loop was late for a timer
of 1 ms while 64 MiB pieces came in; a busy machine adds its own.

Channel face: microseconds there and back, the median over the repeats of each repeat's p50 and p99.

The bare libraries, between the same two processes and at the same time: ``raw-ucx`` is ucxx driven
in a loop that does nothing else, set up for speed (it reads the peer's memory, and is aborted if
the peer dies); ``raw-ucx-safe`` the same set up as ours is; ``raw-socket`` a blocking TCP socket.
All receive into one buffer again and again, sum nothing, and know the sizes beforehand.

Prints JSON.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvloop

from bench.environment import environment
from shared.transport.base import PieceHeader, PieceKind, Transport
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.channel_tcp import TcpChannelEnd
from shared.transport.channel_ucx import UcxChannelEnd
from shared.transport.tcp import TcpTransport
from shared.transport.ucx import UcxTransport
from shared.transport.ucx_library import UcxLibrary

ROOT = Path(__file__).resolve().parents[2]

BULK_SIZES = (64 << 10, 1 << 20, 16 << 20, 64 << 20)
BULK_BYTES = 128 << 20
MAX_PIECES = 400
CHANNEL_SIZES = (8, 16 << 10)
NUM_ROUND_TRIPS = 400
TIMEOUT_S = 30.0

OURS: dict[str, Callable[[bool], Transport]] = {
    "pull": lambda verify: TcpTransport(verify=verify, pull=True),
    "ucx": lambda verify: UcxTransport(verify=verify, pull=False),
    "tcp": lambda verify: TcpTransport(verify=verify, pull=False),
}
RAW_UCX = {
    "raw-ucx": ({"TLS": "posix,sysv,cma,self,tcp", "MM_ERROR_HANDLING": "n"}, False),
    "raw-ucx-safe": ({}, True),
}
CHANNELS = ("ucx", "tcp")


def count_of(nbytes: int) -> int:
    """How many pieces of this size make a measurement."""
    return max(2, min(MAX_PIECES, BULK_BYTES // nbytes))


class RawUcx:
    """ucxx's low-level classes and a loop around them."""

    def __init__(self, name: str) -> None:
        settings, self._has_error_handling = RAW_UCX[name]
        self._library = UcxLibrary.load()
        context = self._library.new_context(host="127.0.0.1", settings=settings)
        self._worker = self._library.api.UCXWorker(context)
        self._endpoint: Any = None

    @property
    def address(self) -> str:
        """For the other side's ``connect``."""
        return bytes(self._worker.address).hex()

    def connect(self, address: str) -> None:
        """Connect to the other side."""
        api = self._library.api
        self._endpoint = api.UCXEndpoint.create_from_worker_address(
            self._worker,
            api.UCXAddress.create_from_buffer(bytes.fromhex(address)),
            self._has_error_handling,
        )

    def move(self, buffer: bytearray, count: int, depth: int, *, is_sender: bool) -> None:
        """Send or receive ``count`` messages, ``depth`` at a time."""
        array, tag = self._library.array(buffer), self._library.api.UCXXTag(1)
        post = self._endpoint.tag_send if is_sender else self._worker.tag_recv
        requests = []
        for _ in range(count):
            requests.append(post(array, tag))
            if len(requests) == depth:
                self._finish(requests.pop(0))
        for request in requests:
            self._finish(request)

    def _finish(self, request: Any) -> None:
        while not request.completed:
            self._worker.progress_once()
        request.check_error()


class RawSocket:
    """A blocking connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._socket = self._listener

    @property
    def address(self) -> str:
        """For the other side's ``connect``."""
        return str(self._listener.getsockname()[1])

    def connect(self, address: str) -> None:
        """The sending side dials."""
        self._socket = socket.create_connection(("127.0.0.1", int(address)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def accept(self) -> None:
        """The receiving side accepts."""
        self._socket, _ = self._listener.accept()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, buffer: bytearray, count: int, depth: int, *, is_sender: bool) -> None:
        """Send or receive ``count`` messages."""
        view = memoryview(buffer)
        for _ in range(count):
            if is_sender:
                self._socket.sendall(view)
                continue
            filled = 0
            while filled < len(view):
                filled += self._socket.recv_into(view[filled:])


Raw = RawUcx | RawSocket


class Side:
    """What both processes hold."""

    def __init__(self) -> None:
        self.transports = {
            f"{name}{suffix}": make(verify)
            for name, make in OURS.items()
            for suffix, verify in (("", False), ("-verify", True))
        }
        self.raw: dict[str, Raw] = {name: RawUcx(name) for name in RAW_UCX}
        self.raw["raw-socket"] = RawSocket()
        self.ends: dict[str, ChannelEnd] = {name: _new_end(name) for name in CHANNELS}
        self.channels: dict[str, Channel] = {}

    async def start(self, stack: AsyncExitStack) -> dict[str, str]:
        """Open everything; returns all addresses."""
        for transport in self.transports.values():
            await transport.start()
            stack.push_async_callback(transport.close)
        return {
            **{name: transport.address.hex() for name, transport in self.transports.items()},
            **{name: raw.address for name, raw in self.raw.items()},
            **{f"{name}-channel": end.address.hex() for name, end in self.ends.items()},
        }

    def connect_channels(self, addresses: dict[str, str], *, is_initiator: bool) -> None:
        """Meet the other side's ends."""
        for name, end in self.ends.items():
            peer = bytes.fromhex(addresses[f"{name}-channel"])
            self.channels[name] = end.connect(
                peer, 1, is_initiator=is_initiator, timeout_s=TIMEOUT_S
            )


def _new_end(name: str) -> ChannelEnd:
    return UcxChannelEnd(use_sockets_locally=False) if name == "ucx" else TcpChannelEnd()


async def child() -> None:
    """Send what the parent asks for, one line of JSON a command."""
    side = Side()
    async with AsyncExitStack() as stack:
        addresses = await side.start(stack)
        print(json.dumps(addresses), flush=True)
        parent_addresses = json.loads(sys.stdin.readline())
        for name, raw in side.raw.items():
            raw.connect(parent_addresses[name])
        side.connect_channels(parent_addresses, is_initiator=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            name, nbytes, count = command["name"], command["nbytes"], command["count"]
            if command["do"] == "bulk" and name in side.raw:
                payload = bytearray(os.urandom(nbytes))
                side.raw[name].move(payload, count, command["depth"], is_sender=True)
            elif command["do"] == "bulk":
                peer = bytes.fromhex(parent_addresses[name])
                await _send_pieces(side.transports[name], peer, command)
            else:
                _ping_pong(side, name, nbytes, count, is_first=False)


async def _send_pieces(transport: Transport, peer: bytes, command: dict[str, Any]) -> None:
    payload = os.urandom(command["nbytes"])
    room = asyncio.Semaphore(command["depth"])

    async def send(piece: int) -> None:
        header = PieceHeader(transfer_id=command["transfer_id"], piece=piece, kind=PieceKind.KV)
        await transport.send(peer, header, payload, timeout_s=TIMEOUT_S)
        room.release()

    async with asyncio.TaskGroup() as sends:
        for piece in range(command["count"]):
            await room.acquire()
            sends.create_task(send(piece))


def _ping_pong(side: Side, name: str, nbytes: int, count: int, *, is_first: bool) -> list[float]:
    buffer = bytearray(nbytes)
    raw = side.raw.get(name)
    channel = side.channels.get(name)
    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        for is_sender in (is_first, not is_first):
            if raw is not None:
                raw.move(buffer, 1, 1, is_sender=is_sender)
            elif channel is not None and is_sender:
                channel.send(buffer, timeout_s=TIMEOUT_S)
            elif channel is not None:
                channel.recv_into(buffer, timeout_s=TIMEOUT_S)
        times.append(time.perf_counter() - start_s)
    return times


class Parent:
    """Receives and takes the time."""

    def __init__(self, side: Side, process: subprocess.Popen[str], depth: int) -> None:
        self._side = side
        self._process = process
        self._depth = depth
        self._transfer_id = 1 << 40

    async def bulk_gbytes_per_s(self, name: str, nbytes: int) -> float:
        """One measurement; the first piece is not timed."""
        count = count_of(nbytes) + 1
        self._transfer_id += 1 << 20
        self._tell(
            do="bulk",
            name=name,
            nbytes=nbytes,
            count=count,
            depth=self._depth,
            transfer_id=self._transfer_id,
        )
        if name in self._side.raw:
            raw, buffer = self._side.raw[name], bytearray(nbytes)
            raw.move(buffer, 1, 1, is_sender=False)
            start_s = time.perf_counter()
            raw.move(buffer, count - 1, self._depth, is_sender=False)
        else:
            transport = self._side.transports[name]
            await transport.receive(self._transfer_id, 0, timeout_s=TIMEOUT_S)
            start_s = time.perf_counter()
            for piece in range(1, count):
                await transport.receive(self._transfer_id, piece, timeout_s=TIMEOUT_S)
        return nbytes * (count - 1) / (time.perf_counter() - start_s) / 1e9

    def round_trips_us(self, name: str, nbytes: int) -> tuple[float, float]:
        """p50 and p99 of one measurement."""
        self._tell(do="ping-pong", name=name, nbytes=nbytes, count=NUM_ROUND_TRIPS)
        times = _ping_pong(self._side, name, nbytes, NUM_ROUND_TRIPS, is_first=True)
        quantiles = statistics.quantiles(times, n=100)
        return quantiles[49] * 1e6, quantiles[98] * 1e6

    def _tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()


async def _watched(work: Coroutine[Any, Any, float]) -> tuple[float, float]:
    """The result, and the longest that a timer of 1 ms was late meanwhile, in ms."""
    lag_s = 0.0

    async def watch() -> None:
        nonlocal lag_s
        while True:
            start_s = time.perf_counter()
            await asyncio.sleep(0.001)
            lag_s = max(lag_s, time.perf_counter() - start_s - 0.001)

    watching = asyncio.create_task(watch())
    try:
        return await work, lag_s * 1e3
    finally:
        watching.cancel()


async def measure(parent: Parent, repeats: int) -> dict[str, Any]:
    """All contenders by turns."""
    side = parent._side
    bulk: dict[str, dict[int, list[float]]] = {
        name: {nbytes: [] for nbytes in BULK_SIZES} for name in (*side.raw, *side.transports)
    }
    trips: dict[str, dict[int, list[tuple[float, float]]]] = {
        name: {nbytes: [] for nbytes in CHANNEL_SIZES} for name in (*side.raw, *side.channels)
    }
    lags_ms: dict[str, list[float]] = {name: [] for name in side.transports}
    for _ in range(repeats):
        for nbytes in BULK_SIZES:
            for name, results in bulk.items():
                rate, lag_ms = await _watched(parent.bulk_gbytes_per_s(name, nbytes))
                results[nbytes].append(rate)
                if name in lags_ms and nbytes == BULK_SIZES[-1]:
                    lags_ms[name].append(lag_ms)
        for nbytes in CHANNEL_SIZES:
            for name, pairs in trips.items():
                pairs[nbytes].append(parent.round_trips_us(name, nbytes))
    return {
        "bulk_gbytes_per_s": {
            name: {_size(n): round(statistics.median(rates), 2) for n, rates in results.items()}
            for name, results in bulk.items()
        },
        "max_loop_lag_ms": {
            name: round(statistics.median(lags), 1) for name, lags in lags_ms.items()
        },
        "channel_round_trip_us": {
            name: {
                _size(n): {
                    "p50": round(statistics.median(p50 for p50, _ in pairs), 1),
                    "p99": round(statistics.median(p99 for _, p99 in pairs), 1),
                }
                for n, pairs in results.items()
            }
            for name, results in trips.items()
        },
    }


def _size(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


async def run(process: subprocess.Popen[str], depth: int, repeats: int) -> dict[str, Any]:
    """Meet the other process and measure."""
    assert process.stdin is not None
    assert process.stdout is not None
    async with AsyncExitStack() as stack:
        side = Side()
        addresses = await side.start(stack)
        child_addresses = json.loads(await asyncio.to_thread(process.stdout.readline))
        process.stdin.write(json.dumps(addresses) + "\n")
        process.stdin.flush()
        for name, raw in side.raw.items():
            if isinstance(raw, RawSocket):
                raw.accept()
            else:
                raw.connect(child_addresses[name])
        side.connect_channels(child_addresses, is_initiator=False)
        results = await measure(Parent(side, process, depth), repeats)
        process.stdin.close()
        await asyncio.to_thread(process.wait)
        for channel in side.channels.values():
            channel.close()
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4, help="pieces in flight")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--out", default="")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_loop = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    if arguments.child:
        run_loop(child())
        return
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "bench.micro.transport", "--child", "--loop", arguments.loop]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        results = run_loop(run(process, arguments.depth, arguments.repeats))
    report = {
        "benchmark": "micro.transport",
        **environment(),
        "ucxx": UcxLibrary.version(),
        "loop": arguments.loop,
        "depth": arguments.depth,
        "repeats": arguments.repeats,
        "load_before": load,
        **results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
