from typing import Any

import msgspec

from services.placer.topology import Topology
from shared.messages.load import InstanceState, WorkerReport
from shared.messages.placement import DeviceReport, Stage


def report(instance: str, sequence: int = 1, **changes: Any) -> WorkerReport:
    plain = WorkerReport(
        role="decode",
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
    return msgspec.structs.replace(plain, **changes)


def test_every_worker_is_a_chain_of_one_stage() -> None:
    topology = Topology(ttl_s=2.0)
    topology.on_report(report("decode-1"), 0.0)
    topology.on_report(report("prefill-1", role="prefill", device="cuda:0", num_blocks=3), 0.0)
    topology.on_report(report("other-1", model="other", num_layers=2), 0.0)
    placement = topology.placement("tiny")
    assert placement.model == "tiny"
    assert placement.chains == (
        (Stage(instance="decode-1", lo=0, hi=8),),
        (Stage(instance="prefill-1", lo=0, hi=8),),
    )
    assert placement.devices[1] == DeviceReport(
        instance="prefill-1",
        role="prefill",
        device="cuda:0",
        num_layers=8,
        param_bytes=1000,
        kv_capacity_tokens=192,
    )
    assert "2 live workers" in placement.reason
    assert topology.models == ("other", "tiny")
    assert len(topology) == 3


def test_the_version_grows_with_the_topology_and_not_with_the_load() -> None:
    topology = Topology(ttl_s=2.0, first_version=100)
    assert topology.placement("tiny").placement_version == 100
    assert topology.on_report(report("w"), 0.0)
    assert topology.version == 101
    assert not topology.on_report(report("w", 2, num_running=5, num_free_blocks=1), 0.1)
    assert not topology.on_report(report("w", 3, state=InstanceState.DRAINING), 0.2)
    assert topology.version == 101
    assert topology.on_report(report("w", 4, num_blocks=20), 0.3)
    assert topology.on_report(report("w", 5, num_blocks=20, model="other"), 0.4)
    assert topology.version == 103
    assert topology.remove("w")
    assert not topology.remove("w")
    assert topology.version == 104


def test_an_outdated_report_changes_nothing() -> None:
    topology = Topology(ttl_s=2.0)
    topology.on_report(report("w", 5), 0.0)
    assert not topology.on_report(report("w", 4, num_blocks=99), 0.1)
    assert topology.placement("tiny").devices[0].kv_capacity_tokens == 640


def test_a_silent_worker_is_gone_and_may_come_back() -> None:
    topology = Topology(ttl_s=2.0)
    topology.on_report(report("w"), 0.0)
    topology.on_report(report("v"), 0.0)
    for now_s in (0.5, 1.0, 1.5, 2.0):
        topology.on_report(report("v", int(now_s * 10)), now_s)
        assert topology.expired(now_s) == []
    assert topology.expired(2.1) == ["w"]
    assert [device.instance for device in topology.placement("tiny").devices] == ["v"]
    version = topology.version
    assert topology.on_report(report("w", 2), 2.2)
    assert topology.version == version + 1


def test_without_workers_there_is_no_chain_and_a_reason() -> None:
    placement = Topology(ttl_s=2.0).placement("tiny")
    assert placement.devices == ()
    assert placement.chains == ()
    assert placement.reason == "no live worker serves tiny"


def test_a_worker_that_does_not_say_its_layers_is_in_no_chain() -> None:
    topology = Topology(ttl_s=2.0)
    topology.on_report(report("v"), 0.0)
    topology.on_report(report("w", num_layers=0), 0.0)
    placement = topology.placement("tiny")
    assert len(placement.devices) == 2
    assert placement.chains == ((Stage(instance="v", lo=0, hi=8),),)
    assert "1 more" in placement.reason
