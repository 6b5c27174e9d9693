from collections.abc import Iterable

import pytest

from shared.core.batch_plan import IterationLimits
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineState
from shared.core.iteration import IterationScheduler
from shared.core.preemption import PreemptionCost, PreemptionKind, SwapSpace
from shared.core.request import Request, RequestKey, SamplingParams

SWAP = PreemptionCost(recompute_s=lambda tokens: 1.0, swap_s=lambda blocks: 0.0)


def _request(
    name: str,
    prompt: Iterable[int],
    *,
    priority: int = 0,
    max_tokens: int = 9,
    group: str | None = None,
) -> Request:
    return Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        priority=priority,
        group_id=group,
    )


def _scheduler(
    num_blocks: int,
    *,
    num_host_blocks: int = 8,
    cost: PreemptionCost = SWAP,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    enable_prefix_cache: bool = False,
) -> IterationScheduler:
    return IterationScheduler(
        IterationLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=16,
        ),
        BlockManager(num_blocks, block_size=4),
        enable_prefix_cache=enable_prefix_cache,
        swap=SwapSpace(num_host_blocks, 4, cost),
    )


def _step(scheduler: IterationScheduler) -> None:
    plan = scheduler.plan()
    scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks})
    scheduler.check_integrity()


A, B = RequestKey("a", 0), RequestKey("b", 0)


def _full(num_host_blocks: int = 8, cost: PreemptionCost = SWAP) -> IterationScheduler:
    """Two requests of seven computed and one new token each in a pool of five blocks."""
    scheduler = _scheduler(5, num_host_blocks=num_host_blocks, cost=cost)
    scheduler.add(_request("a", range(10, 17)))
    scheduler.add(_request("b", range(20, 27)))
    _step(scheduler)
    _step(scheduler)
    return scheduler


def test_a_swapped_request_comes_back_to_where_it_was() -> None:
    scheduler = _full()
    table = list(scheduler.blocks.block_table(B))
    plan = scheduler.plan()  # both need a third block, one is there
    assert plan.preempted == ((B, PreemptionKind.SWAP),)
    assert [block for block, _ in plan.swap_out] == table
    host_blocks = [host_block for _, host_block in plan.swap_out]
    assert scheduler.state_of(B) is EngineState.SWAPPED
    assert scheduler.blocks.num_free_blocks == 2
    scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks})
    for _ in range(20):
        plan = scheduler.plan()
        if plan.swap_in:
            break
        scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks})
    assert scheduler.state_of(A) is None  # it had to end first
    chunk = plan.chunks[0]
    assert (chunk.key, chunk.start, chunk.end, chunk.is_sampling) == (B, 8, 9, True)
    assert plan.swap_in == tuple(zip(host_blocks, chunk.block_table[:2], strict=True))
    scheduler.check_integrity()
    request = scheduler.get(B)
    assert request is not None
    assert request.num_preemptions == 1


@pytest.mark.parametrize(
    ("recompute_s", "swap_s", "expected"),
    [(0.2, 0.1, PreemptionKind.SWAP), (0.1, 0.2, PreemptionKind.RECOMPUTE)],
)
def test_the_cheaper_kind_is_taken(
    recompute_s: float, swap_s: float, expected: PreemptionKind
) -> None:
    asked: list[tuple[str, int]] = []

    def recompute(num_tokens: int) -> float:
        asked.append(("tokens", num_tokens))
        return recompute_s

    def swap(num_blocks: int) -> float:
        asked.append(("blocks", num_blocks))
        return swap_s

    scheduler = _full(cost=PreemptionCost(recompute_s=recompute, swap_s=swap))
    assert scheduler.plan().preempted == ((B, expected),)
    assert sorted(asked) == [("blocks", 2), ("tokens", 8)]
    assert scheduler.preemptions == {
        kind: int(kind is expected) for kind in (PreemptionKind.RECOMPUTE, PreemptionKind.SWAP)
    }


