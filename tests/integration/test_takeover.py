"""Leaders come and go: what a new one finds is kept, fenced or freed, and nothing runs twice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bench.equality import BUNDLED
from services.decode.config import DecodeSettings
from services.decode.service import DecodeService
from services.gateway.config import GatewaySettings
from services.gateway.counters import GatewayCounters
from services.gateway.generation import GenerationRequest
from services.gateway.token_stream import TokenStream
from services.gateway.tracker import RequestTracker
from services.prefill.config import PrefillSettings
from services.prefill.service import PrefillService
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import SchedulerService
from shared.bus.base import Bus
from shared.clock import MonotonicClock
from shared.core.request import FinishReason, Request, RequestKey, SamplingParams
from shared.errors import RemoteError
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import WorkerReport
from shared.messages.requests import (
    CloseRequest,
    Done,
    SnapshotRequest,
    SubmitReply,
    SubmitRequest,
    SubmitStatus,
)
from shared.messages.workers import (
    KVReserved,
    RequestStage,
    ReserveKV,
    StartBatch,
    StartItem,
    WorkerSnapshot,
)
from shared.metrics import Metrics
from tests.integration.service_rig import World, open_world

MODEL = "tiny-chat"
PROMPT = (3, 204, 979, 829, 3153, 769, 1912, 19, 2, 204, 4, 204)
NUM_TOKENS = 12
WORKER = {"model": str(BUNDLED), "dtype": "fp32", "num_blocks": 64, "num_threads": 1}
DEAD_EPOCH = 0


class Rig:
    """A prefill and a decode worker, a gateway's tracker, and whoever leads."""

    def __init__(self, world: World, bus: Bus, tracker: RequestTracker) -> None:
        self.world = world
        self.bus = bus
        self.tracker = tracker
        self.reports: dict[str, WorkerReport] = {}
        self.reported = asyncio.Event()
        self.taken: list[Request] = []

    async def hear(self, message: Message, subject: str) -> None:
        if isinstance(message, WorkerReport):
            self.reports[message.role] = message
            self.reported.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.reported.clear()
                await self.reported.wait()

    async def all_blocks_are_free(self) -> None:
        await self.until(
            lambda: all(
                r.num_free_blocks == r.num_blocks and not r.num_reserved and not r.num_running
                for r in self.reports.values()
            )
        )

    @contextlib.asynccontextmanager
    async def mortal_leader(self) -> AsyncIterator[None]:
        """A leader that takes requests and then is gone, as after SIGKILL."""

        async def take(message: Message) -> Message:
            if isinstance(message, CloseRequest):
                return Done()
            assert isinstance(message, SubmitRequest)
            self.taken.append(message.request)
            return SubmitReply(
                request_id=message.request.request_id,
                attempt=message.request.attempt,
                leader_epoch=DEAD_EPOCH,
                status=SubmitStatus.QUEUED,
            )

        subscription = await self.bus.serve(subjects.requests(MODEL), take)
        yield
        await subscription.unsubscribe()

    @contextlib.asynccontextmanager
    async def real_leader(self) -> AsyncIterator[None]:
        settings = SchedulerSettings.load(
            instance="sched-2", audit_period_s=0.3, **self.world.settings()
        )
        service = SchedulerService(settings, open_bus=self.world.open_bus)
        async with self.world.running(service, settings):
            yield

    async def command(
        self, role: str, verb: str, message: Message, reply: type[Message]
    ) -> Message:
        subject = subjects.worker(role, f"{role}-1", verb)
        return await self.bus.request(subject, message, reply, timeout_s=10)

    async def reserve(self, request: Request) -> KVReserved:
        message = ReserveKV(
            leader_epoch=DEAD_EPOCH,
            gateway="gate-1",
            request=request,
            kv_layout=self.reports["decode"].kv_layout,
            ttl_s=60,
        )
        reply = await self.command("decode", "reserve", message, KVReserved)
        assert isinstance(reply, KVReserved)
        return reply

    async def submit(self) -> TokenStream:
        request = GenerationRequest(
            request_id="req-1",
            index=0,
            model=MODEL,
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
        )
        return await self.tracker.submit(request)


