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
from shared.metrics import Metrics
from shared.worker.latency import MIN_STEPS
from tests.engines import make_engine
from tests.integration.service_rig import open_world
from tests.models import FAMILIES, write_model


class Worker:
    """One that runs alone, and what it says."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._num_batches = 0
        self.metrics = Metrics()
        self.reports: asyncio.Queue[WorkerReport] = asyncio.Queue()

    async def hear(self, message: Message, subject: str) -> None:
        if isinstance(message, WorkerReport):
            await self.reports.put(message)

    async def report(self) -> WorkerReport:
        return await asyncio.wait_for(self.reports.get(), timeout=20)

    async def generate(self, num_tokens: int, num_requests: int = 1) -> None:
        self._num_batches += 1
        items = [
            StartItem(
                gateway="g",
                request=Request(
                    request_id=f"r{self._num_batches}-{i}",
                    attempt=0,
                    prompt_token_ids=tuple(range(3 + i, 40 + i)),
                    sampling=SamplingParams(
                        max_tokens=num_tokens, temperature=0.0, ignore_eos=True
                    ),
                ),
            )
            for i in range(num_requests)
        ]
        batch = StartBatch(leader_epoch=1, batch_id=self._num_batches, items=tuple(items))
        subject = subjects.worker("decode", "decode-1", "start")
        await self._bus.request(subject, batch, Done, timeout_s=10)


@contextlib.asynccontextmanager
async def running_worker(directory: Path, **settings: Any) -> AsyncIterator[Worker]:
    async with open_world("memory", directory) as world:
        bus = await world.bus()
        worker = Worker(bus)
        await bus.subscribe(subjects.all_load(), worker.hear)
        defaults: dict[str, Any] = {
            "instance": "decode-1",
            "dtype": "fp32",
            "num_blocks": 32,
            "num_threads": 1,
        }
        loaded = DecodeSettings.load(**(defaults | settings))
        service = DecodeService(
            loaded, open_bus=world.open_bus, make_transport=lambda _: world.new_transport()
        )
        async with world.running(service, loaded) as runtime:
            worker.metrics = runtime.metrics
            yield worker


def write_profile(path: Path, model: Path, speed: float) -> LatencyModel:
    """A profile of ``model`` on a machine so many times as fast as it could be."""
    spec = make_engine(model).spec
    facts = facts_of(spec, model)
    profile = LatencyModel(
        facts=facts,
        constants=rough_constants(facts, "cpu").scaled(StepTerms(*[1.0 / speed] * 5)),
        max_num_batched_tokens=2048,
        fingerprint=spec.fingerprint,
    )
    path.write_text(json.dumps({"latency_model": profile.to_dict()}))
    return profile


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
    profile = tmp_path / "latency.json"
    wrong = write_profile(profile, path, speed=1e-5)  # it would take minutes for a step
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


async def test_whether_to_swap_follows_what_prefills_turn_out_to_cost(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    profile = tmp_path / "latency.json"
    write_profile(profile, path, speed=500.0)  # no copy is as quick as such a prefill
    settings: dict[str, Any] = {
        "model": str(path),
        "latency_profile": str(profile),
        "num_blocks": 3,
        "swap_bytes": 1 << 20,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
    }

    async with running_worker(tmp_path, **settings) as worker:

        def preemptions(kind: str) -> float:
            name = "banyan_decode_preempted_requests_total"
            return worker.metrics.value(name, {"kind": kind}) or 0.0

        async def predicted_s() -> float:
            model = (await worker.report()).latency
            assert model is not None
            return model.prefill_s(64)

        promised_s = await predicted_s()
        await worker.generate(80)
        while await predicted_s() < 30 * promised_s:
            pass
        # Together they need more blocks than there are.
        await worker.generate(80, num_requests=2)
        while preemptions("swap") + preemptions("recompute") == 0.0:
            await worker.report()
        assert preemptions("swap") > 0


async def test_the_load_of_experts_is_exported(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["mixtral"])
    settings: dict[str, Any] = {"model": str(path), "expert_load_period_s": 0.05}
    async with running_worker(tmp_path, **settings) as worker:

        def num_tokens(layer: int) -> float:
            name = "banyan_decode_expert_tokens_total"
            values = (
                worker.metrics.value(name, {"layer": str(layer), "expert": str(expert)})
                for expert in range(4)
            )
            return sum(value or 0 for value in values)

        await worker.generate(5)
        # Two of four experts for each of 37 tokens of prompt and the first 4 of the answer.
        async with asyncio.timeout(20):
            while any(num_tokens(layer) < 2 * (37 + 4) for layer in range(3)):
                await worker.report()
        assert [num_tokens(layer) for layer in range(3)] == [2 * (37 + 4)] * 3
