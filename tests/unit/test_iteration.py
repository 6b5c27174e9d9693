import random
from collections.abc import Iterable

import pytest

from shared.core.batch_plan import IterationLimits, OrderKey, Plan, first_come_first_served
from shared.core.block_manager import BlockManager
from shared.core.engine_request import (
    TRANSITIONS,
    EngineEvent,
    EngineRequest,
    EngineState,
    transition,
)
from shared.core.iteration import Committed, IterationScheduler
from shared.core.preemption import PreemptionKind
from shared.core.request import FinishReason, Request, RequestKey, SamplingParams
from shared.errors import ContextLengthExceeded, InvalidRequest, LifecycleError, OutOfBlocks

BLOCK_SIZE = 4
EOS = 2


def _scheduler(
    *,
    num_blocks: int = 32,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 64,
    enable_prefix_cache: bool = True,
    order: OrderKey = first_come_first_served,
) -> IterationScheduler:
    return IterationScheduler(
        IterationLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        ),
        BlockManager(num_blocks, BLOCK_SIZE),
        eos_token_ids=frozenset({EOS}),
        enable_prefix_cache=enable_prefix_cache,
        order=order,
    )


def _request(
    name: str,
    prompt: int | Iterable[int] = 6,
    *,
    output: tuple[int, ...] = (),
    max_tokens: int = 8,
    priority: int = 0,
    tenant: str = "",
    stop: tuple[int, ...] = (),
    ignore_eos: bool = False,
) -> Request:
    if isinstance(prompt, int):
        first = 1000 * sum(name.encode())
        prompt = range(first, first + prompt)
    return Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=tuple(prompt),
        output_token_ids=output,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop, ignore_eos=ignore_eos),
        priority=priority,
        tenant=tenant,
    )


def _key(name: str) -> RequestKey:
    return RequestKey(name, 0)


def _shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(c.key.request_id, c.start, c.end, c.is_sampling) for c in plan.chunks]


def _step(scheduler: IterationScheduler, *tokens: int) -> tuple[Plan, list[Committed]]:
    """One iteration in which every sampling request gets ``tokens`` (one arbitrary by default)."""
    plan = scheduler.plan()
    sampled = {chunk.key: tokens or (100 + chunk.end,) for chunk in plan.chunks}
    committed = scheduler.commit(plan, sampled)
    scheduler.blocks.check_integrity()
    return plan, committed


def _tokens(scheduler: IterationScheduler, name: str) -> list[int]:
    request = scheduler.get(_key(name))
    assert request is not None
    return request.token_ids


def test_every_transition_outside_the_table_is_refused() -> None:
    for state in EngineState:
        for event in EngineEvent:
            if (state, event) in TRANSITIONS:
                assert transition(state, event) is TRANSITIONS[state, event]
            else:
                with pytest.raises(LifecycleError):
                    transition(state, event)


def test_prefill_is_chunked_and_then_decodes_one_token_a_step() -> None:
    scheduler = _scheduler(max_num_batched_tokens=4)
    scheduler.add(_request("a", 10))
    assert _shape(_step(scheduler)[0]) == [("a", 0, 4, False)]
    assert _shape(_step(scheduler)[0]) == [("a", 4, 8, False)]
    plan, committed = _step(scheduler, 7)
    assert _shape(plan) == [("a", 8, 10, True)]
    assert [(c.offset, c.token_ids, c.finish_reason) for c in committed] == [(0, (7,), None)]
    plan, committed = _step(scheduler, 8)
    assert _shape(plan) == [("a", 10, 11, True)]
    assert [(c.offset, c.token_ids) for c in committed] == [(1, (8,))]


def test_decodes_are_never_stalled_by_prefills() -> None:
    scheduler = _scheduler(max_num_batched_tokens=6)
    scheduler.add(_request("a", 3))
    scheduler.add(_request("b", 3))
    _step(scheduler)
    scheduler.add(_request("long", 40))
    for step in range(5):
        plan, committed = _step(scheduler)
        assert _shape(plan)[:2] == [
            ("a", 3 + step, 4 + step, True),
            ("b", 3 + step, 4 + step, True),
        ]
        assert _shape(plan)[2] == ("long", 4 * step, 4 * step + 4, False)
        assert len(committed) == 2


