"""Choices of one call compute their prompt once, whatever happens to the one that does."""

from collections.abc import Iterable

import pytest

from shared.core.batch_plan import IterationLimits, Plan
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineState
from shared.core.iteration import Batching, IterationScheduler
from shared.core.preemption import PreemptionCost, SwapSpace
from shared.core.request import Request, RequestKey, SamplingParams

PROMPT = range(50, 60)
SWAP = PreemptionCost(recompute_s=lambda tokens: 1.0, swap_s=lambda blocks: 0.0)


def _scheduler(
    *,
    num_blocks: int = 32,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 6,
    batching: Batching = "continuous",
    swap: SwapSpace | None = None,
) -> IterationScheduler:
    return IterationScheduler(
        IterationLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=32,
        ),
        BlockManager(num_blocks, block_size=4),
        enable_prefix_cache=False,
        batching=batching,
        swap=swap,
    )


def _request(
    name: str,
    prompt: Iterable[int] = PROMPT,
    *,
    output: tuple[int, ...] = (),
    max_tokens: int = 8,
    priority: int = 0,
    tenant: str = "",
    group: str | None = "g",
) -> Request:
    return Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=tuple(prompt),
        output_token_ids=output,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        priority=priority,
        tenant=tenant,
        group_id=group,
    )


def _step(scheduler: IterationScheduler) -> Plan:
    plan = scheduler.plan()
    scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks if chunk.is_sampling})
    scheduler.check_integrity()
    return plan


def _shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.key.request_id, chunk.start, chunk.end) for chunk in plan.chunks]


def _key(name: str) -> RequestKey:
    return RequestKey(name, 0)


def _run(scheduler: IterationScheduler) -> list[tuple[str, int, int]]:
    """Everything that is computed until nothing is left to do."""
    shape = []
    while (plan := _step(scheduler)).chunks:
        shape += _shape(plan)
    return shape


def _prefilled(shape: list[tuple[str, int, int]], input_len: int = len(PROMPT)) -> dict[str, int]:
    """Prompt tokens that each has computed."""
    counts: dict[str, int] = {}
    for name, start, end in shape:
        counts[name] = counts.get(name, 0) + max(0, min(end, input_len) - start)
    return counts


def test_the_others_wait_for_the_first_and_compute_the_last_token_only() -> None:
    scheduler = _scheduler()
    for name in "abc":
        scheduler.add(_request(name))
    assert _shape(_step(scheduler)) == [("a", 0, 6)]
    assert _shape(_step(scheduler)) == [("a", 6, 10)]
    # Their blocks are those of the first, which are no more than before.
    assert scheduler.blocks.num_free_blocks == 32 - 3
    plan = _step(scheduler)
    assert _shape(plan) == [("a", 10, 11), ("b", 9, 10), ("c", 9, 10)]
    tables = [scheduler.blocks.block_table(_key(name)) for name in "abc"]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 3
    assert len(plan.block_copies) == 2
    for name in "bc":
        request = scheduler.get(_key(name))
        assert request is not None
        assert request.num_cached_tokens == 9
    _run(scheduler)
    assert scheduler.blocks.num_free_blocks == 32


def test_what_was_shared_at_first_still_counts_when_its_blocks_are_lost() -> None:
    scheduler = _scheduler(num_blocks=8, max_num_batched_tokens=16)
    scheduler.add(_request("a", max_tokens=22))
    scheduler.add(_request("b", max_tokens=22))
    while scheduler.num_preemptions == 0:
        _step(scheduler)
    while scheduler.state_of(_key("b")) is not EngineState.RUNNING:
        _step(scheduler)
    request = scheduler.get(_key("b"))
    assert request is not None
    assert (request.num_preemptions, request.num_cached_tokens) == (1, 9)


def test_who_is_no_sibling_waits_for_nobody() -> None:
    scheduler = _scheduler(max_num_batched_tokens=64)
    scheduler.add(_request("a"))
    scheduler.add(_request("other call", group="h"))
    scheduler.add(_request("alone", group=None))
    scheduler.add(_request("alone too", group=None))
    scheduler.add(_request("other tenant", tenant="t"))
    scheduler.add(_request("other prompt", range(51, 61)))
    plan = _step(scheduler)
    assert [(start, end) for _, start, end in _shape(plan)] == [(0, 10)] * 6


@pytest.mark.parametrize("end", ["release", "fail"])
@pytest.mark.parametrize("steps", [0, 1])
def test_when_the_first_is_gone_the_next_one_computes(end: str, steps: int) -> None:
    scheduler = _scheduler()
    for name in "abc":
        scheduler.add(_request(name))
    for _ in range(steps):
        _step(scheduler)
    assert (
        scheduler.release(_key("a")) if end == "release" else scheduler.fail(_key("a")) is not None
    )
    assert _prefilled(_run(scheduler)) == {"b": 10, "c": 1}
    assert scheduler.blocks.num_free_blocks == 32


