"""With static batching the requests of one command are padded and run together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from services.decode.config import DecodeSettings
from services.decode.service import DecodeService
from shared.bus.base import Bus
from shared.core.request import Request, RequestKey
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.kv import LookupPrefix, PrefixFound
from shared.messages.load import InstanceState, ServiceReport
from shared.messages.requests import Done, SnapshotRequest
from shared.messages.tokens import TokenBatch
from shared.messages.workers import (
    AbortRequests,
    StartBatch,
    StartItem,
    WorkerSnapshot,
)
from tests.engines import make_request, random_prompt
from tests.integration.service_rig import open_world
from tests.models import FAMILIES, write_model


class Worker:
    """One that serves alone, and what it says step by step."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.batches: asyncio.Queue[TokenBatch] = asyncio.Queue()

    async def hear(self, message: Message, subject: str) -> None:
        assert isinstance(message, TokenBatch)
        self.batches.put_nowait(message)

    async def start(self, *requests: Request) -> None:
        items = tuple(StartItem(gateway="g", request=request) for request in requests)
        batch = StartBatch(leader_epoch=1, batch_id=1, items=items)
        subject = subjects.worker("decode", "decode-1", "start")
        assert (await self.bus.request(subject, batch, Done, timeout_s=10)).count == len(items)

    async def abort(self, *keys: RequestKey) -> None:
        command = AbortRequests(leader_epoch=1, requests=keys, reason="not wanted")
        subject = subjects.worker("decode", "decode-1", "abort")
        await self.bus.request(subject, command, Done, timeout_s=10)

    async def step(self) -> list[str]:
        """Who got a token in the next step that gave any; all must have ended well."""
        batch = await asyncio.wait_for(self.batches.get(), timeout=20)
        assert not any(delta.error for delta in batch.deltas)
        return sorted(delta.request_id for delta in batch.deltas)


@contextlib.asynccontextmanager
async def running_worker(directory: Path) -> AsyncIterator[Worker]:
    path = write_model(directory / "model", FAMILIES["llama-gqa"])
    async with open_world("memory", directory) as world:
        worker = Worker(await world.bus())
        await worker.bus.subscribe(subjects.tokens_to("g"), worker.hear)
        settings = DecodeSettings.load(
            instance="decode-1",
            model=str(path),
            dtype="fp32",
            num_blocks=32,
            num_threads=1,
            batching="static",
            kvstore_timeout_s=60,
        )
        service = DecodeService(
            settings, open_bus=world.open_bus, make_transport=lambda _: world.new_transport()
        )
        async with world.running(service, settings):
            yield worker


def request(name: str, input_len: int, output_len: int) -> Request:
    return make_request(name, random_prompt(input_len, seed=input_len), max_tokens=output_len)


async def test_members_run_together_and_the_next_ones_after_them(tmp_path: Path) -> None:
    async with running_worker(tmp_path) as worker:
        await worker.start(request("a", 9, 3), request("b", 30, 2), request("c", 14, 1))
        steps = [await worker.step()]
        await worker.start(request("d", 5, 1), request("e", 6, 1))
        steps += [await worker.step() for _ in range(3)]
    assert steps == [["a", "b", "c"], ["a", "b"], ["a"], ["d", "e"]]


async def test_a_request_that_cannot_be_served_does_not_hold_the_others(tmp_path: Path) -> None:
    async with running_worker(tmp_path) as worker:
        await worker.start(request("a", 9, 2), request("bad", 600, 2), request("c", 14, 2))
        batches = [await asyncio.wait_for(worker.batches.get(), timeout=20) for _ in range(3)]
    deltas = [{delta.request_id: delta.error for delta in batch.deltas} for batch in batches]
    assert {"a": "", "c": ""} in deltas
    (error,) = [found["bad"] for found in deltas if "bad" in found]
    assert "context" in error


async def test_a_member_dropped_while_its_prefix_is_fetched_is_not_waited_for(
    tmp_path: Path,
) -> None:
    async with running_worker(tmp_path) as worker:
        is_asked = asyncio.Event()
        never = asyncio.Event()

        async def lookup(message: Message) -> Message:
            assert isinstance(message, LookupPrefix)
            is_asked.set()
            await never.wait()
            return PrefixFound(num_blocks=0)

        await worker.bus.serve(subjects.kv("store-1", "lookup"), lookup)
        report = ServiceReport(
            role="kvstore", instance="store-1", sequence=1, state=InstanceState.READY
        )
        await worker.bus.publish(subjects.load("kvstore", "store-1"), report)
        question = SnapshotRequest(leader_epoch=1)
        await worker.bus.request(
            subjects.snapshot("decode-1"), question, WorkerSnapshot, timeout_s=10
        )
        long = request("long", 70, 2)  # more than a block: its prefix may be stored
        await worker.start(request("a", 9, 2), long, request("c", 14, 2))
        await is_asked.wait()
        assert worker.batches.empty()
        await worker.abort(long.key)
        assert [await worker.step() for _ in range(2)] == [["a", "c"]] * 2
        never.set()