def test_seats_bound_what_runs_and_arrivals_keep_their_order() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(_request(name, 3, max_tokens=2))
    assert [shape[0] for shape in _shape(_step(scheduler)[0])] == ["a", "b"]
    assert scheduler.count(EngineState.WAITING) == 1
    _step(scheduler)
    assert [shape[0] for shape in _shape(_step(scheduler)[0])] == ["c"]


def test_priority_goes_before_arrival_and_the_order_can_be_replaced() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_request("late", priority=1))
    scheduler.add(_request("urgent", priority=0))
    assert _shape(scheduler.plan())[0][0] == "urgent"

    def youngest(request: EngineRequest, now_s: float) -> float:
        return now_s - request.arrival

    scheduler = _scheduler(max_num_seqs=1, order=youngest)
    scheduler.add(_request("old"))
    scheduler.add(_request("young"))
    assert _shape(scheduler.plan(now_s=5.0))[0][0] == "young"


def test_nobody_overtakes_for_want_of_blocks() -> None:
    scheduler = _scheduler(num_blocks=8, max_model_len=32)
    scheduler.add(_request("a", 16))
    _step(scheduler)
    scheduler.add(_request("big", 20))
    scheduler.add(_request("small", 2))
    assert [shape[0] for shape in _shape(_step(scheduler)[0])] == ["a"]


def test_the_latest_is_preempted_and_its_output_is_kept_and_not_emitted_again() -> None:
    scheduler = _scheduler(num_blocks=5, max_model_len=16, enable_prefix_cache=False)
    scheduler.add(_request("a", 7))
    scheduler.add(_request("b", 7))
    emitted: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    preempted: list[str] = []
    for _ in range(30):
        plan, committed = _step(scheduler)
        preempted += [key.request_id for key, _ in plan.preempted]
        for item in committed:
            emitted[item.request.key.request_id].append((item.offset, len(item.token_ids)))
    assert preempted == ["b"]
    assert scheduler.num_preemptions == 1
    assert emitted["a"] == emitted["b"] == [(offset, 1) for offset in range(8)]
    assert scheduler.blocks.num_free_blocks == 5


def test_the_only_request_waits_when_others_hold_the_pool() -> None:
    scheduler = _scheduler(num_blocks=4, max_model_len=16)
    scheduler.reserve(_key("reserved"), 4)
    scheduler.add(_request("a", 8))
    _step(scheduler)
    plan = scheduler.plan()
    assert plan.chunks == ()
    assert plan.preempted == ((_key("a"), PreemptionKind.RECOMPUTE),)
    assert scheduler.plan() == Plan()
    assert scheduler.release(_key("reserved"))
    plan, committed = _step(scheduler)
    assert _shape(plan) == [("a", 8, 9, True)]  # the first two blocks were still cached
    assert committed[0].offset == 1


