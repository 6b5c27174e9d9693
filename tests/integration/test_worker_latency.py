"""A worker's reports carry its latency model, and its steps refit it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.decode.config import DecodeSettings
from services.decode.service import DecodeService
from shared.bus.base import Bus
from shared.core.latency_model import LatencyModel, StepTerms, rough_constants
from shared.core.request import Request, SamplingParams
from shared.engine.facts import facts_of
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import WorkerReport
from shared.messages.requests import Done
from shared.messages.workers import StartBatch, StartItem
from shared.worker.latency import MIN_STEPS
from tests.engines import make_engine
from tests.integration.service_rig import open_world
from tests.models import FAMILIES, write_model


class Worker:
    """One that runs alone, and what it says."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.reports: asyncio.Queue[WorkerReport] = asyncio.Queue()

    async def hear(self, message: Message, subject: str) -> None:
        if isinstance(message, WorkerReport):
            await self.reports.put(message)

    async def report(self) -> WorkerReport:
        return await asyncio.wait_for(self.reports.get(), timeout=20)

    async def generate(self, num_tokens: int) -> None:
        request = Request(
            request_id="r",
            attempt=0,
            prompt_token_ids=tuple(range(3, 40)),
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        )
        item = StartItem(gateway="g", request=request)
        batch = StartBatch(leader_epoch=1, batch_id=1, items=(item,))
        subject = subjects.worker("decode", "decode-1", "start")
        await self._bus.request(subject, batch, Done, timeout_s=10)


@contextlib.asynccontextmanager
async def running_worker(directory: Path, **settings: Any) -> AsyncIterator[Worker]:
    async with open_world("memory", directory) as world:
        bus = await world.bus()
        worker = Worker(bus)
        await bus.subscribe(subjects.all_load(), worker.hear)
        loaded = DecodeSettings.load(
            instance="decode-1", dtype="fp32", num_blocks=32, num_threads=1, **settings
        )
        service = DecodeService(
            loaded, open_bus=world.open_bus, make_transport=lambda _: world.new_transport()
        )
        async with world.running(service, loaded):
            yield worker


async def test_a_worker_learns_its_latency_from_its_steps(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    async with running_worker(tmp_path, model=str(path)) as worker:
        assert (await worker.report()).latency is None
        await worker.generate(2 * MIN_STEPS)
        while (report := await worker.report()).latency is None:
            pass
        assert report.latency.decode_step_s(1, 100) > 0.0
        assert report.latency_error is not None


async def test_a_worker_starts_from_its_profile_and_corrects_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    spec = make_engine(path).spec
    facts = facts_of(spec, path)
    # A machine that would take minutes for a step.
    constants = rough_constants(facts, "cpu").scaled(StepTerms(*[1e5] * 5))
    wrong = LatencyModel(
        facts=facts,
        constants=constants,
        max_num_batched_tokens=2048,
        fingerprint=spec.fingerprint,
    )
    profile = tmp_path / "latency.json"
    profile.write_text(json.dumps({"latency_model": wrong.to_dict()}))
    settings = {"model": str(path), "latency_profile": str(profile), "max_num_batched_tokens": 256}
    async with running_worker(tmp_path, **settings) as worker:
        first = await worker.report()
        assert first.latency == replace(wrong, max_num_batched_tokens=256)
        assert first.latency_error is None
        await worker.generate(60)
        while (report := await worker.report()).latency == first.latency:
            pass
        assert report.latency is not None
        assert report.latency.decode_step_s(1, 100) < wrong.decode_step_s(1, 100) / 10
