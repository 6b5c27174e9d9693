"""Predicts what waits together: a model answers 32 questions in little more time than one."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.predictor.distribution import LengthDistribution
from services.predictor.predictors import LengthQuestion
from shared.errors import Refused, RequestFailed

log = logging.getLogger(__name__)

RETRY_AFTER_S = 0.1

Predict = Callable[[Sequence[LengthQuestion]], Sequence[LengthDistribution]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    question: LengthQuestion
    answer: asyncio.Future[LengthDistribution]


@dataclass(slots=True)
class BatchStats:
    """What a batcher has done; counts only grow."""

    num_answered: int = 0
    num_batches: int = 0
    num_failed: int = 0
    """Questions of batches that the predictor raised on."""
    num_refused: int = 0
    """Questions refused because too many waited."""
    num_given_up: int = 0
    """Questions whose asker had left before their batch began."""


class MicroBatcher:
    """Hands questions to ``predict`` in batches, one batch at a time, in a thread.

    A batch is closed when it has ``max_batch_size`` questions or ``max_wait_s`` after its first;
    while one is predicted the next gathers. ``on_batch(size, seconds)`` is told of each.
    """

    def __init__(
        self,
        predict: Predict,
        *,
        max_batch_size: int,
        max_wait_s: float,
        max_waiting: int,
        on_batch: Callable[[int, float], None],
    ) -> None:
        self._predict = predict
        self._max_batch_size = max_batch_size
        self._max_wait_s = max_wait_s
        self._on_batch = on_batch
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue(max_waiting)
        self._busy_since_s: float | None = None
        self.stats = BatchStats()

    @property
    def num_waiting(self) -> int:
        """Questions whose batch has not begun."""
        return self._waiting.qsize()

    @property
    def busy_s(self) -> float:
        """For how long the predictor has been at its present batch; 0 while it is idle."""
        if self._busy_since_s is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._busy_since_s

    async def ask(self, question: LengthQuestion) -> LengthDistribution:
        """Wait for an answer; whoever stops waiting is not predicted for.

        Raises ``Refused`` when too many wait and ``RequestFailed`` when the predictor fails.
        """
        waiting = _Waiting(question, asyncio.get_running_loop().create_future())
        try:
            self._waiting.put_nowait(waiting)
        except asyncio.QueueFull:
            self.stats.num_refused += 1
            reason = f"{self.num_waiting} questions are waiting"
            raise Refused(reason, retry_after_s=RETRY_AFTER_S) from None
        return await waiting.answer

    async def run(self) -> None:
        """Answer questions until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            await self._fill(batch)
            live = [waiting for waiting in batch if not waiting.answer.done()]
            self.stats.num_given_up += len(batch) - len(live)
            if live:
                await self._answer(live)

    async def _fill(self, batch: list[_Waiting]) -> None:
        closes_at_s = asyncio.get_running_loop().time() + self._max_wait_s
        while len(batch) < self._max_batch_size:
            if not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
                continue
            try:
                async with asyncio.timeout_at(closes_at_s):
                    batch.append(await self._waiting.get())
            except TimeoutError:
                return

    async def _answer(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        self._busy_since_s = began_s = loop.time()
        try:
            questions = [waiting.question for waiting in batch]
            answers = await asyncio.to_thread(self._predict, questions)
            if len(answers) != len(batch):
                raise ValueError(f"{len(answers)} answers to {len(batch)} questions")
        except Exception as error:  # one bad batch must not end the service: its askers are told
            log.exception("no prediction for %d questions", len(batch))
            self.stats.num_failed += len(batch)
            failure = f"the predictor failed: {type(error).__name__}: {error}"
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(RequestFailed(failure))
            return
        finally:
            self._busy_since_s = None
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
        self.stats.num_batches += 1
        self.stats.num_answered += len(batch)
        self._on_batch(len(batch), loop.time() - began_s)
