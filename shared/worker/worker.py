"""The worker process: an engine between the bus and the data plane.

The event loop talks; the engine's thread computes. What the engine produces arrives here through
``call_soon_threadsafe``, in its order: the KV exports of a step first, then the step's tokens.
"""

import asyncio
import gc
import logging
import sys
from collections.abc import Callable

from shared.bus.base import Bus
from shared.core.latency_model import LatencyModel
from shared.core.membership import Membership
from shared.core.request import RequestKey
from shared.engine.build import build_engine
from shared.engine.outputs import KVExport, RequestOutput, StepOutput
from shared.engine.thread import EngineInfo, EngineThread
from shared.errors import BusError, UnknownMessage
from shared.messages import subjects
from shared.messages.base import Message, expect
from shared.messages.load import InstanceExited, InstanceState, ServiceReport
from shared.messages.requests import Done, LeaderChanged, SnapshotRequest
from shared.messages.tokens import AckTokens, TokenBatch, TokenDelta, TokensSince, TokensSinceReply
from shared.messages.workers import (
    AbortRequests,
    ReserveKV,
    StartBatch,
    WorkerSnapshot,
)
from shared.reporting import OpenBus, connect_bus
from shared.runtime import Release, Runtime, Service
from shared.transport.base import Transport
from shared.transport.factory import create_transport
from shared.worker.attempts import AttemptTable
from shared.worker.config import WorkerSettings
from shared.worker.executor import Executor
from shared.worker.expert_load import ExpertLoadMeter
from shared.worker.latency import LatencyMeter, first_model, read_profile
from shared.worker.load import LoadMeter
from shared.worker.output_log import OutputLog
from shared.worker.store_client import StoreClient

log = logging.getLogger(__name__)

ENGINE_STOP_S = 5.0
EXPORT_BYTES = 1 << 20
"""KV is handed to the loop in portions of at least this size, or once a step: waking the loop for
every small layer would take the interpreter from the engine for more than the overlap is worth."""
GIL_SWITCH_S = 0.0005
"""The loop and the engine's thread share the interpreter: with Python's own 5 ms each would wait
that long for the other, many times a step."""


def open_transport(settings: WorkerSettings) -> Transport:
    """The transport that the settings name."""
    return create_transport(
        settings.transport, host=settings.transport_host, pull=settings.transport_pull
    )


