"""The scheduler's tables: who dies with whom, when a batch ends, what a takeover finds."""

from dataclasses import replace

from services.scheduler.recovery import Findings
from services.scheduler.table import Entry, EntryStatus, RequestTable
from shared.core.request import Request, RequestKey, SamplingParams
from shared.messages.workers import HeldRequest, RequestStage, WorkerSnapshot


def entry(name: str, attempt: int = 0) -> Entry:
    request = Request(
        request_id=name,
        attempt=attempt,
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=4),
    )
    return Entry(request=request, gateway="g", arrival_s=0.0)


def placed(table: RequestTable, name: str, prefill: str, decode: str) -> Entry:
    item = entry(name)
    table.put(item)
    table.assign(item, prefill=prefill, decode=decode)
    item.status = EntryStatus.PLACED
    return item


def test_an_attempt_outlives_its_prefill_once_it_was_handed_over() -> None:
    table = RequestTable()
    before, after = placed(table, "a", "p", "d"), placed(table, "b", "p", "d")
    after.has_handed_over = True
    assert table.of_instance("p") == [before]
    assert table.of_instance("d") == [before, after]


def test_a_lost_attempt_dies_with_nobody_and_is_counted_nowhere() -> None:
    table = RequestTable()
    item = placed(table, "a", "p", "d")
    assert table.num_assigned()["d"] == 1
    table.mark_lost(item, "gone")
    assert table.of_instance("d") == []
    assert table.num_assigned()["d"] == 0 == table.num_assigned()["p"]


def test_a_group_is_at_home_where_it_is_being_prefilled() -> None:
    table = RequestTable()
    entries = [placed(table, name, "p", "d") for name in "abc"]
    for item, group in zip(entries, ("x", "x", None), strict=True):
        item.request = replace(item.request, group_id=group)
    table.enter_batch(1, "p1", entries[:1])
    assert table.homes_of_groups() == {"x": "p1"}
    table.leave_batch(entries[0])
    assert table.homes_of_groups() == {}
    table.enter_batch(2, "p2", entries[1:])
    assert table.homes_of_groups() == {"x": "p2"}


def test_an_instance_that_serves_both_roles_is_counted_once() -> None:
    table = RequestTable()
    item = placed(table, "a", "p", "p")
    assert item.instances == ("p",)
    assert table.num_assigned()["p"] == 1


def test_a_batch_ends_with_its_last_attempt() -> None:
    table = RequestTable()
    first, second = placed(table, "a", "p", "d"), placed(table, "b", "p", "d")
    table.enter_batch(7, "p", [first, second])
    assert table.num_batches() == {"p": 1}
    assert not table.leave_batch(first)
    assert not table.leave_batch(first)
    table.remove("b")
    assert table.num_batches() == {}


def test_an_old_attempt_is_not_the_current_one() -> None:
    table = RequestTable()
    table.put(entry("a", attempt=0))
    newer = entry("a", attempt=1)
    table.put(newer)
    assert table.current(RequestKey("a", 0)) is None
    assert table.current(RequestKey("a", 1)) is newer
    assert len(table) == 1


def held(name: str, stage: RequestStage, peer: str = "") -> HeldRequest:
    return HeldRequest(
        request_id=name, attempt=0, gateway="g", stage=stage, num_tokens=1, peer=peer
    )


def findings(**snapshots: list[HeldRequest]) -> Findings:
    found = Findings()
    for instance, requests in snapshots.items():
        found.add(WorkerSnapshot(role="decode", instance=instance, requests=tuple(requests)))
    return found


def test_a_takeover_joins_what_prefill_and_decode_say() -> None:
    found = findings(
        d=[held("a", RequestStage.RESERVED)], p=[held("a", RequestStage.SENDING, peer="d")]
    )
    running = found.take_running(RequestKey("a", 0))
    assert running is not None
    assert (running.prefill, running.decode, running.has_handed_over) == ("p", "d", False)
    assert found.take_running(RequestKey("a", 0)) is None


def test_a_mere_reservation_is_not_running() -> None:
    found = findings(d=[held("a", RequestStage.RESERVED)])
    assert found.take_running(RequestKey("a", 0)) is None
    assert found.take_reservation(RequestKey("a", 0)) == "d"
    assert found.take_reservation(RequestKey("a", 0)) == ""


def test_a_decoding_attempt_needs_no_prefill_any_more() -> None:
    found = findings(d=[held("a", RequestStage.DECODE)])
    running = found.take_running(RequestKey("a", 0))
    assert running is not None and running.has_handed_over and running.decode == "d"