@pytest.mark.parametrize("is_held", [True, False])
def test_what_was_shared_outlives_the_first(is_held: bool) -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_request("a", max_tokens=1), prefill_only=is_held)
    scheduler.add(_request("b"), prefill_only=True)
    _step(scheduler)
    assert _shape(_step(scheduler)) == [("a", 6, 10)]
    scheduler.release(_key("a"))
    assert scheduler.state_of(_key("a")) is None
    assert _shape(_step(scheduler)) == [("b", 9, 10)]
    assert scheduler.state_of(_key("b")) is EngineState.HELD
    assert scheduler.release(_key("b"))
    assert scheduler.blocks.num_free_blocks == 32


def test_exports_of_a_sibling_are_whole() -> None:
    scheduler = _scheduler()
    for name in "ab":
        scheduler.add(_request(name), prefill_only=True, is_exporting=True)
    ranges: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    while (plan := scheduler.plan()).chunks:
        for chunk in plan.chunks:
            ranges[chunk.key.request_id].append(chunk.export_range(4))
        scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks})
    assert ranges == {"a": [(0, 1), (1, 3)], "b": [(0, 3)]}


@pytest.mark.parametrize("num_host_blocks", [0, 8])
def test_when_the_first_loses_its_blocks_halfway_all_are_served(num_host_blocks: int) -> None:
    swap = SwapSpace(num_host_blocks, 4, SWAP) if num_host_blocks else None
    scheduler = _scheduler(num_blocks=6, max_num_batched_tokens=3, swap=swap)
    scheduler.add(_request("urgent", range(3), max_tokens=14, group=None))
    _step(scheduler)
    for name in "ab":
        scheduler.add(_request(name, range(50, 66), priority=1, max_tokens=2))
    shape: list[tuple[str, int, int]] = []
    for _ in range(6):
        shape += _shape(_step(scheduler))
    assert (scheduler.num_preemptions, _prefilled(shape, 16)["a"]) == (1, 10)
    shape += _run(scheduler)
    assert _prefilled(shape, 16)["a"] == 16 + (0 if swap is not None else 10)
    assert _prefilled(shape, 16)["b"] == 1
    assert [name for name, _, end in shape if end == 17] == ["a", "b"]
    assert scheduler.blocks.num_free_blocks == 6


def test_nobody_waits_for_somebody_behind_it() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("late", priority=1))
    _step(scheduler)
    scheduler.add(_request("soon"))
    assert _shape(_step(scheduler)) == [("late", 6, 10), ("soon", 0, 2)]
    assert _prefilled(_run(scheduler))["soon"] == 8


def test_siblings_of_a_later_attempt_share_what_they_have_in_common() -> None:
    scheduler = _scheduler(max_num_batched_tokens=64)
    scheduler.add(_request("a", output=(1, 2, 3)))
    scheduler.add(_request("b", output=(1, 2, 4, 5)))
    scheduler.add(_request("c", output=(1,)))
    assert _shape(_step(scheduler)) == [("a", 0, 13)]
    assert sorted(_shape(_step(scheduler))) == [("a", 13, 14), ("b", 12, 14), ("c", 10, 11)]


@pytest.mark.parametrize("max_num_batched_tokens", [6, 64])
def test_static_batching_has_siblings_in_one_batch(max_num_batched_tokens: int) -> None:
    scheduler = _scheduler(
        batching="static", max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=4
    )
    for name in "abc":
        scheduler.add(_request(name, max_tokens=3))
    scheduler.add(_request("other", range(8), max_tokens=1, group=None))
    scheduler.add(_request("late", range(8), max_tokens=1, group=None))
    num_pads = 0
    shape: list[tuple[str, int, int]] = []
    while "late" not in {name for name, _, _ in shape}:
        plan = _step(scheduler)
        num_pads += sum(chunk.end - chunk.start for chunk in plan.pad_chunks)
        shape += _shape(plan)
    assert _prefilled(shape)["a"] == 10
    assert {name: start for name, start, _ in reversed(shape)} | {"late": 0} == {
        "a": 0,
        "b": 9,
        "c": 9,
        "other": 0,
        "late": 0,
    }
    order = [name for name, _, _ in shape]
    # Nobody decodes before all of them have sampled, and nobody else is let in before the end.
    assert order.index("c") < shape.index(("a", 10, 11))
    assert order[-1] == "late"
    # The other prompt up to the longest, and its row in the two steps behind.
    assert num_pads == 2 + 2


def test_static_batching_goes_on_when_the_first_is_gone() -> None:
    scheduler = _scheduler(batching="static")
    for name in "abc":
        scheduler.add(_request(name))
    scheduler.add(_request("other", range(8), group=None))
    _step(scheduler)
    assert scheduler.release(_key("a"))
    prefilled = _prefilled(_run(scheduler))
    assert (prefilled["b"], prefilled["c"]) == (10, 1)
    assert scheduler.blocks.num_free_blocks == 32
