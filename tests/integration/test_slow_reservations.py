"""A decode worker that does not answer a reservation keeps nobody but its own requests waiting."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from services.scheduler.config import SchedulerSettings
from services.scheduler.service import SchedulerService
from shared.bus.base import Bus
from shared.core.request import Request, SamplingParams
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import InstanceState, WorkerReport
from shared.messages.requests import (
    AttemptPlaced,
    CloseRequest,
    Done,
    LeaderChanged,
    SnapshotRequest,
    SubmitReply,
    SubmitRequest,
)
from shared.messages.workers import (
    AbortRequests,
    KVReserved,
    KVTarget,
    PrefillFinished,
    ReserveKV,
    StartBatch,
    WorkerSnapshot,
)
from tests.integration.service_rig import World, open_world

MODEL = "tiny"
NUM_BLOCKS = 1000

T = TypeVar("T")


class Worker:
    """What the scheduler sees of a worker: reports, and answers to its commands."""

    def __init__(self, bus: Bus, role: str, instance: str, changed: asyncio.Condition) -> None:
        self._bus = bus
        self._changed = changed
        self.role = role
        self.instance = instance
        self.answers = asyncio.Event()
        """Whether it answers commands to reserve and to start."""
        self.answers.set()
        self.reserved: list[str] = []
        self.started: list[tuple[str, str]] = []
        """Request and where its KV goes."""
        self.aborted: list[str] = []
        self.is_instant = False
        """Whether a prefill is over as soon as it has begun."""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        await self._bus.serve(subjects.worker(self.role, self.instance, "*"), self._on_command)
        await self._bus.serve(subjects.snapshot(self.instance), self._on_snapshot)
        reporting = asyncio.create_task(self._report())
        yield
        reporting.cancel()
        await asyncio.wait([reporting])

    async def finish_prefill(self, request_id: str) -> None:
        event = PrefillFinished(
            instance=self.instance,
            request_id=request_id,
            attempt=0,
            batch_id=0,
            num_prompt_tokens=1,
            num_cached_tokens=0,
        )
        await self._bus.publish(subjects.request_events(request_id), event)

    async def _on_command(self, message: Message) -> Message:
        match message:
            case ReserveKV(request=request):
                await self._note(self.reserved, request.request_id)
                await self.answers.wait()
                target = KVTarget(instance=self.instance, transfer_id=1, address=b"", first_block=0)
                return KVReserved(
                    request_id=request.request_id, attempt=request.attempt, target=target
                )
            case StartBatch(items=items):
                for item in items:
                    assert item.target is not None
                    await self._note(self.started, (item.request.request_id, item.target.instance))
                await self.answers.wait()
                if self.is_instant:
                    for item in items:
                        await self.finish_prefill(item.request.request_id)
                return Done(count=len(items))
        assert isinstance(message, AbortRequests)
        for key in message.requests:
            await self._note(self.aborted, key.request_id)
        return Done()

    async def _note(self, notes: list[T], note: T) -> None:
        async with self._changed:
            notes.append(note)
            self._changed.notify_all()

    async def _on_snapshot(self, message: Message) -> Message:
        assert isinstance(message, SnapshotRequest)
        return WorkerSnapshot(role=self.role, instance=self.instance, requests=())

    async def _report(self) -> None:
        sequence = 0
        while True:
            sequence += 1
            report = WorkerReport(
                role=self.role,
                instance=self.instance,
                sequence=sequence,
                state=InstanceState.READY,
                model=MODEL,
                kv_layout="layout",
                max_model_len=1024,
                block_size=16,
                num_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS,
                num_running=0,
                num_waiting=0,
                num_held=0,
                num_reserved=0,
                compute_utilisation=0.0,
                tokens_per_s=0.0,
                step_s=0.0,
                layer_s=0.0,
            )
            await self._bus.publish(subjects.load(self.role, self.instance), report)
            await asyncio.sleep(0.1)


class Rig:
    """A leader, one prefill worker with room for one batch, and two decode workers."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.changed = asyncio.Condition()
        self.prefill = Worker(bus, "prefill", "p", self.changed)
        self.quick = Worker(bus, "decode", "d1", self.changed)
        self.silent = Worker(bus, "decode", "d2", self.changed)
        self.silent.answers.clear()
        self.placed: list[str] = []
        """What the gateway was told of."""

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(condition)

    async def submit(self, *names: str) -> None:
        for name in names:
            request = Request(
                request_id=name,
                attempt=0,
                prompt_token_ids=(1, 2, 3),
                sampling=SamplingParams(max_tokens=4),
            )
            message = SubmitRequest(model=MODEL, gateway="gate-1", request=request)
            await self.bus.request(subjects.requests(MODEL), message, SubmitReply, timeout_s=10)

    async def close(self, name: str) -> None:
        message = CloseRequest(model=MODEL, request_id=name, attempt=0, outcome="cancelled")
        await self.bus.request(subjects.requests(MODEL), message, Done, timeout_s=10)

    async def start_a_batch_of_four(self) -> None:
        """``first`` has the slot until all four have come; every other one goes to each decode."""
        await self.submit("first")
        await self.until(lambda: self.prefill.started == [("first", "d1")])
        await self.submit("a", "b", "c", "d")
        await self.prefill.finish_prefill("first")
        await self.until(lambda: sorted(self.silent.reserved) == ["a", "c"])

    @property
    def times_started(self) -> Counter[str]:
        return Counter(name for name, _ in self.prefill.started)


