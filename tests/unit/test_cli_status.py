"""What ``banyan status`` makes of the reports it hears."""

import io
import json

import msgspec
import pytest
from rich.console import Console

from cli.errors import CommandFailed
from cli.status import BusAddress, Census, Report, as_data, as_table, find_bus, leader_of
from shared.messages.load import InstanceExited, InstanceState, ServiceReport, WorkerReport

ADDRESS = BusAddress(
    nats_url="nats://127.0.0.1:1", user="cli", password="secret", url="http://127.0.0.1:8000"
)


def worker(instance: str = "decode-0-a", *, num_free_blocks: int = 75) -> WorkerReport:
    return WorkerReport(
        role="decode",
        instance=instance,
        sequence=1,
        state=InstanceState.READY,
        model="tiny",
        kv_layout="x",
        max_model_len=1024,
        block_size=64,
        num_blocks=100,
        num_free_blocks=num_free_blocks,
        num_running=3,
        num_waiting=2,
        num_held=0,
        num_reserved=0,
        compute_utilisation=0.5,
        tokens_per_s=123.4,
        step_s=0.01,
        layer_s=0.001,
        transport="ucx",
        device="cpu",
        dtype="bf16",
    )


def scheduler(instance: str, *, epoch: int | None) -> ServiceReport:
    gauges = {"is_leader": float(epoch is not None), "leader_epoch": float(epoch or 0)}
    return ServiceReport(
        role="scheduler", instance=instance, sequence=1, state=InstanceState.READY, gauges=gauges
    )


def test_the_latest_report_of_each_instance_counts() -> None:
    census = Census()
    census.hear(worker(num_free_blocks=1), 0.0)
    census.hear(worker(num_free_blocks=2), 0.1)
    census.hear(scheduler("scheduler-0-a", epoch=None), 0.1)
    assert census.reports(0.2) == [
        worker(num_free_blocks=2),
        scheduler("scheduler-0-a", epoch=None),
    ]


def test_who_left_or_fell_silent_is_not_shown() -> None:
    census = Census(silent_after_s=2.0)
    census.hear(worker("decode-0-a"), 0.0)
    census.hear(worker("decode-1-a"), 0.0)
    census.hear(worker("decode-2-a"), 1.0)
    census.hear(InstanceExited(role="decode", instance="decode-0-a"), 1.0)
    assert [report.instance for report in census.reports(1.9)] == ["decode-1-a", "decode-2-a"]
    assert [report.instance for report in census.reports(2.0)] == ["decode-2-a"]


def test_the_leader_is_the_one_with_the_latest_epoch() -> None:
    assert leader_of([worker(), scheduler("s0", epoch=None)]) is None
    assert leader_of([scheduler("s0", epoch=7), scheduler("s1", epoch=None)]) == "s0"
    assert leader_of([scheduler("s0", epoch=7), scheduler("s1", epoch=8)]) == "s1"


def test_programs_get_the_reports_as_they_came_and_no_password() -> None:
    text = msgspec.json.encode(as_data(ADDRESS, [worker(), scheduler("s0", epoch=7)])).decode()
    data = json.loads(text)
    assert data["url"] == "http://127.0.0.1:8000"
    assert data["leader"] == "s0"
    first = data["instances"][0]
    assert (first["instance"], first["state"], first["num_held"]) == ("decode-0-a", "ready", 0)
    assert data["instances"][1]["gauges"]["leader_epoch"] == 7
    assert "secret" not in text


def test_people_get_a_table_that_fits_a_terminal() -> None:
    output = io.StringIO()
    kvstore = ServiceReport(
        role="kvstore",
        instance="kvstore-0-abcd",
        sequence=1,
        state=InstanceState.DRAINING,
        gauges={"used_bytes": 10.0, "capacity_bytes": 100.0},
        labels={"transport": "tcp"},
    )
    reports: list[Report] = [worker(), kvstore, scheduler("scheduler-0-abcd", epoch=7)]
    Console(file=output, width=80).print(as_table(ADDRESS, reports))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["decode", "decode-0-a", "ready", "2", "3", "25%", "123", "ucx", "cpu", "bf16"] in lines
    assert ["kvstore", "kvstore-0-abcd", "draining", "10%", "tcp"] in lines
    assert ["scheduler", "scheduler-0-abcd", "leads"] in lines


def test_the_bus_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_NATS_URL", "nats://bus:4222")
    monkeypatch.setenv("BANYAN_NATS_USER", "cli")
    monkeypatch.setenv("BANYAN_NATS_PASSWORD", "secret")
    assert find_bus(None) == BusAddress(nats_url="nats://bus:4222", user="cli", password="secret")


def test_without_a_suite_the_user_is_told_what_to_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CommandFailed, match="make up"):
        find_bus(None)
    with pytest.raises(CommandFailed, match=r"http://127\.0\.0\.1:9"):
        find_bus("http://127.0.0.1:9")