def test_waiting_for_blocks_does_not_stop_those_that_brought_their_own() -> None:
    scheduler = _scheduler(num_blocks=8, max_model_len=32)
    scheduler.reserve(_key("imported"), 16)
    scheduler.add(_request("big", 20))
    request = _request("imported", 15, output=(5,))
    scheduler.start_reserved(request, num_computed_tokens=15)
    assert _shape(_step(scheduler)[0]) == [("imported", 15, 16, True)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", range(50, 59), max_tokens=1))
    _step(scheduler)
    again = _request("b", range(50, 62))
    assert scheduler.num_cached_tokens(again) == 8
    assert scheduler.num_cached_tokens(_request("t", range(50, 62), tenant="other")) == 0
    # At least the last token is computed, whose logits are needed.
    assert scheduler.num_cached_tokens(_request("c", range(50, 58))) == 4
    scheduler.add(again)
    plan, committed = _step(scheduler)
    assert _shape(plan) == [("b", 8, 12, True)]
    assert committed[0].request.num_cached_tokens == 8


def test_without_a_prefix_cache_nothing_is_found() -> None:
    scheduler = _scheduler(enable_prefix_cache=False)
    scheduler.add(_request("a", range(50, 59), max_tokens=1))
    _step(scheduler)
    scheduler.add(_request("b", range(50, 62)))
    assert _shape(_step(scheduler)[0]) == [("b", 0, 12, True)]


@pytest.mark.parametrize(
    ("request_", "tokens", "taken", "reason"),
    [
        (_request("a"), (5, EOS, 6), (5, EOS), FinishReason.STOP),
        (_request("a", ignore_eos=True, max_tokens=3), (5, EOS, 6), (5, EOS, 6), "length"),
        (_request("a", stop=(9,), ignore_eos=True), (9, 1), (9,), FinishReason.STOP),
        (_request("a", max_tokens=2), (5, 6, 7, 8), (5, 6), FinishReason.LENGTH),
        (_request("a", output=(4, 4), max_tokens=3), (5, 6), (5,), FinishReason.LENGTH),
        (_request("a", 60, max_tokens=99), (5,) * 9, (5,) * 4, FinishReason.LENGTH),
        (_request("a"), (5, 6), (5, 6), None),
    ],
)
def test_generation_ends_where_it_should(
    request_: Request, tokens: tuple[int, ...], taken: tuple[int, ...], reason: FinishReason | None
) -> None:
    scheduler = _scheduler(max_num_batched_tokens=64)
    scheduler.add(request_)
    _, committed = _step(scheduler, *tokens)
    offset = len(request_.output_token_ids)
    assert [(c.offset, c.token_ids, c.finish_reason) for c in committed] == [
        (offset, taken, reason)
    ]
    if reason is not None:
        assert scheduler.state_of(request_.key) is None
        assert scheduler.blocks.num_free_blocks == 32


def test_several_tokens_can_be_committed_and_rolled_back() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 6))
    _step(scheduler, 11, 12, 13)
    assert _tokens(scheduler, "a")[6:] == [11, 12, 13]
    plan, _ = _step(scheduler, 14)  # the KV of all three is missing
    assert _shape(plan) == [("a", 6, 9, True)]
    scheduler.rollback(_key("a"), 3)
    assert _tokens(scheduler, "a")[6:] == [11]
    assert len(scheduler.blocks.block_table(_key("a"))) == 2
    plan, committed = _step(scheduler, 15)
    assert _shape(plan) == [("a", 6, 7, True)]
    assert (committed[0].offset, committed[0].token_ids) == (1, (15,))
    with pytest.raises(LifecycleError, match="2 generated"):
        scheduler.rollback(_key("a"), 3)


def test_a_block_written_again_after_a_rollback_is_out_of_the_cache() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", range(50, 57)))
    _step(scheduler, 1)
    _step(scheduler, 3)  # the second block is full: 54, 55, 56, 1
    assert scheduler.num_cached_tokens(_request("b", [*range(50, 57), 1, 9])) == 8
    scheduler.rollback(_key("a"), 2)
    _step(scheduler, 4)
    assert scheduler.num_cached_tokens(_request("b", [*range(50, 57), 1, 9])) == 4
    _step(scheduler, 5)
    assert scheduler.num_cached_tokens(_request("b", [*range(50, 57), 4, 9])) == 8


def test_no_token_for_a_request_means_to_try_its_last_one_again() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 6))
    plan = scheduler.plan()
    assert scheduler.commit(plan, {}) == []
    plan, committed = _step(scheduler, 11)
    assert _shape(plan) == [("a", 5, 6, True)]
    assert committed[0].offset == 0


def test_prefill_only_is_held_until_released() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 6), prefill_only=True)
    _, committed = _step(scheduler, 11)
    assert committed[0].token_ids == (11,)
    assert scheduler.state_of(_key("a")) is EngineState.HELD
    assert scheduler.plan().chunks == ()
    assert scheduler.blocks.num_free_blocks == 30
    assert scheduler.release(_key("a"))
    assert not scheduler.release(_key("a"))
    assert scheduler.blocks.num_free_blocks == 32


