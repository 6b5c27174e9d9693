"""What ``banyan status`` makes of the reports it hears."""

import io
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from cli.bus import BusAddress, find_bus
from cli.census import Census, Leader, Report, leaders_of, num_left, only_of_its_kind, resolve
from cli.errors import CommandFailed
from cli.status_view import SuiteView, as_data, as_renderable, as_table, in_bytes
from shared.messages.load import InstanceExited, InstanceState, ServiceReport, WorkerReport
from shared.messages.placement import Placement, Stage

ADDRESS = BusAddress(
    nats_url="nats://127.0.0.1:1", user="cli", password="secret", url="http://127.0.0.1:8000"
)
WORKER = WorkerReport(
    role="decode",
    instance="decode-0-a",
    sequence=1,
    state=InstanceState.READY,
    model="tiny",
    kv_layout="x",
    max_model_len=1024,
    block_size=64,
    num_blocks=100,
    num_free_blocks=75,
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
    num_layers=12,
    kv_bytes_per_token=1_000,
)
KVSTORE = ServiceReport(
    role="kvstore",
    instance="kvstore-0-abcd",
    sequence=1,
    state=InstanceState.DRAINING,
    gauges={"used_bytes": 1e8, "capacity_bytes": 1e9, "num_blocks": 7.0},
    labels={"transport": "tcp"},
)


def worker(instance: str = "decode-0-a", **fields: Any) -> WorkerReport:
    return msgspec.structs.replace(WORKER, instance=instance, **fields)


def service(role: str, instance: str, **fields: Any) -> ServiceReport:
    defaults: dict[str, Any] = {"sequence": 1, "state": InstanceState.READY, "model": "tiny"}
    return ServiceReport(role=role, instance=instance, **(defaults | fields))


def scheduler(instance: str, *, epoch: int | None, model: str = "tiny") -> ServiceReport:
    gauges = {
        "is_leader": float(epoch is not None),
        "leader_epoch": float(epoch or 0),
        "num_waiting": 4.0,
    }
    return service("scheduler", instance, model=model, gauges=gauges)


def lines_of(view: SuiteView, width: int | None = None) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width or 300).print(as_renderable(view, width))
    return output.getvalue().splitlines()


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


def test_each_model_is_led_by_the_scheduler_with_the_latest_epoch() -> None:
    reports: list[Report] = [
        worker(),
        scheduler("s0", epoch=7),
        scheduler("s1", epoch=8),
        scheduler("s2", epoch=None),
        scheduler("s3", epoch=3, model="other"),
    ]
    assert leaders_of(reports) == [
        Leader(model="other", instance="s3", epoch=3),
        Leader(model="tiny", instance="s1", epoch=8),
    ]
    assert leaders_of([worker(), scheduler("s0", epoch=None)]) == []


def test_an_instance_is_meant_by_its_name_or_by_a_part_that_is_whole() -> None:
    reports = [worker("decode-1-ab"), worker("decode-1-cd"), worker("decode-10-ef")]
    assert resolve("decode-1-ab", reports) == reports[:1]
    assert resolve("decode-1", reports) == reports[:2]
    assert resolve("decode-10", reports) == reports[2:]
    assert resolve("decode", reports) == reports
    assert resolve("dec", reports) == []
    assert resolve("decode-1-a", reports) == []


@pytest.mark.parametrize(
    ("report", "others", "lacking"),
    [
        (worker("d0"), [], "worker"),
        (worker("d0"), [worker("d1", state=InstanceState.DRAINING)], "worker"),
        (worker("d0"), [worker("d1", model="other")], "worker"),
        (worker("d0"), [worker("d1")], None),
        (worker("d0"), [worker("p0", role="prefill")], None),
        (service("gateway", "g0"), [scheduler("s0", epoch=1)], "gateway"),
        (service("gateway", "g0"), [service("gateway", "g1")], None),
        (scheduler("s0", epoch=1), [], "scheduler"),
        (scheduler("s0", epoch=1), [scheduler("s1", epoch=None)], None),
        (service("predictor", "p0"), [], None),
        (KVSTORE, [], None),
    ],
)
def test_the_last_that_can_do_some_work_is_known(
    report: Report, others: list[Report], lacking: str | None
) -> None:
    assert only_of_its_kind(report, [report, *others]) == lacking