@contextlib.asynccontextmanager
async def running(world: World, **settings: float) -> AsyncIterator[Rig]:
    rig = Rig(await world.bus())
    is_led = asyncio.Event()

    async def hear(message: Message, subject: str) -> None:
        if isinstance(message, LeaderChanged):
            is_led.set()

    async def hear_hint(message: Message, subject: str) -> None:
        async with rig.changed:
            if isinstance(message, AttemptPlaced):
                rig.placed.append(message.request_id)
            rig.changed.notify_all()

    await rig.bus.subscribe(subjects.leader_events(), hear)
    await rig.bus.subscribe(subjects.gateway_events("gate-1"), hear_hint)
    made = SchedulerSettings.load(
        instance="sched-1",
        served_model_name=MODEL,
        max_batches=1,
        audit_period_s=60,
        **settings,
        **world.settings(),
    )
    async with (
        rig.prefill.serving(),
        rig.quick.serving(),
        rig.silent.serving(),
        world.running(SchedulerService(made, open_bus=world.open_bus), made),
    ):
        await is_led.wait()
        yield rig


async def test_batch_mates_start_without_those_that_are_not_answered(tmp_path: Path) -> None:
    async with (
        open_world("memory", tmp_path) as world,
        running(world, command_timeout_s=60) as rig,
    ):
        await rig.start_a_batch_of_four()
        await rig.until(lambda: rig.times_started.total() == 3)
        assert rig.prefill.started[1:] == [("b", "d1"), ("d", "d1")]
        # Nor do they hold the slot, nor does the next one go where nobody answers.
        await rig.prefill.finish_prefill("b")
        await rig.prefill.finish_prefill("d")
        await rig.submit("next")
        await rig.until(lambda: ("next", "d1") in rig.prefill.started)
        assert sorted(rig.silent.reserved) == ["a", "c"]
        rig.silent.answers.set()
        await rig.until(lambda: {("a", "d2"), ("c", "d2")} <= set(rig.prefill.started))
        assert set(rig.times_started.values()) == {1}
        assert not rig.silent.aborted


async def test_who_is_never_answered_starts_elsewhere_once(tmp_path: Path) -> None:
    async with (
        open_world("memory", tmp_path) as world,
        running(world, command_timeout_s=0.5) as rig,
    ):
        await rig.start_a_batch_of_four()
        rig.prefill.is_instant = True
        await rig.until(lambda: rig.times_started.total() == 5)
        assert {("a", "d1"), ("c", "d1")} <= set(rig.prefill.started)
        await rig.until(lambda: sorted(rig.silent.aborted) == ["a", "c"])
        # Its answers come too late for anybody.
        rig.silent.answers.set()
        await rig.submit("next")
        await rig.until(lambda: "next" in rig.times_started)
        assert set(rig.times_started.values()) == {1}


async def test_who_is_withdrawn_meanwhile_is_not_started(tmp_path: Path) -> None:
    async with (
        open_world("memory", tmp_path) as world,
        running(world, command_timeout_s=60) as rig,
    ):
        await rig.start_a_batch_of_four()
        await rig.until(lambda: rig.times_started.total() == 3)
        await rig.close("a")
        await rig.until(lambda: rig.silent.aborted == ["a"])
        rig.silent.answers.set()
        await rig.until(lambda: ("c", "d2") in rig.prefill.started)
        assert "a" not in rig.times_started


async def test_who_is_withdrawn_while_it_is_started_is_not_reported_as_placed(
    tmp_path: Path,
) -> None:
    async with (
        open_world("memory", tmp_path) as world,
        running(world, command_timeout_s=60) as rig,
    ):
        rig.silent.answers.set()
        rig.prefill.answers.clear()
        await rig.submit("goes")
        await rig.until(lambda: "goes" in rig.times_started)
        await rig.close("goes")
        rig.prefill.answers.set()
        await rig.submit("stays")
        await rig.until(lambda: "stays" in rig.placed)
        assert rig.placed == ["stays"]
