import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from services.predictor.batcher import MicroBatcher
from services.predictor.distribution import LengthDistribution
from services.predictor.predictors import LengthQuestion
from shared.errors import Refused, RequestFailed

ENDLESS = LengthDistribution.endless()
SHORT = LengthDistribution((1.0, *[0.0] * 9))


class Gate:
    """A predictor that waits until it is let through, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self._begun = threading.Semaphore(0)

    async def begun(self) -> None:
        """Wait until one more batch has reached the predictor."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=10)

    def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
        self.batches.append(len(questions))
        self._begun.release()
        assert self.may_go.wait(10)
        if any(question.max_tokens == 13 for question in questions):
            raise ArithmeticError("13")
        return [ENDLESS if question.max_tokens > 10 else SHORT for question in questions]


def question(max_tokens: int = 100) -> LengthQuestion:
    return LengthQuestion((1, 2, 3), max_tokens)


@asynccontextmanager
async def running(gate: Gate, **limits: float) -> AsyncIterator[MicroBatcher]:
    batcher = MicroBatcher(
        gate.predict,
        max_batch_size=int(limits.get("max_batch_size", 4)),
        max_wait_s=limits.get("max_wait_s", 0.0),
        max_waiting=int(limits.get("max_waiting", 100)),
        on_batch=lambda size, seconds: None,
    )
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        gate.may_go.set()
        task.cancel()
        await asyncio.wait([task])


async def test_each_asker_gets_its_own_answer() -> None:
    async with running(Gate()) as batcher:
        answers = await asyncio.gather(*(batcher.ask(question(n)) for n in (5, 50, 5, 50)))
    assert answers == [SHORT, ENDLESS, SHORT, ENDLESS]


async def test_what_waits_meanwhile_goes_together_up_to_the_limit() -> None:
    gate = Gate()
    gate.may_go.clear()
    async with running(gate) as batcher:
        first = asyncio.create_task(batcher.ask(question()))
        await gate.begun()
        rest = [asyncio.create_task(batcher.ask(question())) for _ in range(6)]
        await asyncio.sleep(0)
        assert batcher.num_waiting == 6
        assert batcher.busy_s > 0
        gate.may_go.set()
        await asyncio.gather(first, *rest)
    assert gate.batches == [1, 4, 2]
    assert batcher.busy_s == 0
    assert (batcher.stats.num_answered, batcher.stats.num_batches) == (7, 3)


async def test_a_batch_is_kept_open_for_those_who_come_a_little_later() -> None:
    gate = Gate()
    async with running(gate, max_wait_s=30.0, max_batch_size=3) as batcher:
        asked = []
        for _ in range(3):
            asked.append(asyncio.create_task(batcher.ask(question())))
            await asyncio.sleep(0)
        await asyncio.gather(*asked)
    assert gate.batches == [3], "closed because it was full, long before its time"


async def test_too_many_are_refused_at_once() -> None:
    gate = Gate()
    gate.may_go.clear()
    async with running(gate, max_waiting=2) as batcher:
        first = asyncio.create_task(batcher.ask(question()))
        await gate.begun()
        waiting = [asyncio.create_task(batcher.ask(question())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="2 questions are waiting"):
            await batcher.ask(question())
        gate.may_go.set()
        await asyncio.gather(first, *waiting)
    assert batcher.stats.num_refused == 1


async def test_whoever_stops_waiting_is_not_predicted_for() -> None:
    gate = Gate()
    gate.may_go.clear()
    async with running(gate) as batcher:
        first = asyncio.create_task(batcher.ask(question()))
        await gate.begun()
        leaving = asyncio.create_task(batcher.ask(question()))
        staying = asyncio.create_task(batcher.ask(question()))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        gate.may_go.set()
        await asyncio.gather(first, staying)
    assert gate.batches == [1, 1]
    assert batcher.stats.num_given_up == 1


async def test_a_batch_that_fails_is_told_to_its_askers_and_the_next_one_goes_on() -> None:
    async with running(Gate()) as batcher:
        failed = await asyncio.gather(
            batcher.ask(question(13)), batcher.ask(question(50)), return_exceptions=True
        )
        assert [type(error) for error in failed] == [RequestFailed, RequestFailed]
        assert "ArithmeticError: 13" in str(failed[0])
        assert await batcher.ask(question(50)) == ENDLESS
    assert batcher.stats.num_failed == 2


async def test_a_predictor_that_answers_too_few_has_failed() -> None:
    class Mute(Gate):
        def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
            return []

    async with running(Mute()) as batcher:
        with pytest.raises(RequestFailed, match="0 answers to 1 questions"):
            await batcher.ask(question())
