"""The other end of the transport tests: a peer that does what it is told.

In the memory tests it lives in the test's own process; for UCX and TCP this file is run as a
program that reads one JSON command a line and answers each with a line, in any order.
"""

import asyncio
import json
import os
import random
import signal
import sys
import zlib
from pathlib import Path
from typing import Any, Self

from shared.errors import BanyanError
from shared.transport.base import PieceHeader, PieceKind, Transport
from shared.transport.memory import MemoryFabric, MemoryTransport
from shared.transport.tcp import TcpTransport

ROOT = Path(__file__).resolve().parents[2]
CONNECTED_KINDS = ("tcp-pull", "tcp-stream", "ucx")
KINDS = ("memory", *CONNECTED_KINDS)


def new_transport(kind: str, fabric: MemoryFabric | None = None, **options: Any) -> Transport:
    """A transport of one of ``KINDS``."""
    if kind == "memory":
        assert fabric is not None
        return MemoryTransport(fabric, verify=options.get("verify", True))
    if kind == "ucx":
        from shared.transport.ucx import UcxTransport

        return UcxTransport(pull=False, **options)
    return TcpTransport(pull=kind == "tcp-pull", **options)


def payload_of(seed: int, nbytes: int) -> bytes:
    """The bytes that both sides know by their seed."""
    return random.Random(seed).randbytes(nbytes)


def header_of(transfer_id: int, piece: int, kind: PieceKind = PieceKind.KV) -> PieceHeader:
    """A header whose other fields follow from the piece's index."""
    return PieceHeader(
        transfer_id=transfer_id,
        piece=piece,
        kind=kind,
        layer=piece % 32,
        block_lo=piece,
        block_hi=piece + 3,
        head_lo=1,
        head_hi=9,
    )


class Peer:
    """Carries out commands on a transport of its own."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    async def carry_out(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one command; a ``BanyanError`` becomes the answer."""
        arguments = dict(command)
        try:
            result = await getattr(self, "on_" + arguments.pop("do"))(**arguments)
        except BanyanError as error:
            return {"error": type(error).__name__, "message": str(error)}
        return result or {}

    async def on_start(self) -> dict[str, Any]:
        await self.transport.start()
        return {"address": self.transport.address.hex()}

    async def on_send(
        self,
        to: str,
        transfer_id: int,
        piece: int = 0,
        nbytes: int = 100_000,
        timeout_s: float = 20.0,
        checksum: int | None = None,
        count: int = 1,
    ) -> None:
        for index in range(piece, piece + count):
            await self.transport.send(
                bytes.fromhex(to),
                header_of(transfer_id, index),
                payload_of(index, nbytes),
                timeout_s=timeout_s,
                checksum=checksum,
            )

    async def on_receive(
        self, transfer_id: int, piece: int = 0, timeout_s: float = 20.0
    ) -> dict[str, Any]:
        received = await self.transport.receive(transfer_id, piece, timeout_s=timeout_s)
        return {"nbytes": received.payload.nbytes, "crc": zlib.crc32(received.payload)}

    async def on_discard(self, transfer_id: int) -> None:
        self.transport.discard(transfer_id)

    async def on_close(self) -> None:
        await self.transport.close()


class LocalPeer:
    """A peer in this process, on a memory fabric."""

    def __init__(self, fabric: MemoryFabric) -> None:
        self._fabric = fabric
        self._peer = Peer(new_transport("memory", fabric))
        self.address = b""

    async def __aenter__(self) -> Self:
        await self._peer.transport.start()
        self.address = self._peer.transport.address
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._peer.transport.close()

    async def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        return await self._peer.carry_out({"do": do, **arguments})

    async def kill(self) -> None:
        await self._fabric.kill(self.address)

    def stop(self) -> None:
        self._fabric.freeze(self.address)


class RemotePeer:
    """A peer in a process of its own."""

    def __init__(self, kind: str, **options: Any) -> None:
        self._kind = kind
        self._options = options
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.address = b""

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            self._kind,
            json.dumps(self._options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "UCX_LOG_LEVEL": "fatal"},
        )
        self._reading = asyncio.create_task(self._read())
        answer = await self.call("start")
        self.address = bytes.fromhex(answer["address"])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self._reading

    async def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; the answer is ``{"error": "Killed"}`` if it dies over it."""
        assert self._process.stdin is not None
        number = len(self._answers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._process.stdin.write(json.dumps([number, {"do": do, **arguments}]).encode() + b"\n")
        return await answer

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            number, answer = json.loads(line)
            if not self._answers[number].done():
                self._answers[number].set_result(answer)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_result({"error": "Killed"})


async def _serve(kind: str, options: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    peer = Peer(new_transport(kind, **options))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )

    async def answer(number: int, command: dict[str, Any]) -> None:
        print(json.dumps([number, await peer.carry_out(command)]), file=answers, flush=True)

    async with asyncio.TaskGroup() as commands:
        while line := await reader.readline():
            commands.create_task(answer(*json.loads(line)))


if __name__ == "__main__":
    import uvloop

    # The tests run on asyncio's own loop and their peers on uvloop, so that both are tried.
    uvloop.run(_serve(sys.argv[1], json.loads(sys.argv[2])))
