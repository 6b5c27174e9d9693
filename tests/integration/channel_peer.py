"""The other end of the channel tests: does what it is told, one command after the other.

For UCX and TCP this file is run as a program, JSON in and out; for memory it is a thread.
"""

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any, Self

from shared.errors import BanyanError
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.channel_memory import MemoryChannelFabric
from shared.transport.factory import create_channel_end

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("memory", "tcp", "ucx")


def new_end(kind: str, fabric: MemoryChannelFabric | None = None) -> ChannelEnd:
    """A channel end of one of ``KINDS``."""
    if kind == "ucx":
        from shared.transport.channel_ucx import UcxChannelEnd

        return UcxChannelEnd(use_sockets_locally=False)
    assert kind in ("memory", "tcp", "auto")
    return create_channel_end(kind, fabric=fabric)  # type: ignore[arg-type]


def message_of(seed: int, nbytes: int) -> bytes:
    """The bytes that both sides know by their seed."""
    return random.Random(seed).randbytes(nbytes)


class Doer:
    """Carries out commands on a channel end of its own."""

    def __init__(self, end: ChannelEnd) -> None:
        self.end = end
        self._channel: Channel | None = None

    def carry_out(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one command; a ``BanyanError`` becomes the answer."""
        arguments = dict(command)
        try:
            result = getattr(self, "on_" + arguments.pop("do"))(**arguments)
        except BanyanError as error:
            return {"error": type(error).__name__}
        return result or {}

    @property
    def channel(self) -> Channel:
        assert self._channel is not None
        return self._channel

    def on_address(self) -> dict[str, Any]:
        return {"address": self.end.address.hex()}

    def on_connect(self, to: str, channel_id: int, is_initiator: bool, timeout_s: float) -> None:
        self._channel = self.end.connect(
            bytes.fromhex(to), channel_id, is_initiator=is_initiator, timeout_s=timeout_s
        )

    def on_send(self, sizes: list[int], timeout_s: float = 20.0) -> None:
        for seed, nbytes in enumerate(sizes):
            self.channel.send(message_of(seed, nbytes), timeout_s=timeout_s)

    def on_recv(self, count: int, room: int = 8 << 20, timeout_s: float = 20.0) -> dict[str, Any]:
        buffer = memoryview(bytearray(room))
        received = []
        for _ in range(count):
            nbytes = self.channel.recv_into(buffer, timeout_s=timeout_s)
            received.append([nbytes, zlib.crc32(buffer[:nbytes])])
        return {"received": received}

    def on_echo(self, count: int) -> None:
        buffer = memoryview(bytearray(8 << 20))
        for _ in range(count):
            nbytes = self.channel.recv_into(buffer, timeout_s=20.0)
            self.channel.send(buffer[:nbytes], timeout_s=20.0)

    def on_close(self) -> None:
        self.channel.close()


class ThreadPeer:
    """A peer on a thread of this process."""

    def __init__(self, fabric: MemoryChannelFabric) -> None:
        self._doer = Doer(new_end("memory", fabric))
        self._commands: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.put(None)
        self._thread.join()

    def ask(self, do: str, **arguments: Any) -> None:
        self._commands.put({"do": do, **arguments})

    def answer(self) -> dict[str, Any]:
        return self._answers.get(timeout=30)

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            self._answers.put(self._doer.carry_out(command))


class ProcessPeer:
    """A peer in a process of its own."""

    def __init__(self, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "UCX_LOG_LEVEL": "fatal"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self._process.communicate()

    def ask(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number is signal.SIGKILL:
            self._process.wait()


def main(kind: str) -> None:
    """Answer one line for each line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    doer = Doer(new_end(kind))
    for line in sys.stdin:
        print(json.dumps(doer.carry_out(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
