"""Routing and the scheduler's view of the cluster: pure decisions on reports."""

from services.scheduler.cluster import Cluster, Worker
from services.scheduler.routing import (
    RoutingLimits,
    beside_siblings,
    capacity_of,
    choose_decode,
    divide,
)
from shared.core.policies import PrefillBatch, QueuedRequest
from shared.core.request import Request, SamplingParams
from shared.messages.load import InstanceState, WorkerReport


def report(instance: str, role: str, **changes: object) -> WorkerReport:
    values: dict[str, object] = {
        "role": role,
        "instance": instance,
        "sequence": 1,
        "state": InstanceState.READY,
        "model": "m",
        "kv_layout": "k",
        "max_model_len": 1024,
        "block_size": 16,
        "num_blocks": 100,
        "num_free_blocks": 100,
        "num_running": 0,
        "num_waiting": 0,
        "num_held": 0,
        "num_reserved": 0,
        "compute_utilisation": 0.0,
        "tokens_per_s": 0.0,
        "step_s": 0.0,
        "layer_s": 0.0,
    }
    return WorkerReport(**(values | changes))  # type: ignore[arg-type]


def worker(
    instance: str, role: str, *, assigned: int = 0, batches: int = 0, **changes: object
) -> Worker:
    return Worker(
        report=report(instance, role, **changes), num_assigned=assigned, num_batches=batches
    )


def test_both_roles_are_kept_apart_while_both_are_there() -> None:
    pools = divide([worker("p", "prefill"), worker("d", "decode")])
    assert pools.is_disaggregated
    assert [w.instance for w in pools.prefill] == ["p"]
    assert [w.instance for w in pools.decode] == ["d"]


def test_one_role_alone_serves_both() -> None:
    pools = divide([worker("p", "prefill"), worker("q", "prefill")])
    assert not pools.is_disaggregated
    assert pools.prefill == pools.decode
    assert len(pools.prefill) == 2


def test_a_draining_worker_gets_nothing() -> None:
    pools = divide([worker("p", "prefill"), worker("d", "decode", state=InstanceState.DRAINING)])
    assert not pools.is_disaggregated
    assert [w.instance for w in pools.decode] == ["p"]


def test_slots_go_round_the_instances_least_loaded_first() -> None:
    pools = divide(
        [
            worker("busy", "prefill", compute_utilisation=0.9),
            worker("idle", "prefill"),
            worker("full", "prefill", batches=2),
            worker("d", "decode", num_free_blocks=40),
            worker("e", "decode", num_free_blocks=2),
        ]
    )
    capacity = capacity_of(pools, RoutingLimits(max_batches=2))
    assert [slot.instance for slot in capacity.slots] == ["idle", "busy", "idle", "busy"]
    assert capacity.free_decode_blocks == 42


def test_decode_goes_where_load_is_least_and_memory_suffices() -> None:
    pools = divide(
        [
            worker("p", "prefill"),
            worker("busy", "decode", compute_utilisation=1.0),
            worker("full", "decode", num_free_blocks=3),
            worker("other", "decode", kv_layout="x"),
        ]
    )
    chosen = choose_decode(pools, num_blocks=4, kv_layout="k")
    assert chosen is not None and chosen.instance == "busy"
    assert choose_decode(pools, num_blocks=101, kv_layout="k") is None


def test_who_does_not_answer_is_taken_if_there_is_no_other() -> None:
    pools = divide(
        [
            worker("p", "prefill"),
            worker("quiet", "decode"),
            worker("busy", "decode", compute_utilisation=1.0, num_free_blocks=50),
        ]
    )
    for num_blocks, expected in ((50, "busy"), (51, "quiet")):
        chosen = choose_decode(pools, num_blocks=num_blocks, kv_layout="k", avoided={"quiet"})
        assert chosen is not None and chosen.instance == expected


def batch(instance: str, *groups: str | None) -> PrefillBatch:
    requests = [
        Request(
            request_id=str(number),
            attempt=0,
            prompt_token_ids=(1,),
            sampling=SamplingParams(max_tokens=4),
            group_id=group,
        )
        for number, group in enumerate(groups)
    ]
    queued = tuple(QueuedRequest(request=request, arrival_s=0.0) for request in requests)
    return PrefillBatch(instance=instance, requests=queued, reason="test")


def test_a_batch_goes_where_siblings_are_prefilled_if_there_is_a_slot() -> None:
    def routed(*batches: PrefillBatch, limit: int = 2, **num_batches: int) -> list[str]:
        pools = divide(
            [
                *(worker(n, "prefill", batches=num_batches.get(n, 0)) for n in ("p", "q")),
                worker("d", "decode"),
            ]
        )
        capacity = capacity_of(pools, RoutingLimits(max_batches=limit))
        homes = {"call": "p"} if "p" in num_batches else {}
        return [b.instance for b in beside_siblings(batches, pools, capacity, homes)]

    assert routed(batch("q", None, "call"), p=1) == ["p"]
    assert routed(batch("p", "call"), p=1) == ["p"]
    assert routed(batch("q", None, "other"), p=1) == ["q"]
    # No slot is left there, or it is busier.
    assert routed(batch("q", "call"), p=2) == ["q"]
    assert routed(batch("q", "call"), limit=4, p=2) == ["q"]
    assert routed(batch("q", "call"), limit=4, p=2, q=1) == ["p"]
    # Batches of one round: the second follows the first, but not further than there are slots.
    assert routed(batch("p", "call"), batch("q", "call")) == ["p", "p"]
    assert routed(batch("p", "call"), batch("q", "call"), limit=1) == ["p", "q"]
    assert routed(*[batch(name, "call") for name in "pqp"]) == ["p", "q", "p"]


def test_nearly_equal_load_is_decided_by_what_was_given() -> None:
    pools = divide(
        [
            worker("p", "prefill"),
            worker("d", "decode", assigned=5, compute_utilisation=0.81),
            worker("e", "decode", assigned=4, compute_utilisation=0.84),
        ]
    )
    chosen = choose_decode(pools, num_blocks=1, kv_layout="k")
    assert chosen is not None and chosen.instance == "e"


def test_what_was_given_since_the_report_counts_as_used() -> None:
    cluster = Cluster(ttl_s=2.0)
    assert cluster.on_worker_report(report("d", "decode", num_free_blocks=10), 0.0)
    cluster.on_assigned("d", 4)
    (seen,) = cluster.workers(num_assigned={"d": 1}, num_batches={})
    assert seen.free_blocks == 6
    cluster.on_worker_report(report("d", "decode", sequence=2, num_free_blocks=7), 0.1)
    (seen,) = cluster.workers(num_assigned={"d": 1}, num_batches={})
    assert seen.free_blocks == 7
    cluster.on_blocks_refused("d")
    (seen,) = cluster.workers(num_assigned={}, num_batches={})
    assert seen.free_blocks == 0


def test_a_silent_instance_disappears_with_its_role() -> None:
    cluster = Cluster(ttl_s=2.0)
    cluster.on_worker_report(report("d", "decode"), 0.0)
    cluster.on_service_report("gateway", "g", 1, 0.0)
    for tick in range(1, 20):
        cluster.on_service_report("gateway", "g", 1 + tick, tick / 10)
        assert cluster.expired(tick / 10) == []
    assert cluster.expired(2.1) == [("decode", "d")]
    assert not cluster.is_alive("d") and cluster.is_alive("g")
    assert cluster.instances_of("decode") == ()
