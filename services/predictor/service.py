"""The predictor process: answers ``predict`` in micro-batches."""

import asyncio

from services.predictor.batcher import MicroBatcher
from services.predictor.config import PredictorSettings
from services.predictor.distribution import BUCKET_EDGES_TOKENS, LengthDistribution
from services.predictor.loading import load_predictor
from services.predictor.predictors import LengthPredictor, LengthQuestion
from shared.bus.base import Subscription
from shared.errors import InvalidRequest, Refused, RequestFailed
from shared.messages import subjects
from shared.messages.base import Message, expect
from shared.messages.predict import LengthPrediction, PredictLength
from shared.metrics import SHORT_BUCKETS_S
from shared.reporting import OpenBus, Reporter, connect_bus
from shared.runtime import Runtime, Service

QUEUE_GROUP = "predictor"
STUCK_AFTER_S = 30.0
"""A predictor that has not finished a batch by then will not; the process is to be restarted."""


class PredictorService(Service):
    """One of the predictors; several share the questions as a queue group.

    It is in nobody's way: a question that it does not answer is served with ``max_tokens``.
    """

    def __init__(
        self,
        settings: PredictorSettings,
        *,
        predictor: LengthPredictor | None = None,
        open_bus: OpenBus = connect_bus,
    ) -> None:
        self._settings = settings
        self._predictor = predictor or load_predictor(settings)
        self._open_bus = open_bus

    async def start(self, runtime: Runtime) -> None:
        """Join the bus and answer."""
        settings = self._settings
        self._runtime = runtime
        self._make_metrics(runtime)
        self._batcher = MicroBatcher(
            self._predictor.predict,
            max_batch_size=settings.max_batch_size,
            max_wait_s=settings.max_batch_wait_s,
            max_waiting=settings.max_waiting,
            on_batch=self._on_batch,
        )
        runtime.health.add_liveness_check("predictor", self._why_stuck)
        bus = await self._open_bus(settings, runtime)
        self._reporter = Reporter(
            bus,
            role="predictor",
            instance=settings.instance,
            model=settings.served_model_name,
            gauges=self._gauges,
            labels=lambda: {"predictor": self._predictor.name},
        )
        runtime.spawn(self._batcher.run(), name="batches")
        self._questions: Subscription = await bus.serve(
            subjects.predict(),
            self._on_predict,
            queue=QUEUE_GROUP,
            # Above what may wait and be predicted, so that it is the batcher who refuses.
            max_concurrency=settings.max_waiting + 2 * settings.max_batch_size,
        )
        runtime.spawn(self._reporter.run(), name="reports")

    async def stop_intake(self) -> None:
        """Leave the queue group; what has come is still answered."""
        await self._reporter.drain()
        await self._questions.unsubscribe(timeout_s=self._settings.answer_timeout_s)

    async def drain(self, deadline_s: float) -> None:
        """Nothing is left: leaving the queue group has waited for the answers."""
        await self._reporter.leave()

    def _make_metrics(self, runtime: Runtime) -> None:
        metrics = runtime.metrics
        self._answered = metrics.counter(
            "predictor", "answered", "requests", "Questions answered, by predictor", ["predictor"]
        ).labels(self._predictor.name)
        self._unanswered = metrics.counter(
            "predictor", "unanswered", "requests", "Questions without an answer", ["reason"]
        )
        self._batches = metrics.counter("predictor", "predicted", "batches", "Batches predicted")
        self._batch_seconds = metrics.histogram(
            "predictor", "batch", "seconds", "Time of one batch", buckets=SHORT_BUCKETS_S
        )
        self._num_waiting = metrics.gauge(
            "predictor", "waiting", "requests", "Questions whose batch has not begun"
        )

    def _gauges(self) -> dict[str, float]:
        stats = self._batcher.stats
        self._num_waiting.set(self._batcher.num_waiting)
        return {
            "num_waiting": float(self._batcher.num_waiting),
            "total_answered": float(stats.num_answered),
            "total_failed": float(stats.num_failed),
            "total_refused": float(stats.num_refused),
            "mean_batch_size": stats.num_answered / max(1, stats.num_batches),
        }

    def _on_batch(self, size: int, seconds: float) -> None:
        self._answered.inc(size)
        self._batches.inc()
        self._batch_seconds.observe(seconds)

    def _why_stuck(self) -> str | None:
        busy_s = self._batcher.busy_s
        return f"at one batch for {busy_s:.0f} s" if busy_s > STUCK_AFTER_S else None

    async def _on_predict(self, message: Message) -> Message:
        question = expect(message, PredictLength)
        if question.max_tokens < 1:
            raise InvalidRequest("must be at least 1", field="max_tokens")
        try:
            async with asyncio.timeout(self._settings.answer_timeout_s):
                distribution = await self._batcher.ask(
                    LengthQuestion(question.prompt_token_ids, question.max_tokens)
                )
        except TimeoutError as error:
            self._unanswered.labels("timeout").inc()
            limit_s = self._settings.answer_timeout_s
            raise RequestFailed(f"not predicted within {limit_s} s") from error
        except (RequestFailed, Refused) as error:
            self._unanswered.labels(
                "failed" if isinstance(error, RequestFailed) else "refused"
            ).inc()
            raise
        return self._answer(question, distribution)

    def _answer(self, question: PredictLength, found: LengthDistribution) -> LengthPrediction:
        return LengthPrediction(
            request_id=question.request_id,
            predictor=self._predictor.name,
            bucket_edges=BUCKET_EDGES_TOKENS,
            probabilities=found.truncated(question.max_tokens),
            p50_tokens=found.quantile_tokens(0.5, question.max_tokens),
            p90_tokens=found.quantile_tokens(0.9, question.max_tokens),
        )