def test_without_room_in_the_host_it_is_computed_again() -> None:
    scheduler = _full(num_host_blocks=1)
    plan = scheduler.plan()
    assert plan.preempted == ((B, PreemptionKind.RECOMPUTE),)
    assert plan.swap_out == ()
    assert scheduler.state_of(B) is EngineState.WAITING


@pytest.mark.parametrize("end", ["release", "fail"])
def test_a_swapped_request_can_end(end: str) -> None:
    scheduler = _full()
    scheduler.plan()
    if end == "release":
        assert scheduler.release(B)
    else:
        assert scheduler.fail(B) == []
    assert scheduler.state_of(B) is None
    scheduler.check_integrity()
    assert scheduler.release(A)
    assert scheduler.blocks.num_free_blocks == 5


def test_a_swapped_request_can_be_rolled_back() -> None:
    scheduler = _full()
    plan = scheduler.plan()
    scheduler.commit(plan, {A: (5,)})
    scheduler.rollback(B, 2)
    scheduler.check_integrity()
    assert scheduler.release(A)
    plan = scheduler.plan()
    assert [(c.key, c.start, c.end) for c in plan.chunks] == [(B, 6, 7)]
    assert len(plan.swap_in) == 2


def test_what_the_prefix_cache_still_has_is_not_copied_back() -> None:
    scheduler = _scheduler(5, enable_prefix_cache=True)
    scheduler.add(_request("a", range(10, 17)))
    scheduler.add(_request("b", range(20, 27)))
    _step(scheduler)
    _step(scheduler)
    table = list(scheduler.blocks.block_table(B))
    assert len(scheduler.plan().swap_out) == 2
    assert scheduler.release(A)
    plan = scheduler.plan()
    assert plan.swap_in == ()
    assert list(plan.chunks[0].block_table[:2]) == table


def test_a_block_about_to_be_copied_is_swapped_out_from_where_its_content_is() -> None:
    scheduler = _scheduler(5, max_num_seqs=2, max_num_batched_tokens=8)
    first = _request("first", range(10, 21), priority=1, group="g")
    scheduler.add(first)
    _step(scheduler)
    scheduler.add(_request("other", range(30, 34)))
    scheduler.add(_request("second", range(10, 21), group="g"))
    _step(scheduler)
    table = list(scheduler.blocks.block_table(first.key))
    # It makes its last block its own with the last free one, which the other needs then.
    plan = scheduler.plan()
    assert plan.preempted == ((first.key, PreemptionKind.SWAP),)
    assert [block for block, _ in plan.swap_out] == table
    assert plan.block_copies == ()
    assert [chunk.key.request_id for chunk in plan.chunks] == ["other"]
    scheduler.check_integrity()


def test_who_takes_tokens_back_does_not_write_into_a_sibling_s_blocks() -> None:
    scheduler = _scheduler(8, max_num_seqs=1)
    first, second = (_request(name, range(10, 14), group="g") for name in "ab")
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(4):
        _step(scheduler)
    (shared,) = scheduler.blocks.block_table(second.key)
    scheduler.rollback(first.key, 4)
    plan = scheduler.plan()
    assert [(c.key, c.start, c.end) for c in plan.chunks] == [(first.key, 3, 4)]
    assert [source for source, _ in plan.block_copies] == [shared]
    assert shared not in plan.chunks[0].block_table


def test_a_request_that_brought_its_blocks_waits_with_them_until_the_next_one_is_free() -> None:
    scheduler = _scheduler(4)
    other = RequestKey("other", 0)
    scheduler.reserve(other, 4)
    scheduler.reserve(B, 4)
    scheduler.start_reserved(_request("b", range(9)), num_computed_tokens=8)
    plan = scheduler.plan()
    assert (plan.chunks, plan.preempted) == ((), ())
    assert len(scheduler.blocks.block_table(B)) == 2
    assert scheduler.release(other)
    assert [(c.key, c.start, c.end) for c in scheduler.plan().chunks] == [(B, 8, 9)]
