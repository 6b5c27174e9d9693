"""The placer as whoever asks it sees it, over the memory bus and over NATS."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.placer.config import PlacerSettings
from services.placer.service import PlacerService
from shared.bus.base import Bus
from shared.messages import subjects
from shared.messages.base import Message
from shared.messages.load import (
    Drain,
    InstanceExited,
    InstanceState,
    ServiceReport,
    WorkerReport,
)
from shared.messages.placement import GetPlacement, Placement, Stage
from shared.messages.requests import Done
from tests.integration.bus_rig import until
from tests.integration.service_rig import World, open_world

TIMEOUT_S = 10.0


@pytest.fixture(params=["memory", "real"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(request.param, tmp_path) as world:
        yield world


async def report(bus: Bus, role: str, instance: str, sequence: int = 1) -> None:
    message = WorkerReport(
        role=role,
        instance=instance,
        sequence=sequence,
        state=InstanceState.READY,
        model="tiny",
        kv_layout="layout",
        max_model_len=1024,
        block_size=64,
        num_blocks=10,
        num_free_blocks=10,
        num_running=0,
        num_waiting=0,
        num_held=0,
        num_reserved=0,
        compute_utilisation=0.0,
        tokens_per_s=0.0,
        step_s=0.0,
        layer_s=0.0,
        device="cpu",
        num_layers=8,
        param_bytes=1000,
    )
    await bus.publish(subjects.load(role, instance), message)


async def ask(bus: Bus, model: str = "tiny") -> Placement:
    question = GetPlacement(model=model)
    return await bus.request(subjects.placement(), question, Placement, timeout_s=TIMEOUT_S)


async def test_it_places_what_it_hears_of(world: World) -> None:
    settings = PlacerSettings.load(instance_ttl_s=60.0, **world.settings())
    service = PlacerService(settings, open_bus=world.open_bus, first_version=lambda: 7)
    async with world.running(service, settings) as runtime:
        bus = await world.bus()
        before = await ask(bus)
        assert (before.placement_version, before.chains) == (7, ())
        await report(bus, "prefill", "prefill-1")
        await report(bus, "decode", "decode-1")
        changes = "banyan_placer_topology_change_events_total"
        await until(lambda: runtime.metrics.value(changes) == 2)
        placement = await ask(bus)
        assert placement.placement_version == 9
        assert placement.chains == (
            (Stage(instance="decode-1", lo=0, hi=8),),
            (Stage(instance="prefill-1", lo=0, hi=8),),
        )
        assert [device.kv_capacity_tokens for device in placement.devices] == [640, 640]
        assert (await ask(bus, "other")).chains == ()

        exited = InstanceExited(role="decode", instance="decode-1")
        await bus.publish(subjects.load("decode", "decode-1"), exited)
        await until(lambda: runtime.metrics.value(changes) == 3)
        placement = await ask(bus)
        assert placement.placement_version == 10
        assert [device.instance for device in placement.devices] == ["prefill-1"]


async def test_who_falls_silent_is_placed_no_longer(world: World) -> None:
    settings = PlacerSettings.load(instance_ttl_s=0.3, **world.settings())
    service = PlacerService(settings, open_bus=world.open_bus)
    async with world.running(service, settings) as runtime:
        bus = await world.bus()
        await report(bus, "decode", "decode-1")
        changes = "banyan_placer_topology_change_events_total"
        await until(lambda: runtime.metrics.value(changes) == 2)
        assert (await ask(bus)).devices == ()


async def test_a_placer_that_comes_later_goes_on_above_the_one_before(world: World) -> None:
    settings = PlacerSettings.load(**world.settings())
    bus = await world.bus()
    versions = []
    for _ in range(2):
        service = PlacerService(settings, open_bus=world.open_bus)
        async with world.running(service, settings):
            await report(bus, "decode", "decode-1")
            await report(bus, "prefill", "prefill-1")
            versions.append((await ask(bus)).placement_version)
    assert versions[0] < versions[1]


async def test_it_reports_and_drains(world: World) -> None:
    heard: list[Message] = []

    async def hear(message: Message, subject: str) -> None:
        heard.append(message)

    bus = await world.bus()
    settings = PlacerSettings.load(**world.settings())
    await bus.subscribe(subjects.load("placer", settings.instance), hear)
    service = PlacerService(settings, open_bus=world.open_bus)
    async with world.running(service, settings) as runtime:
        await report(bus, "decode", "decode-1")
        await until(
            lambda: any(
                isinstance(message, ServiceReport) and message.gauges["num_workers"] == 1
                for message in heard
            )
        )
        drain = Drain(reason="test")
        subject = subjects.control(settings.instance, "drain")
        await bus.request(subject, drain, Done, timeout_s=TIMEOUT_S)
        await runtime.wait_until_stopping()
    await until(lambda: isinstance(heard[-1], InstanceExited))