def test_prefill_only_that_ends_at_once_is_finished_not_held() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 6), prefill_only=True)
    _, committed = _step(scheduler, EOS)
    assert committed[0].finish_reason is FinishReason.STOP
    assert scheduler.state_of(_key("a")) is None
    assert scheduler.blocks.num_free_blocks == 32


def test_a_decode_takes_over_where_the_prefill_ended() -> None:
    scheduler = _scheduler()
    assert scheduler.reserve(_key("a"), 8) == (3, 0)  # two blocks and one ahead
    assert scheduler.state_of(_key("a")) is EngineState.RESERVED
    assert list(scheduler.reservations.importable(_key("a"), 0, 2)) == [0, 1]
    scheduler.start_reserved(_request("a", 7, output=(11,)), num_computed_tokens=7)
    plan, committed = _step(scheduler, 12)
    assert _shape(plan) == [("a", 7, 8, True)]
    assert (committed[0].offset, committed[0].token_ids) == (1, (12,))
    with pytest.raises(LifecycleError):
        scheduler.reservations.importable(_key("a"), 0, 2)


def test_a_prefill_goes_on_behind_a_fetched_prefix() -> None:
    scheduler = _scheduler()
    scheduler.reserve(_key("a"), 10)
    scheduler.start_reserved(_request("a", 10), num_computed_tokens=8, is_exporting=True)
    plan = scheduler.plan()
    assert _shape(plan) == [("a", 8, 10, True)]
    assert plan.chunks[0].export_range(BLOCK_SIZE) == (0, 3)


def test_a_reservation_uses_the_local_prefix_and_protects_it() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", range(50, 59), max_tokens=1))
    _step(scheduler)
    request = _request("b", range(50, 62))
    assert scheduler.reserve(_key("b"), 12, prefix_of=request) == (4, 8)
    with pytest.raises(ValueError, match=r"\[2, 4\)"):
        scheduler.reservations.importable(_key("b"), 1, 3)
    assert len(scheduler.reservations.importable(_key("b"), 2, 4)) == 2
    scheduler.start_reserved(request, num_computed_tokens=8)
    assert _shape(_step(scheduler)[0]) == [("b", 8, 12, True)]


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    scheduler = _scheduler(num_blocks=4, max_model_len=16)
    scheduler.reserve(_key("a"), 8)
    with pytest.raises(OutOfBlocks) as caught:
        scheduler.reserve(_key("b"), 8)
    assert (caught.value.needed, caught.value.free) == (3, 1)
    assert scheduler.state_of(_key("b")) is None
    assert scheduler.release(_key("a"))
    scheduler.reserve(_key("b"), 8)


@pytest.mark.parametrize("num_computed_tokens", [-1, 10, 99])
def test_a_reserved_request_cannot_start_with_more_than_there_is(num_computed_tokens: int) -> None:
    scheduler = _scheduler()
    scheduler.reserve(_key("a"), 10)
    with pytest.raises(InvalidRequest):
        scheduler.start_reserved(_request("a", 10), num_computed_tokens=num_computed_tokens)
    assert scheduler.state_of(_key("a")) is EngineState.RESERVED


def test_each_block_is_exported_once_even_if_it_is_computed_twice() -> None:
    scheduler = _scheduler(
        num_blocks=8, max_num_batched_tokens=4, max_model_len=32, enable_prefix_cache=False
    )
    scheduler.add(_request("first", 7, max_tokens=20, ignore_eos=True))
    _step(scheduler)
    _step(scheduler)
    scheduler.add(_request("exported", 18), is_exporting=True)
    ranges = []
    preempted = 0
    for _ in range(40):
        plan = scheduler.plan()
        preempted += len(plan.preempted)
        for chunk in plan.chunks:
            lo, hi = chunk.export_range(BLOCK_SIZE)
            if chunk.key == _key("exported") and lo < hi:
                ranges.append((lo, hi))
        scheduler.commit(plan, {chunk.key: (9,) for chunk in plan.chunks})
    assert preempted > 0
    assert [block for lo, hi in ranges for block in range(lo, hi)] == list(range(5))


