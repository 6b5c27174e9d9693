"""Length predictions for waiting requests: asked for at once, never waited for."""

import asyncio
import logging

from services.scheduler.config import SchedulerSettings
from services.scheduler.counters import SchedulerCounters
from services.scheduler.dispatcher import Dispatcher
from shared.bus.base import Bus
from shared.clock import Clock
from shared.core.policies.base import LengthEstimate
from shared.core.request import Request, RequestKey
from shared.errors import BusError, ProtocolError
from shared.messages import subjects
from shared.messages.predict import LengthPrediction, PredictLength

log = logging.getLogger(__name__)


class Predictions:
    """Asks the predictors with a bounded number of questions under way.

    A predictor that is slow, gone or answers rubbish changes nothing but the estimate: the policy
    goes on with ``max_tokens``, and a counter says so.
    """

    def __init__(
        self,
        bus: Bus,
        settings: SchedulerSettings,
        clock: Clock,
        counters: SchedulerCounters,
        dispatcher: Dispatcher,
    ) -> None:
        self._bus = bus
        self._timeout_s = settings.predict_timeout_s
        self._clock = clock
        self._counters = counters
        self._dispatcher = dispatcher
        self._questions: asyncio.Queue[Request] = asyncio.Queue(settings.max_predictions_waiting)
        self._num_workers = settings.max_predictions_in_flight
        self._unanswered: set[RequestKey] = set()

    def ask(self, request: Request) -> None:
        """Have the length of ``request`` predicted; dropped and counted when too many wait."""
        try:
            self._questions.put_nowait(request)
        except asyncio.QueueFull:
            self._counters.predictions_dropped.inc()
            return
        self._unanswered.add(request.key)

    def on_dispatched(self, key: RequestKey) -> None:
        """The request left the queue; counted if its prediction had not come by then."""
        if key in self._unanswered:
            self._counters.dispatched_unpredicted.inc()

    async def run(self) -> None:
        """Answer questions until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._num_workers):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            request = await self._questions.get()
            try:
                await self._predict(request)
            except (BusError, ProtocolError) as error:
                log.debug("no prediction: %s", error)
                self._counters.predictions_failed.inc()
            finally:
                self._unanswered.discard(request.key)

    async def _predict(self, request: Request) -> None:
        question = PredictLength(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            max_tokens=request.sampling.max_tokens,
        )
        answer = await self._bus.request(
            subjects.predict(), question, LengthPrediction, timeout_s=self._timeout_s
        )
        p50, p90 = answer.p50_tokens, answer.p90_tokens
        if not 1 <= p50 <= p90 <= request.sampling.max_tokens:
            self._counters.predictions_failed.inc()
            log.warning("predictor %s says p50 %d, p90 %d", answer.predictor, p50, p90)
            return
        self._dispatcher.policy.on_prediction(
            request.key, LengthEstimate(p50_tokens=p50, p90_tokens=p90), self._clock.now_s()
        )
