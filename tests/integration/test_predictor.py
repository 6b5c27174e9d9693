"""The predictor as the scheduler sees it, over the memory bus and over NATS."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.predictor.config import PredictorSettings
from services.predictor.distribution import BUCKET_EDGES_TOKENS, LengthDistribution
from services.predictor.predictors import LengthQuestion
from services.predictor.service import PredictorService
from shared.bus.base import Bus
from shared.errors import NoResponder, RemoteError
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import Drain, InstanceExited, ServiceReport
from shared.messages.predict import LengthPrediction, PredictLength
from shared.messages.requests import Done
from tests.integration.bus_rig import until
from tests.integration.service_rig import MemoryWorld, World, open_world

TIMEOUT_S = 10.0


@pytest.fixture(params=["memory", "real"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(request.param, tmp_path) as world:
        yield world


@pytest.fixture
async def memory() -> AsyncIterator[MemoryWorld]:
    """For what is the same in every world."""
    world = MemoryWorld()
    yield world
    await world.close()


class Blocking:
    """A predictor that waits until it is let through."""

    name = "blocking"

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.has_begun = threading.Event()

    def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
        self.has_begun.set()
        assert self.may_go.wait(TIMEOUT_S)
        return [LengthDistribution.endless() for _ in questions]


class Broken:
    """A predictor that raises."""

    name = "broken"

    def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
        raise ArithmeticError("no idea")


async def ask(bus: Bus, request_id: str, *, input_len: int = 30, max_tokens: int = 500) -> Any:
    question = PredictLength(
        request_id=request_id,
        prompt_token_ids=tuple(range(input_len)),
        max_tokens=max_tokens,
    )
    return await bus.request(subjects.predict(), question, LengthPrediction, timeout_s=TIMEOUT_S)


def reports(messages: Sequence[Message]) -> list[ServiceReport]:
    return [message for message in messages if isinstance(message, ServiceReport)]


@pytest.mark.parametrize("kind", ["constant", "input_length"])
async def test_a_prediction_is_a_distribution_with_quantiles(world: World, kind: str) -> None:
    settings = PredictorSettings.load(kind=kind, **world.settings())
    async with world.running(PredictorService(settings, open_bus=world.open_bus), settings):
        found = await ask(await world.bus(), "r1", max_tokens=100)
    assert found.request_id == "r1"
    assert found.predictor.startswith(kind)
    assert found.bucket_edges == BUCKET_EDGES_TOKENS == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert len(found.probabilities) == 10
    assert sum(found.probabilities) == pytest.approx(1.0)
    assert not any(found.probabilities[5:]), "nothing is longer than max_tokens"
    assert 1 <= found.p50_tokens <= found.p90_tokens <= 100
    if kind == "constant":
        assert found.p50_tokens == found.p90_tokens == 100


async def test_many_questions_at_once_are_each_answered(world: World) -> None:
    settings = PredictorSettings.load(max_batch_size=8, **world.settings())
    service = PredictorService(settings, open_bus=world.open_bus)
    async with world.running(service, settings) as runtime:
        bus = await world.bus()
        found = await asyncio.gather(
            *(ask(bus, f"r{n}", input_len=n + 1, max_tokens=n + 1) for n in range(100))
        )
        assert [one.request_id for one in found] == [f"r{n}" for n in range(100)]
        assert all(1 <= one.p90_tokens <= n + 1 for n, one in enumerate(found))
        num_batches = runtime.metrics.value("banyan_predictor_predicted_batches_total")
        assert num_batches is not None
        assert 13 <= num_batches < 100, "they did not go together"


async def test_two_predictors_share_the_questions(memory: MemoryWorld) -> None:
    first, second = (PredictorSettings.load(kind=kind) for kind in ("constant", "input_length"))
    one = PredictorService(first, open_bus=memory.open_bus)
    two = PredictorService(second, open_bus=memory.open_bus)
    async with memory.running(one, first), memory.running(two, second):
        bus = await memory.bus()
        found = [await ask(bus, f"r{n}") for n in range(4)]
    assert len({one.predictor for one in found}) == 2


async def test_a_predictor_that_is_slow_or_full_says_so(memory: MemoryWorld) -> None:
    blocking = Blocking()
    settings = PredictorSettings.load(
        max_batch_size=1, max_waiting=1, max_batch_wait_s=0.0, answer_timeout_s=0.2
    )
    service = PredictorService(settings, predictor=blocking, open_bus=memory.open_bus)
    async with memory.running(service, settings) as runtime:
        bus = await memory.bus()
        predicted = asyncio.create_task(ask(bus, "predicted"))
        assert await asyncio.to_thread(blocking.has_begun.wait, TIMEOUT_S)
        answers = await asyncio.gather(
            *(ask(bus, name) for name in ("waiting", "too many")), return_exceptions=True
        )
        with pytest.raises(RemoteError) as failed:
            await predicted
        errors = [*answers, failed.value]
        assert [getattr(error, "code", None) for error in errors] == [
            "RequestFailed",
            "Refused",
            "RequestFailed",
        ]
        value = runtime.metrics.value
        assert value("banyan_predictor_unanswered_requests_total", {"reason": "timeout"}) == 2
        assert value("banyan_predictor_unanswered_requests_total", {"reason": "refused"}) == 1
        blocking.may_go.set()
        await until(lambda: value("banyan_predictor_predicted_batches_total") == 1)
        assert (await ask(bus, "later")).p50_tokens == 500


async def test_a_predictor_that_fails_does_not_end_the_service(memory: MemoryWorld) -> None:
    settings = PredictorSettings.load()
    service = PredictorService(settings, predictor=Broken(), open_bus=memory.open_bus)
    async with memory.running(service, settings) as runtime:
        bus = await memory.bus()
        for _ in range(2):
            with pytest.raises(RemoteError, match="no idea") as failed:
                await ask(bus, "r")
            assert failed.value.code == "RequestFailed"
        assert not runtime.is_stopping
        assert runtime.health.liveness().ok


async def test_a_question_without_an_answer_is_refused(memory: MemoryWorld) -> None:
    settings = PredictorSettings.load()
    async with memory.running(PredictorService(settings, open_bus=memory.open_bus), settings):
        with pytest.raises(RemoteError) as refused:
            await ask(await memory.bus(), "r", max_tokens=0)
    assert refused.value.code == "InvalidRequest"


async def test_it_reports_and_drains(world: World) -> None:
    heard: list[Message] = []

    async def hear(message: Message, subject: str) -> None:
        heard.append(message)

    bus = await world.bus()
    settings = PredictorSettings.load(kind="constant", **world.settings())
    await bus.subscribe(subjects.load("predictor", settings.instance), hear)
    service = PredictorService(settings, open_bus=world.open_bus)
    async with world.running(service, settings) as runtime:
        await ask(bus, "r")
        await until(lambda: any(one.gauges["total_answered"] == 1 for one in reports(heard)))
        report = reports(heard)[-1]
        assert report.labels == {"predictor": "constant"}
        assert report.model == settings.served_model_name
        drain = Drain(reason="test")
        subject = subjects.control(settings.instance, "drain")
        await bus.request(subject, drain, Done, timeout_s=TIMEOUT_S)
        await runtime.wait_until_stopping()
    await until(lambda: isinstance(heard[-1], InstanceExited))
    with pytest.raises(NoResponder):
        await ask(bus, "r")