def test_a_failed_request_leaves_the_others_alone() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 6))
    scheduler.add(_request("b", 6))
    plan = scheduler.plan()
    distrusted = scheduler.fail(_key("a"))
    assert len(distrusted) == 2
    committed = scheduler.commit(plan, {_key("a"): (1,), _key("b"): (1,)})
    assert [item.request.key.request_id for item in committed] == ["b"]
    assert scheduler.state_of(_key("a")) is None


def test_what_cannot_be_served_is_refused_by_name() -> None:
    scheduler = _scheduler()
    with pytest.raises(InvalidRequest) as caught:
        scheduler.add(_request("a", ()))
    assert caught.value.field == "prompt"
    with pytest.raises(ContextLengthExceeded):
        scheduler.add(_request("a", 64))
    with pytest.raises(InvalidRequest) as caught:
        scheduler.add(_request("a", output=(1, 2), max_tokens=2))
    assert caught.value.field == "max_tokens"
    scheduler.add(_request("a"))
    with pytest.raises(LifecycleError, match="waiting already"):
        scheduler.add(_request("a"))
    with pytest.raises(LifecycleError, match="waiting already"):
        scheduler.reserve(_key("a"), 4)
    with pytest.raises(LifecycleError, match="not reserved"):
        scheduler.start_reserved(_request("b"), num_computed_tokens=0)
    assert not scheduler.release(_key("nobody"))


def test_random_traffic_gives_every_request_all_its_tokens_once_and_leaks_nothing() -> None:
    rng = random.Random(3)
    scheduler = _scheduler(
        num_blocks=14, max_num_seqs=5, max_num_batched_tokens=9, max_model_len=40
    )
    emitted: dict[str, int] = {}
    goals: dict[str, int] = {}
    released: set[str] = set()
    for step in range(3_000):
        name = str(step)
        request = _request(
            name,
            range(shared := rng.choice((10, 20)), shared + rng.randint(1, 22)),
            max_tokens=rng.randint(1, 12),
            priority=rng.randrange(3),
            ignore_eos=True,
        )
        choice = rng.randrange(12)
        if choice < 3 and scheduler.count(EngineState.WAITING) < 6:
            scheduler.add(request, prefill_only=choice == 0)
            goals[name] = 1 if choice == 0 else request.sampling.max_tokens
        elif choice == 3:
            try:
                scheduler.reserve(request.key, request.num_tokens, prefix_of=request)
            except OutOfBlocks:
                continue
            scheduler.start_reserved(request, num_computed_tokens=request.num_tokens - 1)
            goals[name] = request.sampling.max_tokens
        elif choice == 4 and goals:
            victim = rng.choice(list(goals))
            if scheduler.release(_key(victim)):
                released.add(victim)
        plan = scheduler.plan(now_s=float(step))
        assert sum(c.end - c.start for c in plan.chunks) <= 9
        assert len(plan.chunks) <= 5
        for item in scheduler.commit(plan, {c.key: (30 + step % 7,) for c in plan.chunks}):
            name = item.request.key.request_id
            assert item.offset == emitted.get(name, 0)
            emitted[name] = item.offset + len(item.token_ids)
            if scheduler.state_of(item.request.key) is EngineState.HELD:
                scheduler.release(item.request.key)
        scheduler.blocks.check_integrity()
    while scheduler.plan().chunks:
        plan = scheduler.plan()
        for item in scheduler.commit(plan, {c.key: (1,) for c in plan.chunks}):
            emitted[item.request.key.request_id] = item.offset + 1
            scheduler.release(item.request.key) if item.request.prefill_only else None
    assert scheduler.num_preemptions > 20
    assert scheduler.blocks.num_free_blocks == 14
    for name, goal in goals.items():
        assert emitted.get(name, 0) == goal or name in released