def test_what_is_left_to_do_is_counted_where_there_is_something_to_count() -> None:
    assert num_left(worker(num_held=4, num_reserved=5)) == 14
    assert num_left(service("gateway", "g0", gauges={"num_live": 3.0})) == 3
    assert num_left(scheduler("s0", epoch=1)) is None
    assert num_left(KVSTORE) is None


# For programs


def test_programs_get_the_reports_as_they_came_with_what_follows_and_no_password() -> None:
    reports: list[Report] = [worker(), KVSTORE, scheduler("s0", epoch=7)]
    text = msgspec.json.encode(as_data(SuiteView(address=ADDRESS, reports=reports))).decode()
    data = json.loads(text)
    assert data["url"] == "http://127.0.0.1:8000"
    assert data["leader"] == "s0"
    assert data["leaders"] == [{"model": "tiny", "instance": "s0", "epoch": 7}]
    first, store, leader = data["instances"]
    assert (first["instance"], first["state"], first["num_held"]) == ("decode-0-a", "ready", 0)
    assert first["kv"] == {
        "used_bytes": 25 * 64 * 1000,
        "capacity_bytes": 100 * 64 * 1000,
        "used_blocks": 25,
        "capacity_blocks": 100,
        "share": 0.25,
    }
    assert first["layers"] == [[0, 12]]
    assert store["kv"]["share"] == 0.1 and store["kv"]["used_blocks"] == 7
    assert leader["gauges"]["leader_epoch"] == 7
    assert "secret" not in text


def test_a_password_is_in_no_text_about_the_bus() -> None:
    assert "secret" not in repr(ADDRESS)


def test_layers_are_where_the_placer_says() -> None:
    chain = (
        Stage(instance="decode-0-a", lo=0, hi=5),
        Stage(instance="decode-1-a", lo=5, hi=12),
    )
    reports = [worker("decode-0-a"), worker("decode-1-a"), worker("decode-2-a", num_layers=0)]
    placement = Placement(model="tiny", placement_version=1, devices=(), chains=(chain,), reason="")
    view = SuiteView(address=ADDRESS, reports=reports, placements={"tiny": placement})
    assert [view.layers_of(report) for report in reports] == [[(0, 5)], [(5, 12)], []]


# For people


def test_people_get_a_row_an_instance_with_all_there_is_to_know() -> None:
    reports: list[Report] = [
        worker(),
        KVSTORE,
        scheduler("scheduler-0-ab", epoch=7),
        scheduler("scheduler-1-ab", epoch=None),
        service("gateway", "edge", gauges={"num_live": 5.0}),
    ]
    lines = [line.split() for line in lines_of(SuiteView(address=ADDRESS, reports=reports))]
    row = ["decode-0-a", "ready", "0:12", "2", "3", "25%", "1.6MB/6.4MB", "25/100", "50%", "123"]
    assert [*row, "10.0", "ucx", "cpu", "bf16"] in lines
    assert ["kvstore-0-abcd", "draining", "10%", "100MB/1.0GB", "7", "tcp"] in lines
    assert ["scheduler-0-ab", "leads", "4"] in lines
    assert ["scheduler-1-ab", "standby", "4"] in lines
    assert ["gateway", "edge", "ready", "5"] in lines  # whose name does not say its role