@pytest.fixture(params=["memory", "real"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_world(request.param, tmp_path) as world, rig_of(world) as made:
        yield made


@contextlib.asynccontextmanager
async def rig_of(world: World, *, decode_world: World | None = None) -> AsyncIterator[Rig]:
    """The rig in ``world``; the decode worker's data plane may be another world's."""
    async with contextlib.AsyncExitStack() as stack:
        bus = await world.bus()
        settings = GatewaySettings.load(instance="gate-1", silence_s=0.3, model=str(BUNDLED))
        tracker = RequestTracker(
            await world.bus(), settings, MonotonicClock(), GatewayCounters(Metrics())
        )
        await tracker.start()
        running = asyncio.create_task(tracker.run())
        made = Rig(world, bus, tracker)
        await bus.subscribe(subjects.all_load(), made.hear)
        shared = {"open_bus": world.open_bus, "make_transport": lambda _: world.new_transport()}
        far = decode_world or world
        apart = {"open_bus": world.open_bus, "make_transport": lambda _: far.new_transport()}
        prefill = PrefillSettings.load(instance="prefill-1", **WORKER, **world.settings())
        decode = DecodeSettings.load(instance="decode-1", **WORKER, **world.settings())
        await stack.enter_async_context(
            world.running(PrefillService(prefill, **shared), prefill)  # type: ignore[arg-type]
        )
        await stack.enter_async_context(
            world.running(DecodeService(decode, **apart), decode)  # type: ignore[arg-type]
        )
        await made.until(lambda: len(made.reports) == 2)
        yield made
        running.cancel()
        await asyncio.wait([running])


async def test_a_broken_data_plane_does_not_stop_answers(tmp_path: Path) -> None:
    """The two workers cannot reach each other: after some attempts one serves alone."""
    async with (
        open_world("memory", tmp_path) as world,
        open_world("memory", tmp_path) as other,
        rig_of(world, decode_world=other) as rig,
        rig.real_leader(),
    ):
        tokens = await collect(await rig.submit())
        assert len(tokens) == NUM_TOKENS
        await rig.tracker.idle()
        await rig.all_blocks_are_free()


async def collect(stream: TokenStream) -> list[int]:
    tokens: list[int] = []
    async for event in stream:
        tokens += event.token_ids
        if event.finish_reason is not None:
            assert event.finish_reason is FinishReason.LENGTH
    return tokens


async def reference(rig: Rig) -> list[int]:
    async with rig.real_leader():
        return await collect(await rig.submit())


async def test_a_leader_killed_between_a_reservation_and_its_start(rig: Rig) -> None:
    async with rig.mortal_leader():
        stream = await rig.submit()
        (request,) = rig.taken
        reserved = await rig.reserve(request)
    await rig.until(lambda: rig.reports["decode"].num_reserved == 1)

    async with rig.real_leader():
        tokens = await collect(stream)
        assert len(tokens) == NUM_TOKENS
        late = StartBatch(
            leader_epoch=DEAD_EPOCH,
            batch_id=1,
            items=(StartItem(gateway="gate-1", request=request, target=reserved.target),),
        )
        with pytest.raises(RemoteError, match="epoch 0 is over") as refused:
            await rig.command("prefill", "start", late, Done)
        assert refused.value.code == "StaleCommand"
        await rig.tracker.idle()
        await rig.all_blocks_are_free()
    await rig.until(lambda: rig.reports["prefill"].num_stale_dropped == 1)


async def test_a_request_that_runs_is_found_and_not_started_again(rig: Rig) -> None:
    async with rig.mortal_leader():
        stream = await rig.submit()
        (request,) = rig.taken
        reserved = await rig.reserve(request)
        item = StartItem(gateway="gate-1", request=request, target=reserved.target)
        await rig.command(
            "prefill", "start", StartBatch(leader_epoch=DEAD_EPOCH, batch_id=1, items=(item,)), Done
        )
    async with rig.real_leader():
        tokens = await collect(stream)
        assert len(tokens) == NUM_TOKENS
        await rig.tracker.idle()
        await rig.all_blocks_are_free()
    assert rig.taken == [request]
    again = await reference(rig)
    assert again == tokens


async def test_the_next_attempt_displaces_the_old_one(rig: Rig) -> None:
    first = Request(
        request_id="req-9",
        attempt=0,
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(max_tokens=NUM_TOKENS),
    )
    await rig.reserve(first)
    second = Request(
        request_id="req-9",
        attempt=1,
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(max_tokens=NUM_TOKENS),
    )
    again = await rig.reserve(second)
    assert again == await rig.reserve(second)
    with pytest.raises(RemoteError, match="attempt 0 is over"):
        await rig.reserve(first)
    snapshot = await rig.bus.request(
        subjects.snapshot("decode-1"),
        SnapshotRequest(leader_epoch=DEAD_EPOCH),
        WorkerSnapshot,
        timeout_s=5,
    )
    held = [(RequestKey(h.request_id, h.attempt), h.stage) for h in snapshot.requests]
    assert held == [(second.key, RequestStage.RESERVED)]
    await rig.until(lambda: rig.reports["decode"].num_reserved == 1)
    # Nobody asked the new leader for it: its audits free the blocks.
    async with rig.real_leader():
        await rig.all_blocks_are_free()