class WorkerService(Service):
    """A prefill or decode instance; which of the two is only its ``settings.service``."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        open_bus: OpenBus = connect_bus,
        make_transport: Callable[[WorkerSettings], Transport] = open_transport,
    ) -> None:
        self._settings = settings
        self._make_transport = make_transport
        self._open_bus = open_bus
        self._role = settings.service
        self._outputs = OutputLog(ttl_s=settings.output_ttl_s)
        self._attempts = AttemptTable()
        self._to_publish: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._exports: list[KVExport] = []
        self._export_bytes = 0
        self._stores = Membership(ttl_s=settings.instance_ttl_s)

    # Start and stop

    async def start(self, runtime: Runtime) -> None:
        """Load the model, open the data plane, join the bus."""
        settings = self._settings
        path = settings.latency_profile
        self._profile = read_profile(path) if path is not None else None
        sys.setswitchinterval(GIL_SWITCH_S)
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._engine = EngineThread(
            lambda progress: build_engine(
                settings.engine_config(), kv_sink=self._from_engine_kv, on_progress=progress
            ),
            on_output=self._from_engine_step,
            on_fatal=lambda error: runtime.fail(error, "engine"),
            on_progress=lambda what, fraction: log.info(
                "%s", what, extra={"fraction": round(fraction, 2)}
            ),
            num_threads=settings.num_threads,
        )
        runtime.on_release(Release.DEVICE, "engine", self._stop_engine)
        info: EngineInfo = await asyncio.wrap_future(self._engine.start())
        # What there is now stays; looking through it again and again would stop all threads for
        # hundreds of milliseconds.
        gc.collect()
        gc.freeze()
        gc.enable()
        transport = self._make_transport(settings)
        runtime.on_release(Release.TRANSPORT, "transport", transport.close)
        await transport.start()
        bus = await self._open_bus(settings, runtime)
        self._compose(bus, transport, info)
        await self._subscribe()
        runtime.spawn(self._publish_in_order(), name="publisher")
        runtime.spawn(self._report(), name="reports")
        if await self._expert_load():
            runtime.spawn(self._follow_experts(), name="experts")

    def _compose(self, bus: Bus, transport: Transport, info: EngineInfo) -> None:
        settings = self._settings
        self._bus = bus
        self._transport = transport
        self._kv_layout = f"{info.spec.fingerprint}/{info.layout.name}"
        self._store_client = StoreClient(
            bus,
            transport,
            self._engine,
            info.layout,
            fingerprint=info.spec.fingerprint,
            timeout_s=settings.kvstore_timeout_s,
            piece_timeout_s=settings.transfer_timeout_s,
        )
        self._executor = Executor(
            settings=settings,
            engine=self._engine,
            transport=transport,
            layout=info.layout,
            kv_layout=self._kv_layout,
            attempts=self._attempts,
            outputs=self._outputs,
            store=self._store_client,
            publish=self._publish,
            now_s=self._loop.time,
        )
        base, is_profiled = first_model(self._profile, info, settings)
        self._set_prefill_cost(base)
        metrics = self._runtime.metrics
        self._meter = LoadMeter(
            settings=settings,
            info=info,
            transport=transport,
            kv_layout=self._kv_layout,
            attempts=self._attempts,
            latency=LatencyMeter(base, is_profiled=is_profiled, metrics=metrics, role=self._role),
            metrics=metrics,
        )

    async def _subscribe(self) -> None:
        bus, instance = self._bus, self._settings.instance
        await bus.subscribe(subjects.leader_events(), self._on_leader)
        await bus.subscribe(subjects.tokens_ack(instance), self._on_ack)
        await bus.serve(subjects.tokens_since(instance), self._on_tokens_since)
        await bus.serve(subjects.snapshot(instance), self._on_snapshot)
        # One subscription for all verbs: commands are begun in the order in which they were sent.
        await bus.serve(subjects.worker(self._role, instance, "*"), self._on_command)
        if self._settings.use_kvstore:
            await bus.subscribe(subjects.load_of_role("kvstore"), self._on_store_report)

    async def stop_intake(self) -> None:
        """Say so in the reports; what was placed here before it was heard is still taken."""
        self._meter.is_draining = True
        await self._send_report()

    async def drain(self, deadline_s: float) -> None:
        """Finish what is here; what is not finished by the deadline goes on elsewhere."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._executor.idle()
        except TimeoutError:
            log.warning("%d attempts are handed over unfinished", len(self._attempts))
            self._executor.hand_over("the instance shuts down")
        await self._to_publish.join()
        await self._send(InstanceExited(role=self._role, instance=self._settings.instance))

    async def _stop_engine(self) -> None:
        if not await asyncio.to_thread(self._engine.stop, ENGINE_STOP_S):
            log.error("the engine's thread did not end")

    # From the engine's thread

    def _in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    def _from_engine_kv(self, export: KVExport) -> None:
        self._exports.append(export)
        self._export_bytes += export.data.nbytes
        if self._export_bytes >= EXPORT_BYTES:
            self._flush_exports()

    def _flush_exports(self) -> None:
        if self._exports:
            self._in_loop(self._executor.on_exports, self._exports)
            self._exports, self._export_bytes = [], 0

    def _from_engine_step(self, output: StepOutput) -> None:
        self._flush_exports()
        self._in_loop(self._on_step, output)

    def _on_step(self, output: StepOutput) -> None:
        self._meter.on_step(output.stats)
        deltas: dict[str, list[TokenDelta]] = {}
        for item in output.outputs:
            self._on_output(item, deltas)
        for gateway, batch in deltas.items():
            message = TokenBatch(instance=self._settings.instance, deltas=tuple(batch))
            self._publish(subjects.tokens_to(gateway), message)

    def _on_output(self, output: RequestOutput, deltas: dict[str, list[TokenDelta]]) -> None:
        attempt = self._attempts.get(output.key)
        if attempt is None:
            return
        num_cached_tokens = attempt.num_cached_tokens
        if num_cached_tokens is None:
            num_cached_tokens = output.num_cached_tokens
        delta = TokenDelta(
            request_id=output.key.request_id,
            attempt=output.key.attempt,
            offset=output.offset,
            token_ids=output.token_ids,
            logprobs=output.logprobs or None,
            finish_reason=output.finish_reason,
            error=output.error or "",
            num_cached_tokens=num_cached_tokens,
        )
        self._outputs.append(delta, self._loop.time())
        deltas.setdefault(attempt.gateway, []).append(delta)
        attempt.num_output_tokens += len(output.token_ids)
        self._executor.on_output(attempt, delta)

    # From the bus

    async def _on_leader(self, message: Message, subject: str) -> None:
        if isinstance(message, LeaderChanged) and message.model == self._settings.served_model_name:
            self._attempts.see_epoch(message.leader_epoch)

    async def _on_command(self, message: Message) -> Message:
        match message:
            case ReserveKV():
                self._attempts.check_epoch(message.leader_epoch)
                return await self._executor.reserve(message)
            case StartBatch():
                self._attempts.check_epoch(message.leader_epoch)
                return Done(count=self._executor.start(message))
            case AbortRequests():
                self._attempts.check_epoch(message.leader_epoch)
                return Done(count=self._executor.abort(message.requests))
            case _:
                raise UnknownMessage(f"{type(message).__name__} is no command for a worker")

    async def _on_snapshot(self, message: Message) -> Message:
        self._attempts.check_epoch(expect(message, SnapshotRequest).leader_epoch)
        return WorkerSnapshot(
            role=self._role,
            instance=self._settings.instance,
            requests=self._executor.held(),
        )

    async def _on_tokens_since(self, message: Message) -> Message:
        question = expect(message, TokensSince)
        key = RequestKey(question.request_id, question.attempt)
        state, delta = self._outputs.since(key, question.offset)
        return TokensSinceReply(instance=self._settings.instance, state=state, delta=delta)

    async def _on_ack(self, message: Message, subject: str) -> None:
        if isinstance(message, AckTokens):
            self._outputs.discard(k for k in message.requests if self._attempts.get(k) is None)

    async def _on_store_report(self, message: Message, subject: str) -> None:
        now_s = self._loop.time()
        match message:
            case ServiceReport(state=InstanceState.READY):
                self._stores.on_report(message.instance, message.sequence, now_s)
            case ServiceReport() | InstanceExited():
                self._stores.remove(message.instance)
        self._store_client.stores = self._stores.instances

    # To the bus

    def _publish(self, subject: str, message: Message) -> None:
        """Queue ``message``; everything this worker publishes leaves in the order of its making."""
        self._to_publish.put_nowait((subject, message))

    async def _publish_in_order(self) -> None:
        while True:
            subject, message = await self._to_publish.get()
            try:
                await self._bus.publish(subject, message)
            except BusError as error:
                log.debug("%s not published, it can be asked for: %s", type(message), error)
            finally:
                self._to_publish.task_done()

    async def _report(self) -> None:
        while True:
            await self._send_report()
            now_s = self._loop.time()
            self._outputs.expire(now_s)
            if self._stores.expired(now_s):
                self._store_client.stores = self._stores.instances
            self._refresh_stats()
            await asyncio.sleep(self._settings.report_period_s)

    def _refresh_stats(self) -> None:
        """An idle engine makes no steps, yet blocks come and go: ask it, without waiting."""
        if self._meter.is_waiting_for_stats:
            return
        self._meter.is_waiting_for_stats = True
        future = self._engine.call(lambda e: e.stats())
        future.add_done_callback(
            lambda done: self._in_loop(
                self._meter.on_stats, done.result() if done.exception() is None else None
            )
        )

    async def _follow_experts(self) -> None:
        meter = ExpertLoadMeter(self._runtime.metrics, self._role)
        while True:
            meter.follow(await self._expert_load())
            await asyncio.sleep(self._settings.expert_load_period_s)

    async def _expert_load(self) -> dict[int, tuple[int, ...]]:
        return await asyncio.wrap_future(self._engine.call(lambda e: e.expert_load()))

    async def _send_report(self) -> None:
        report = self._meter.report(self._loop.time())
        if report.latency is not None and report.latency != self._prefill_model:
            self._set_prefill_cost(report.latency)
        await self._send(report)

    def _set_prefill_cost(self, model: LatencyModel) -> None:
        """Let the engine weigh swapping against what ``model`` says of prefills."""
        self._prefill_model = model
        self._engine.call(lambda e: e.set_prefill_cost(model.prefill_s))

    async def _send(self, message: Message) -> None:
        try:
            await self._bus.publish(subjects.load(self._role, self._settings.instance), message)
        except BusError as error:
            log.debug("report not sent: %s", error)
