"""What a worker does with each attempt: reserve, receive, prefill, send, decode, end."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from shared.core.request import RequestKey
from shared.engine.outputs import KVExport
from shared.engine.thread import EngineThread
from shared.errors import InvalidRequest, ProtocolError, StaleCommand
from shared.kvcache.layout import KVLayout
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.tokens import TokenBatch, TokenDelta
from shared.messages.workers import (
    AttemptEnded,
    HandoffTrailer,
    HeldRequest,
    KVReserved,
    KVTarget,
    PrefillFinished,
    RequestStage,
    ReserveKV,
    StartBatch,
    TransferFinished,
)
from shared.transport.base import TransferIds, Transport
from shared.worker.attempts import Attempt, AttemptTable
from shared.worker.config import WorkerSettings
from shared.worker.joining import INFRASTRUCTURE_ERRORS, Newcomer, join
from shared.worker.kv_receiver import read_trailer, receive_kv
from shared.worker.kv_sender import KVSender
from shared.worker.output_log import OutputLog
from shared.worker.store_client import StoreClient, StorePlan

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Work:
    """What runs for one attempt on the event loop, and the KV it may still offer to the store."""

    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    plan: StorePlan | None = None
    exports: list[KVExport] = field(default_factory=list)


class Executor:
    """Owns the attempts of this worker; used from the event loop only.

    ``publish(subject, message)`` queues a message; what is published leaves in that order.
    """

    def __init__(
        self,
        *,
        settings: WorkerSettings,
        engine: EngineThread,
        transport: Transport,
        layout: KVLayout,
        kv_layout: str,
        attempts: AttemptTable,
        outputs: OutputLog,
        store: StoreClient,
        publish: Callable[[str, Message], None],
        now_s: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._instance = settings.instance
        self._engine = engine
        self._transport = transport
        self._layout = layout
        self._kv_layout = kv_layout
        self._attempts = attempts
        self._outputs = outputs
        self._store = store
        self._publish = publish
        self._now_s = now_s
        self._transfer_ids = TransferIds()
        self._sender = KVSender(transport, layout, piece_timeout_s=settings.transfer_timeout_s)
        self._work: dict[RequestKey, _Work] = {}
        self._joining: set[asyncio.Task[None]] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def idle(self) -> None:
        """Return when no attempt is here."""
        await self._is_idle.wait()

    def held(self) -> tuple[HeldRequest, ...]:
        """Live attempts, and ended ones whose output can still be asked for."""
        ended = tuple(
            HeldRequest(
                request_id=key.request_id,
                attempt=key.attempt,
                gateway=gateway,
                stage=RequestStage.ENDED,
                num_tokens=0,
            )
            for key, gateway in self._outputs.ended()
            if self._attempts.get(key) is None
        )
        return self._attempts.held() + ended

    # Commands

    async def reserve(self, command: ReserveKV) -> KVReserved:
        """Reserve blocks and begin to receive; asked again, the same reservation is the answer."""
        request = command.request
        known = self._attempts.get(request.key)
        if known is not None:
            if known.stage is RequestStage.RESERVED and known.target is not None:
                return self._reserved(known.key, known.target)
            self._drop(known)
        if command.kv_layout != self._kv_layout:
            raise ProtocolError(f"KV layout {command.kv_layout} is not {self._kv_layout}")
        self._make_way(request.key)
        attempt = Attempt(request=request, gateway=command.gateway, stage=RequestStage.RESERVED)
        self._begin(attempt)
        try:
            reservation = await asyncio.wrap_future(
                self._engine.call(
                    lambda e: e.reserve(request.key, request.num_tokens, prefix_of=request)
                )
            )
        except BaseException:
            if self._attempts.get(request.key) is attempt:
                self._outputs.discard([request.key])
                self._forget(attempt)
            raise
        if self._attempts.get(request.key) is not attempt:
            raise StaleCommand("aborted while its blocks were being reserved")
        attempt.target = KVTarget(
            instance=self._instance,
            transfer_id=self._transfer_ids.next(),
            address=self._transport.address,
            first_block=reservation.num_cached_tokens // self._layout.block_size,
        )
        self._spawn(attempt, self._receive(attempt, attempt.target, command.ttl_s))
        return self._reserved(attempt.key, attempt.target)

    @staticmethod
    def _reserved(key: RequestKey, target: KVTarget) -> KVReserved:
        return KVReserved(request_id=key.request_id, attempt=key.attempt, target=target)

    def start(self, command: StartBatch) -> int:
        """Begin to prefill a batch; returns how many of it were not known already.

        With static batching its members join the engine in one call: those that came later would
        have to wait until the others have ended.
        """
        started: list[Attempt] = []
        for item in command.items:
            known = self._attempts.get(item.request.key)
            if known is not None and known.stage is not RequestStage.RESERVED:
                continue
            if known is not None:
                # Reserved for an older leader; this one has it served here from the start.
                self._drop(known)
            try:
                self._make_way(item.request.key)
            except StaleCommand as error:
                log.info("not started: %s", error)
                continue
            attempt = Attempt(
                request=item.request,
                gateway=item.gateway,
                stage=RequestStage.PREFILL,
                target=item.target,
                peer=item.target.instance if item.target is not None else "",
                batch_id=command.batch_id,
            )
            self._begin(attempt)
            started.append(attempt)
        is_static = self._settings.batching == "static"
        for attempts in [started] if is_static else [[attempt] for attempt in started]:
            fetching = [self._spawn(attempt, self._fetch(attempt)) for attempt in attempts]
            task = asyncio.create_task(self._join(attempts, fetching), name="join the engine")
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)
            task.add_done_callback(_log_unexpected)
        return len(started)

    def abort(self, keys: Iterable[RequestKey]) -> int:
        """Stop attempts and free what they hold; unknown ones are ignored."""
        aborted = 0
        for key in keys:
            attempt = self._attempts.get(key)
            if attempt is not None:
                self._drop(attempt)
                aborted += 1
        return aborted

    def hand_over(self, reason: str) -> None:
        """Give up everything that is here, so that it goes on elsewhere."""
        for attempt in self._attempts:
            self._lose(attempt, reason)

    # Reserving and receiving

    async def _receive(self, attempt: Attempt, target: KVTarget, ttl_s: float) -> None:
        key = attempt.key
        try:
            piece = await receive_kv(
                self._transport,
                self._engine,
                key,
                transfer_id=target.transfer_id,
                timeout_s=ttl_s,
            )
            trailer = read_trailer(piece, key)
            await self._take_over(attempt, trailer)
        except INFRASTRUCTURE_ERRORS as error:
            self._lose(attempt, f"the KV did not arrive: {error or type(error).__name__}")

    async def _take_over(self, attempt: Attempt, trailer: HandoffTrailer) -> None:
        request = attempt.request
        num_known = len(request.output_token_ids)
        delta = TokenDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            offset=num_known,
            token_ids=trailer.output_token_ids[num_known:],
            logprobs=trailer.logprobs,
            finish_reason=trailer.finish_reason,
            num_cached_tokens=trailer.num_cached_tokens,
        )
        self._outputs.append(delta, self._now_s())
        attempt.num_output_tokens = len(delta.token_ids)
        attempt.num_cached_tokens = trailer.num_cached_tokens
        self._event(
            TransferFinished(
                instance=self._instance,
                request_id=request.request_id,
                attempt=request.attempt,
            )
        )
        if trailer.finish_reason is not None:
            self._release(attempt.key)
            self._end(attempt)
            return
        attempt.stage = RequestStage.DECODE
        resumed = replace(request, output_token_ids=trailer.output_token_ids)
        await asyncio.wrap_future(
            self._engine.call(
                lambda e: e.start_reserved(resumed, num_computed_tokens=resumed.num_tokens - 1)
            )
        )

    # Prefilling and sending

    async def _fetch(self, attempt: Attempt) -> int:
        """Open the transfer to the target and fetch the stored prefix; its length in tokens."""
        work = self._work[attempt.key]
        if attempt.target is not None:
            sending = self._sender.open(attempt.key, attempt.target)
            sending.add_done_callback(lambda done: self._on_sent(attempt, done))
        work.plan = self._store.plan(attempt.request)
        return await self._store.fetch(attempt.request, work.plan) if work.plan is not None else 0

    async def _join(self, attempts: list[Attempt], fetching: list[asyncio.Task[int]]) -> None:
        """Add ``attempts`` to the engine in one call, but for whoever was dropped meanwhile."""
        results = await asyncio.gather(*fetching, return_exceptions=True)
        fetched = [
            (attempt, num_stored_tokens)
            for attempt, num_stored_tokens in zip(attempts, results, strict=True)
            if isinstance(num_stored_tokens, int) and self._attempts.get(attempt.key) is attempt
        ]
        newcomers = [
            Newcomer(
                request=attempt.request,
                num_stored_tokens=num_stored_tokens,
                prefill_only=attempt.target is not None,
                export=attempt.target is not None or self._work[attempt.key].plan is not None,
            )
            for attempt, num_stored_tokens in fetched
        ]
        errors = await join(self._engine, newcomers)
        for (attempt, _), error in zip(fetched, errors, strict=True):
            if isinstance(error, InvalidRequest) and self._attempts.get(attempt.key) is attempt:
                self._fail(attempt, str(error))
            elif error is not None:
                self._lose(attempt, f"not started: {error}")

    def on_exports(self, exports: list[KVExport]) -> None:
        """KV came out of the engine, in layer order: send it on, and keep it for the store."""
        by_key: dict[RequestKey, list[KVExport]] = {}
        for export in exports:
            by_key.setdefault(export.key, []).append(export)
        for key, own in by_key.items():
            work = self._work.get(key)
            if work is not None:
                self._sender.push(key, own)
                if work.plan is not None:
                    work.exports += own

    def on_output(self, attempt: Attempt, delta: TokenDelta) -> None:
        """Tokens of ``attempt`` came out of the engine and are on their way to the gateway."""
        if attempt.stage is RequestStage.PREFILL and not delta.error:
            self._on_prefilled(attempt, delta)
        if attempt.target is not None and attempt.stage is RequestStage.SENDING:
            return
        if delta.finish_reason is not None or delta.error:
            self._end(attempt, delta.error)

    def _on_prefilled(self, attempt: Attempt, delta: TokenDelta) -> None:
        key, work = attempt.key, self._work[attempt.key]
        self._event(
            PrefillFinished(
                instance=self._instance,
                request_id=key.request_id,
                attempt=key.attempt,
                batch_id=attempt.batch_id,
                num_prompt_tokens=attempt.request.num_tokens,
                num_cached_tokens=delta.num_cached_tokens,
            )
        )
        if work.plan is not None:
            self._store.offer(work.plan, work.exports)
            work.exports = []
        if attempt.target is None:
            attempt.stage = RequestStage.DECODE
            return
        attempt.stage = RequestStage.SENDING
        self._sender.finish(
            key,
            HandoffTrailer(
                request_id=key.request_id,
                attempt=key.attempt,
                output_token_ids=attempt.request.output_token_ids + delta.token_ids,
                logprobs=delta.logprobs,
                finish_reason=delta.finish_reason,
                num_cached_tokens=delta.num_cached_tokens,
            ),
        )
        # The exports are copies: the blocks are free now, and stay cached for the next prompt.
        self._release(key)

    def _on_sent(self, attempt: Attempt, done: asyncio.Task[None]) -> None:
        if done.cancelled() or self._attempts.get(attempt.key) is not attempt:
            return
        error = done.exception()
        if error is not None:
            self._lose(attempt, f"the KV did not reach {attempt.peer}: {error}")
        else:
            self._outputs.close(attempt.key, self._now_s())
            self._forget(attempt)

    # Beginnings and ends

    def _begin(self, attempt: Attempt) -> None:
        self._attempts.put(attempt)
        self._work[attempt.key] = _Work()
        self._outputs.open(
            attempt.key, gateway=attempt.gateway, offset=len(attempt.request.output_token_ids)
        )
        self._is_idle.clear()

    def _make_way(self, key: RequestKey) -> None:
        older = self._attempts.older(key)
        if older is not None:
            self._drop(older)

    def _end(self, attempt: Attempt, error: str = "") -> None:
        """The attempt is over here; its output stays until it is acknowledged."""
        self._sender.abort(attempt.key)
        self._forget(attempt)
        self._event(
            AttemptEnded(
                instance=self._instance,
                request_id=attempt.key.request_id,
                attempt=attempt.key.attempt,
                num_output_tokens=attempt.num_output_tokens,
                error=error,
            )
        )

    def _fail(self, attempt: Attempt, error: str) -> None:
        """The request itself is at fault: its gateway must know."""
        delta = TokenDelta(
            request_id=attempt.key.request_id,
            attempt=attempt.key.attempt,
            offset=len(attempt.request.output_token_ids),
            error=error,
        )
        self._outputs.append(delta, self._now_s())
        batch = TokenBatch(instance=self._instance, deltas=(delta,))
        self._publish(subjects.tokens_to(attempt.gateway), batch)
        self._release(attempt.key)
        self._end(attempt, error)

    def _lose(self, attempt: Attempt, reason: str) -> None:
        """Something around the attempt failed: the leader has it go on elsewhere."""
        if self._attempts.get(attempt.key) is not attempt:
            return
        log.warning("%s", reason, extra={"request_id": attempt.key.request_id})
        self._drop(attempt)
        self._end(attempt, reason)

    def _drop(self, attempt: Attempt) -> None:
        """Stop whatever runs for the attempt and free its blocks, without a word to anybody."""
        self._sender.abort(attempt.key)
        self._outputs.discard([attempt.key])
        self._forget(attempt)
        self._release(attempt.key)

    def _forget(self, attempt: Attempt) -> None:
        if self._attempts.get(attempt.key) is not attempt:
            return
        self._attempts.remove(attempt.key)
        work = self._work.pop(attempt.key, None)
        if work is not None:
            for task in work.tasks:
                if task is not asyncio.current_task():
                    task.cancel()
        if not len(self._attempts):
            self._is_idle.set()

    def _release(self, key: RequestKey) -> None:
        self._engine.call(lambda e: e.release(key))

    def _spawn(self, attempt: Attempt, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=f"attempt {attempt.key}")
        self._work[attempt.key].tasks.append(task)
        task.add_done_callback(_log_unexpected)
        return task

    def _event(self, message: AttemptEnded | PrefillFinished | TransferFinished) -> None:
        self._publish(subjects.request_events(message.request_id), message)


def _log_unexpected(task: asyncio.Task[Any]) -> None:
    """An error that nobody foresaw is a bug: have it logged with its traceback."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("an attempt failed unexpectedly", exc_info=error)
