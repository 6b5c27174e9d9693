"""Padded batches that run to their end."""

from shared.core.batch_plan import IterationLimits, Plan
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineState
from shared.core.iteration import IterationScheduler
from shared.core.request import Request, RequestKey, SamplingParams


def _scheduler(
    *, max_num_seqs: int = 4, max_num_batched_tokens: int = 64, num_blocks: int = 32
) -> IterationScheduler:
    return IterationScheduler(
        IterationLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=32,
        ),
        BlockManager(num_blocks, block_size=4),
        batching="static",
    )


def _request(name: str, input_len: int, output_len: int) -> Request:
    first = 100 * sum(name.encode())
    return Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=tuple(range(first, first + input_len)),
        sampling=SamplingParams(max_tokens=output_len, ignore_eos=True),
    )


def _step(scheduler: IterationScheduler) -> Plan:
    plan = scheduler.plan()
    scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks})
    scheduler.check_integrity()
    return plan


def _shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.key.request_id, chunk.start, chunk.end) for chunk in plan.chunks]


def _padding(plan: Plan) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in plan.pad_chunks]


def test_a_batch_is_padded_to_its_longest_prompt_and_its_longest_output() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 10, 4))
    scheduler.add(_request("b", 3, 1))
    scheduler.add(_request("c", 6, 2))
    plan = _step(scheduler)
    assert _shape(plan) == [("a", 0, 10), ("b", 0, 3), ("c", 0, 6)]
    assert sum(end - start for start, end in _padding(plan)) == (10 - 3) + (10 - 6)
    late = _request("late", 5, 1)
    scheduler.add(late)
    # b has ended: its row is computed on, as long as the longest that runs.
    plan = _step(scheduler)
    assert (_shape(plan), _padding(plan)) == ([("a", 10, 11), ("c", 6, 7)], [(10, 11)])
    for step in (11, 12):
        plan = _step(scheduler)
        assert (_shape(plan), _padding(plan)) == ([("a", step, step + 1)], [(step, step + 1)] * 2)
        assert scheduler.state_of(late.key) is EngineState.WAITING
    plan = _step(scheduler)
    assert (_shape(plan), _padding(plan)) == ([("late", 0, 5)], [])
    assert _step(scheduler) == Plan()
    assert scheduler.blocks.num_free_blocks == 32


def test_nobody_decodes_before_all_prompts_and_their_padding_are_computed() -> None:
    scheduler = _scheduler(max_num_batched_tokens=6)
    scheduler.add(_request("a", 2, 3))
    scheduler.add(_request("b", 8, 3))
    plans = [_step(scheduler) for _ in range(3)]
    # 2 x 8 tokens in steps of six: padding, which is on the left, goes first.
    assert [sum(end - start for start, end in _padding(plan)) for plan in plans] == [6, 0, 0]
    assert [_shape(plan) for plan in plans] == [
        [],
        [("a", 0, 2), ("b", 0, 4)],
        [("b", 4, 8)],
    ]
    assert _shape(_step(scheduler)) == [("a", 2, 3), ("b", 8, 9)]


def test_seats_bound_a_batch_and_a_request_alone_is_not_padded() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(_request(name, 3, 2))
    assert _shape(_step(scheduler)) == [("a", 0, 3), ("b", 0, 3)]
    assert _shape(_step(scheduler)) == [("a", 3, 4), ("b", 3, 4)]
    plan = _step(scheduler)
    assert (_shape(plan), _padding(plan)) == ([("c", 0, 3)], [])


def test_padding_is_written_where_nobody_looks() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 10, 4))
    scheduler.add(_request("b", 3, 1))
    tables: set[int] = set()
    for _ in range(4):
        plan = _step(scheduler)
        scratch = {block for chunk in plan.pad_chunks for block in chunk.block_table}
        tables |= {block for chunk in plan.chunks for block in chunk.block_table}
        assert len(scratch) == 1
        assert not scratch & tables
        assert not any(chunk.is_sampling for chunk in plan.pad_chunks)
        assert len({chunk.key for chunk in plan.computed}) == len(plan.computed)
        for chunk in plan.pad_chunks:
            assert len(chunk.request.token_ids) >= chunk.end
            assert len(chunk.block_table) * 4 >= chunk.end


def test_prefills_for_others_are_a_batch_of_their_own_and_then_held() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 3, 5), prefill_only=True)
    scheduler.add(_request("b", 7, 5), prefill_only=True)
    _step(scheduler)
    assert scheduler.count(EngineState.HELD) == 2
    scheduler.add(_request("c", 4, 1))
    assert _shape(_step(scheduler)) == [("c", 0, 4)]
    for name in "ab":
        assert scheduler.release(RequestKey(name, 0))
    _step(scheduler)
    assert scheduler.blocks.num_free_blocks == 32


def test_a_batch_that_outgrows_the_pool_loses_its_last_member_to_the_next() -> None:
    scheduler = _scheduler(num_blocks=8)
    for name in "ab":
        scheduler.add(_request(name, 8, 20))
    ended: list[str] = []
    for _ in range(80):
        plan = scheduler.plan()
        for item in scheduler.commit(plan, {chunk.key: (5,) for chunk in plan.chunks}):
            if item.finish_reason is not None:
                ended.append(item.request.key.request_id)
    assert ended == ["a", "b"]
    assert scheduler.num_preemptions >= 1
    assert scheduler.blocks.num_free_blocks == 8