def test_people_are_told_who_leads_and_how_much_there_is_to_do() -> None:
    reports: list[Report] = [
        worker("decode-0-a"),
        worker("decode-1-a"),
        scheduler("scheduler-0-ab", epoch=7),
        service(
            "gateway",
            "gateway-0-a",
            gauges={
                "num_live": 5.0,
                "total_finished": 20.0,
                "total_failed": 1.0,
                "total_cancelled": 2.0,
            },
        ),
    ]
    view = SuiteView(address=ADDRESS, reports=reports)
    assert lines_of(view)[:3] == [
        "http://127.0.0.1:8000   247 tokens/s",
        "tiny: scheduler-0-ab leads, epoch 7",
        "requests: 5 live, 4 queued, 6 in a batch; 20 finished, 1 failed, 2 cancelled",
    ]
    assert "no scheduler leads" in lines_of(replace(view, reports=reports[:2]))
    assert "still starts" in lines_of(replace(view, address=replace(ADDRESS, is_ready=False)))[0]
    assert "the bus is away" in lines_of(replace(view, is_connected=False))[0]


@pytest.mark.parametrize("width", [200, 100, 80, 60])
def test_the_table_has_as_many_columns_as_there_is_room_for(width: int) -> None:
    reports: list[Report] = [
        worker("decode-0-abcd"),
        worker("prefill-0-abcd", role="prefill"),
        KVSTORE,
        scheduler("scheduler-0-abcd", epoch=7),
    ]
    view = SuiteView(address=ADDRESS, reports=reports)
    output = io.StringIO()
    Console(file=output, width=width).print(as_table(view, width))
    table = output.getvalue()
    assert max(map(len, table.splitlines())) <= width
    for kept in ("scheduler-0-abcd", "leads", "queue", "25%"):
        assert kept in table
    assert "…" not in table
    assert ("transport" in table) == (width >= 200)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1.0kB"),
        (9_940, "9.9kB"),
        (9_960, "10kB"),
        (999_600, "1.0MB"),
        (25_600_000, "26MB"),
        (1.5e12, "1.5TB"),
        (3e16, "30000TB"),
    ],
)
def test_bytes_are_told_in_two_or_three_digits(count: float, text: str) -> None:
    assert in_bytes(count) == text


# The bus


def test_the_bus_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANYAN_NATS_URL", "nats://bus:4222")
    monkeypatch.setenv("BANYAN_NATS_USER", "cli")
    monkeypatch.setenv("BANYAN_NATS_PASSWORD", "secret")
    assert find_bus(None) == BusAddress(nats_url="nats://bus:4222", user="cli", password="secret")


@pytest.mark.parametrize(
    ("nats_url", "user", "expected"),
    [
        ("nats://bus:4222", None, ("nats://bus:4222", "cli", "secret")),
        ("bus:4222", "other", ("nats://bus:4222", "other", "secret")),
        ("nats://me:pass%20word@bus:4222", None, ("nats://bus:4222", "me", "secret")),
    ],
)
def test_a_bus_that_is_named_is_taken(
    monkeypatch: pytest.MonkeyPatch, nats_url: str, user: str | None, expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv("BANYAN_NATS_URL", "nats://elsewhere:4222")
    monkeypatch.setenv("BANYAN_NATS_PASSWORD", "secret")
    address = find_bus(None, nats_url=nats_url, user=user)
    assert (address.nats_url, address.user, address.password) == expected


def test_a_password_in_the_address_counts_where_no_variable_has_one() -> None:
    address = find_bus(None, nats_url="nats://me:pass%20word@bus:4222")
    assert (address.user, address.password) == ("me", "pass word")


def test_a_bus_without_users_is_connected_to_as_nobody() -> None:
    address = find_bus(None, nats_url="bus:4222")
    assert (address.user, address.password) == (None, None)


def test_without_a_suite_the_user_is_told_what_to_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CommandFailed, match="make up"):
        find_bus(None)
    with pytest.raises(CommandFailed, match=r"http://127\.0\.0\.1:9"):
        find_bus("http://127.0.0.1:9")
