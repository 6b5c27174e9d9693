"""Owner of every live request of this gateway: submits, listens, asks again, and ends each once.

The gateway is the truth of an online request. Everything that arrives over the bus is a hint that
may be late, lost, doubled or about an attempt that is over; ``LiveRequest`` sorts that out, and
this module does the talking. A request that has been silent for ``silence_s`` is asked after:
first the instances that should have it, then the leader.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import Any

from services.gateway.config import GatewaySettings
from services.gateway.counters import GatewayCounters
from services.gateway.ended_request import EndedRequest
from services.gateway.generation import GenerationRequest, TokenEvent, Unserved
from services.gateway.leader_client import FIRST_RETRY_S, LAST_RETRY_S, LeaderClient
from services.gateway.live_request import LiveRequest, Progress
from services.gateway.token_stream import TokenStream
from services.gateway.tracked import Tracked
from shared.bus.base import Bus
from shared.clock import Clock
from shared.core.lifecycle import RequestEvent, RequestState
from shared.core.request import FinishReason, Request, RequestKey
from shared.errors import BusError, NoResponder, ProtocolError, Refused, RequestFailed
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.requests import (
    AttemptLost,
    AttemptPlaced,
    GatewaySnapshot,
    LeaderChanged,
    SubmitReply,
    SubmitStatus,
)
from shared.messages.tokens import (
    AckTokens,
    StreamState,
    TokenBatch,
    TokenDelta,
    TokensSince,
    TokensSinceReply,
)

log = logging.getLogger(__name__)

MAX_UNKNOWN = 3
"""Inquiries in a row that no instance could answer, after which an attempt is given up."""


class Found(Enum):
    """Whether an instance is at an attempt; ``UNSURE`` if one did not answer in time."""

    YES = auto()
    NO = auto()
    UNSURE = auto()


class RequestTracker:
    """Implements ``Generator`` over the bus."""

    def __init__(
        self,
        bus: Bus,
        settings: GatewaySettings,
        clock: Clock,
        counters: GatewayCounters,
        on_end: Callable[[EndedRequest], None] = lambda _: None,
    ) -> None:
        """``on_end`` is told of each request once, in its terminal state; it must not raise."""
        self._bus = bus
        self._settings = settings
        self._gateway = settings.instance
        self._clock = clock
        self._counters = counters
        self._on_end = on_end
        self._leader = LeaderClient(bus, settings, clock)
        self._tracked: dict[str, Tracked] = {}
        self._acks: dict[str, list[RequestKey]] = defaultdict(list)
        self._background: set[asyncio.Task[None]] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._tracked)

    async def start(self) -> None:
        """Listen for tokens, hints and questions."""
        self._bus.add_reconnect_listener(self._on_reconnect)
        await self._bus.subscribe(subjects.tokens_to(self._gateway), self._on_tokens)
        await self._bus.subscribe(subjects.gateway_events(self._gateway), self._on_hint)
        await self._bus.subscribe(subjects.leader_events(), self._on_hint)
        await self._bus.serve(subjects.snapshot(self._gateway), self._on_snapshot)

    async def run(self) -> None:
        """Ask after silent requests and acknowledge ended ones. Runs until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._settings.silence_s / 4)
                self._look_for_silence()
                await self._send_acks()
        finally:
            for task in self._background:
                task.cancel()

    async def idle(self) -> None:
        """Return when no request is live and all closings are delivered."""
        await self._is_idle.wait()
        if self._background:
            await asyncio.wait(self._background)
        await self._send_acks()

    # Taking and ending requests

    async def submit(self, request: GenerationRequest) -> TokenStream:
        """Have ``request`` accepted by the leader; raises ``Refused`` or ``Unserved``."""
        now_s = self._clock.now_s()
        live = LiveRequest(
            Request(
                request_id=request.request_id,
                attempt=0,
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                slo=request.slo,
                priority=request.priority,
                tenant=request.tenant,
                group_id=request.group_id,
            ),
            accepted_s=now_s,
        )
        tracked = Tracked(live, request)
        tracked.stream = TokenStream(lambda reason: self._on_consumer_left(tracked, reason))
        self._tracked[request.request_id] = tracked
        self._is_idle.clear()
        try:
            await self._submit(tracked, give_up_s=self._settings.accept_timeout_s)
        except BaseException as error:
            if isinstance(error, Exception):
                self._end(tracked, RequestEvent.FAIL, error=error)
            else:
                self._end(tracked, RequestEvent.CANCEL)
            raise
        self._counters.accepted.inc()
        return tracked.stream

    async def _submit(
        self, tracked: Tracked, *, give_up_s: float, is_resend: bool = False
    ) -> SubmitReply | None:
        reply = await self._leader.submit(
            tracked.live, tracked.model, give_up_s=give_up_s, is_resend=is_resend
        )
        if reply is not None:
            self._on_submit_reply(tracked, reply)
        return reply

    def _on_submit_reply(self, tracked: Tracked, reply: SubmitReply) -> None:
        now_s = self._clock.now_s()
        if reply.attempt != tracked.live.attempt or tracked.live.is_terminal:
            return
        match reply.status:
            case SubmitStatus.QUEUED:
                tracked.live.on_accepted(now_s)
            case SubmitStatus.PLACED:
                tracked.live.on_placed(reply.attempt, reply.instances, now_s)
            case SubmitStatus.LOST:
                tracked.live.on_accepted(now_s)
                self._on_lost(tracked, reply.attempt, reply.reason)

    def _on_lost(self, tracked: Tracked, attempt: int, reason: str) -> None:
        """Go on with the next attempt from the prompt and what was emitted."""
        live = tracked.live
        if not live.on_lost(attempt, self._clock.now_s()):
            return
        self._counters.lost.inc()
        log.info(
            "attempt %d lost after %d tokens: %s",
            attempt,
            len(live.output_token_ids),
            reason,
            extra={"request_id": live.request_id},
        )
        self._resubmit(tracked)

    def _resubmit(self, tracked: Tracked, *, is_resend: bool = False) -> None:
        if tracked.submission not in (None, asyncio.current_task()):
            tracked.submission.cancel()
        tracked.submission = self._spawn(self._resubmission(tracked, is_resend))

    async def _resubmission(self, tracked: Tracked, is_resend: bool) -> None:
        """Submit until taken: an accepted request is not refused any more.

        Attempts that are lost one after the other come slower and slower, and not for ever.
        """
        live = tracked.live
        deadline_s = self._clock.now_s() + self._settings.max_outage_s
        if live.num_fruitless > 1:
            deadline_s = live.fruitless_since_s + self._settings.max_outage_s
            if self._clock.now_s() > deadline_s:
                self._fail(tracked, f"{live.num_fruitless} attempts were lost in a row")
                return
            await asyncio.sleep(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(live.num_fruitless, 8)))
        while True:
            left_s = deadline_s - self._clock.now_s()
            try:
                await self._submit(tracked, give_up_s=left_s, is_resend=is_resend)
                return
            except Refused as refusal:
                if isinstance(refusal, Unserved) or left_s <= refusal.retry_after_s:
                    self._fail(tracked, str(refusal))
                    return
                await asyncio.sleep(refusal.retry_after_s)

    def _fail(self, tracked: Tracked, reason: str) -> None:
        error = RequestFailed(reason)
        if self._end(tracked, RequestEvent.FAIL, error=error):
            tracked.stream.fail(error)

    def _on_consumer_left(self, tracked: Tracked, finish_reason: FinishReason | None) -> None:
        event = RequestEvent.FINISH if finish_reason else RequestEvent.CANCEL
        self._end(tracked, event, finish_reason=finish_reason)

    def _end(
        self,
        tracked: Tracked,
        event: RequestEvent,
        *,
        finish_reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> bool:
        """Write the one terminal state, and have whatever is left of the request freed."""
        live = tracked.live
        if self._tracked.pop(live.request_id, None) is None:
            return False
        if not live.is_terminal:
            if live.state is RequestState.RECEIVED and event is not RequestEvent.FAIL:
                live.lifecycle.apply(RequestEvent.CANCEL)
            else:
                live.lifecycle.apply(event)
            if live.state is RequestState.CANCELLING:
                live.lifecycle.apply(RequestEvent.CANCELLED)
        for task in (tracked.submission, tracked.inquiry):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        ended = tracked.ended(self._clock.now_s(), finish_reason, error)
        self._counters.ended(ended.state, ended.e2e_s)
        for instance in live.instances:
            self._acks[instance].append(live.key)
        self._spawn(self._leader.close(tracked.model, live))
        if not self._tracked:
            self._is_idle.set()
        self._on_end(ended)
        return True

    # What arrives

    async def _on_tokens(self, message: Message, subject: str) -> None:
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                self._on_delta(message.instance, delta)

    def _on_delta(self, instance: str, delta: TokenDelta) -> None:
        tracked = self._tracked.get(delta.request_id)
        if tracked is None:
            self._counters.stale.inc()
            return
        live = tracked.live
        now_s = self._clock.now_s()
        progress = live.on_delta(delta, now_s)
        if progress.is_stale:
            self._counters.stale.inc()
            return
        if instance not in live.instances:
            live.instances = (instance, *live.instances)
        if progress.error:
            self._on_attempt_failed(tracked, instance, progress.error)
            return
        if progress.token_ids:
            if tracked.first_token_s is None:
                tracked.first_token_s = now_s
                self._counters.ttft.observe(now_s - live.accepted_s)
            tracked.last_token_s = now_s
        self._pass_on(tracked, progress)
        if progress.has_gap and tracked.inquiry is None:
            tracked.inquiry = self._spawn(
                self._inquire(tracked, delay_s=self._settings.gap_patience_s)
            )

    def _pass_on(self, tracked: Tracked, progress: Progress) -> None:
        if progress.token_ids or progress.finish_reason is not None:
            self._counters.tokens.inc(len(progress.token_ids))
            tracked.stream.push(
                TokenEvent(
                    token_ids=progress.token_ids,
                    logprobs=progress.logprobs,
                    finish_reason=progress.finish_reason,
                    num_cached_tokens=tracked.live.num_cached_tokens,
                )
            )
        if progress.finish_reason is not None:
            self._end(tracked, RequestEvent.FINISH, finish_reason=progress.finish_reason)

    def _on_attempt_failed(self, tracked: Tracked, instance: str, error: str) -> None:
        """A worker gave up on the attempt: another one may do better, but not for ever."""
        tracked.live.num_failures += 1
        if tracked.live.num_failures > self._settings.max_failures:
            self._fail(tracked, f"{instance}: {error}")
        else:
            self._on_lost(tracked, tracked.live.attempt, f"{instance}: {error}")

    async def _on_hint(self, message: Message, subject: str) -> None:
        match message:
            case AttemptPlaced():
                tracked = self._tracked.get(message.request_id)
                if tracked is not None:
                    tracked.live.on_placed(message.attempt, message.instances, self._clock.now_s())
            case AttemptLost():
                tracked = self._tracked.get(message.request_id)
                if tracked is not None:
                    self._on_lost(tracked, message.attempt, message.reason)
            case LeaderChanged(model=self._settings.served_model_name):
                log.info("%s leads, epoch %d", message.scheduler, message.leader_epoch)
                for tracked in tuple(self._tracked.values()):
                    if tracked.live.state is not RequestState.RECEIVED:
                        self._resubmit(tracked, is_resend=True)

    async def _on_snapshot(self, message: Message) -> Message:
        return GatewaySnapshot(
            gateway=self._gateway, requests=tuple(t.live.key for t in self._tracked.values())
        )

    async def _on_reconnect(self) -> None:
        """Tokens, and the word of a new leader, may have been missed: ask after everything."""
        for tracked in tuple(self._tracked.values()):
            self._ask_after(tracked)
            if tracked.live.state is not RequestState.RECEIVED:
                self._resubmit(tracked, is_resend=True)

    # Asking again

    def _look_for_silence(self) -> None:
        now_s = self._clock.now_s()
        for tracked in tuple(self._tracked.values()):
            if now_s - tracked.live.last_heard_s > self._settings.silence_s:
                self._ask_after(tracked)

    def _ask_after(self, tracked: Tracked) -> None:
        is_busy = tracked.submission is not None and not tracked.submission.done()
        is_busy = is_busy or tracked.inquiry is not None
        if tracked.live.state is not RequestState.RECEIVED and not is_busy:
            tracked.inquiry = self._spawn(self._inquire(tracked))

    async def _inquire(self, tracked: Tracked, *, delay_s: float = 0.0) -> None:
        try:
            if delay_s:
                await asyncio.sleep(delay_s)
                if not tracked.live.has_gap:
                    return
            found = await self._ask_instances(tracked)
            if found is not Found.YES:
                await self._ask_leader(tracked, is_unknown=found is Found.NO)
        finally:
            tracked.inquiry = None

    async def _ask_instances(self, tracked: Tracked) -> Found:
        """Fetch what was missed; says whether some instance is at it."""
        live = tracked.live
        attempt = live.attempt
        found = Found.NO
        for instance in live.instances:
            question = TokensSince(
                request_id=live.request_id, attempt=attempt, offset=len(live.output_token_ids)
            )
            try:
                reply = await self._bus.request(
                    subjects.tokens_since(instance),
                    question,
                    TokensSinceReply,
                    timeout_s=self._settings.since_timeout_s,
                )
            except (BusError, ProtocolError) as error:
                log.debug("%s cannot be asked: %s", instance, error)
                if not isinstance(error, NoResponder):
                    found = Found.UNSURE  # busy, perhaps; whether it lives the leader judges
                continue
            if live.is_terminal or live.attempt != attempt:
                return Found.YES
            if reply.delta is not None:
                self._counters.refetched.inc(len(reply.delta.token_ids))
                self._on_delta(instance, reply.delta)
            if live.is_terminal or live.attempt != attempt:
                return Found.YES
            if reply.state is StreamState.RUNNING:
                live.last_heard_s = self._clock.now_s()
                live.num_unknown = 0
                return Found.YES
        return found

    async def _ask_leader(self, tracked: Tracked, *, is_unknown: bool) -> None:
        live = tracked.live
        attempt = live.attempt
        try:
            reply = await self._submit(
                tracked, give_up_s=self._settings.max_outage_s, is_resend=True
            )
        except Unserved as error:
            if self._clock.now_s() - live.last_heard_s > self._settings.max_outage_s:
                self._fail(tracked, str(error))
            return
        except Refused:
            self._resubmit(tracked, is_resend=True)
            return
        is_placed = reply is not None and reply.status is SubmitStatus.PLACED
        if is_unknown and is_placed and live.attempt == attempt:
            live.num_unknown += 1
            if live.num_unknown >= MAX_UNKNOWN:
                self._on_lost(tracked, attempt, "no instance knows it")

    async def _send_acks(self) -> None:
        acks, self._acks = self._acks, defaultdict(list)
        for instance, keys in acks.items():
            message = AckTokens(gateway=self._gateway, requests=tuple(keys))
            try:
                await self._bus.publish(subjects.tokens_ack(instance), message)
            except BusError as error:
                log.debug("%d outputs not acknowledged: %s", len(keys), error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
