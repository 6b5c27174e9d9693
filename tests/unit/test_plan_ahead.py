"""Iterations planned before the tokens of the one before them are known."""

from dataclasses import replace
from typing import Any

import pytest

from shared.core.batch_plan import IterationLimits, Plan
from shared.core.block_manager import BlockManager
from shared.core.engine_request import EngineState
from shared.core.iteration import Batching, IterationScheduler
from shared.core.request import Request, RequestKey, SamplingParams

BLOCK_SIZE = 4
END = 2


def _scheduler(
    *, num_blocks: int = 16, max_num_batched_tokens: int = 16, batching: Batching = "continuous"
) -> IterationScheduler:
    return IterationScheduler(
        IterationLimits(
            max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens, max_model_len=32
        ),
        BlockManager(num_blocks, BLOCK_SIZE),
        eos_token_ids=frozenset({END}),
        batching=batching,
    )


def _request(name: str, num_tokens: int = 6, *, max_tokens: int = 8, **sampling: Any) -> Request:
    first = 1000 * sum(name.encode())
    return Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=tuple(range(first, first + num_tokens)),
        output_token_ids=(),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


def _key(name: str) -> RequestKey:
    return RequestKey(name, 0)


def _ahead(scheduler: IterationScheduler, plan: Plan) -> Plan:
    """The plan behind ``plan``, launched."""
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    scheduler.launched(ahead)
    return ahead


def _commit(scheduler: IterationScheduler, plan: Plan, **tokens: int) -> None:
    """Everybody gets a token, by default one that is no end."""
    sampled = {c.key: [tokens.get(c.key.request_id, 7)] for c in plan.chunks if c.is_sampling}
    scheduler.commit(plan, sampled)
    scheduler.check_integrity()


def _shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(c.key.request_id, c.start, c.end) for c in plan.chunks]


def test_whoever_goes_on_gets_one_token_more_and_a_block_where_it_needs_one() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 6))
    scheduler.add(_request("b", 8))
    scheduler.add(_request("c", 2, max_tokens=1))  # ends with the token to come
    plan = scheduler.plan()
    ahead = _ahead(scheduler, plan)
    assert _shape(ahead) == [("a", 6, 7), ("b", 8, 9)]
    assert [len(chunk.block_table) for chunk in ahead.chunks] == [2, 3]
    _commit(scheduler, plan)
    second = _ahead(scheduler, ahead)
    assert _shape(second) == [("a", 7, 8), ("b", 9, 10)]
    _commit(scheduler, ahead)
    _commit(scheduler, second)
    request = scheduler.get(_key("b"))
    assert request is not None
    assert (request.num_tokens, request.num_computed_tokens) == (11, 10)
    assert _shape(scheduler.plan()) == [("a", 8, 9), ("b", 10, 11)]


def test_there_is_none_where_tokens_or_others_matter() -> None:
    def first_plan(*requests: Request, **settings: Any) -> tuple[IterationScheduler, Plan]:
        scheduler = _scheduler(**settings)
        for request in requests:
            scheduler.add(request)
        return scheduler, scheduler.plan()

    a, b = _request("a"), _request("b")
    for requests, settings in (
        ([_request("a", presence_penalty=0.1)], {}),
        ([_request("a", 20)], {}),  # its chunk does not sample
        ([_request("a", 8)], {"num_blocks": 2, "max_num_batched_tokens": 8}),
        ([a, b], {"max_num_batched_tokens": 6}),  # the budget was too small for both
        ([a, b], {"batching": "static"}),
        ([_request("a", max_tokens=1)], {}),
    ):
        scheduler, plan = first_plan(*requests, **settings)
        assert plan.chunks
        assert scheduler.plan_ahead(plan) is None, settings
    scheduler, plan = first_plan(a)
    scheduler.add(b)
    assert scheduler.plan_ahead(plan) is None


def test_nothing_is_written_behind_a_prompt_that_siblings_are_to_share() -> None:
    scheduler = _scheduler()
    parent = replace(_request("a"), group_id="call")
    scheduler.add(parent)
    scheduler.add(replace(parent, request_id="b"))
    plan = scheduler.plan()
    assert _shape(plan) == [("a", 0, 6)]
    # The token to come would go into the block that has the end of the prompt.
    assert scheduler.plan_ahead(plan) is None
    _commit(scheduler, plan)
    plan = scheduler.plan()
    assert _shape(plan) == [("a", 6, 7), ("b", 5, 6)]
    assert _shape(_ahead(scheduler, plan)) == [("a", 7, 8), ("b", 6, 7)]


@pytest.mark.parametrize("what", ["arrival", "release", "blocks"])
def test_one_who_waits_is_looked_at_again_when_something_has_changed(what: str) -> None:
    scheduler = _scheduler(num_blocks=8)
    scheduler.add(_request("a"))
    scheduler.reserve(_key("reserved"), 8)
    scheduler.add(_request("waits", 15))
    plan = scheduler.plan()
    assert _shape(plan) == [("a", 0, 6)]
    ahead = _ahead(scheduler, plan)  # there is no room for the other one
    _commit(scheduler, plan)
    if what == "arrival":
        scheduler.add(_request("b", 1))
    elif what == "release":
        scheduler.release(_key("reserved"))
    else:
        scheduler.grow(4)
    assert scheduler.plan_ahead(ahead) is None
    _commit(scheduler, ahead)
    plan = scheduler.plan()
    assert ("waits" in {chunk.key.request_id for chunk in plan.chunks}) == (what != "arrival")


def test_blocks_are_kept_until_what_writes_them_is_committed() -> None:
    scheduler = _scheduler(num_blocks=8)
    for name in ("ends", "goes", "fails", "stays"):
        scheduler.add(_request(name, 4))
    plan = scheduler.plan()
    ahead = _ahead(scheduler, plan)
    assert scheduler.blocks.num_free_blocks == 0
    assert len(scheduler.fail(_key("fails"))) == 2
    _commit(scheduler, plan, ends=END)
    assert scheduler.release(_key("goes"))
    assert scheduler.state_of(_key("ends")) is scheduler.state_of(_key("goes")) is None
    assert scheduler.blocks.num_free_blocks == 2  # of the failed one, which have been zeroed
    scheduler.add(replace(_request("goes", 4)))  # again, while its first life is in flight
    broken = next(chunk.request for chunk in ahead.chunks if chunk.key == _key("ends"))
    assert scheduler.plan_ahead(ahead) is None
    assert len(scheduler.discard(broken)) == 2
    assert scheduler.discard(broken) == []
    _commit(scheduler, ahead)
    assert scheduler.state_of(_key("goes")) is EngineState.WAITING
    assert scheduler.blocks.num_free_blocks == 6
    assert scheduler.num_cached_tokens(_request("stays", 5)) == 4


def test_what_was_rolled_back_is_passed_over() -> None:
    scheduler = _scheduler()
    for name in ("a", "b"):
        scheduler.add(_request(name, 6))
    plan = scheduler.plan()
    for _ in range(3):
        ahead = _ahead(scheduler, plan)
        _commit(scheduler, plan)
        plan = ahead
    scheduler.rollback(_key("a"), 2)
    assert scheduler.plan_ahead(plan) is None
    _commit(scheduler, plan)
    assert [scheduler.get(_key(name)).num_tokens for name in ("a", "b")] == [7, 10]  # type: ignore[union-attr]
    assert _shape(scheduler.plan()) == [("a", 6, 7), ("b", 9, 10)]


def test_what_was_launched_behind_several_tokens_is_passed_over() -> None:
    scheduler = _scheduler()
    for name in ("a", "b"):
        scheduler.add(_request(name, 6, max_tokens=12))
    plan = scheduler.plan()
    ahead = _ahead(scheduler, plan)
    sampled = {_key("a"): [11, 12, 13], _key("b"): [21]}
    assert [c.token_ids for c in scheduler.commit(plan, sampled)] == [(11, 12, 13), (21,)]
    assert _shape(ahead) == [("a", 6, 7), ("b", 6, 7)]
    assert scheduler.plan_ahead(ahead) is None
    _commit(scheduler, ahead)  # for "a" it has what comes behind the first of three
    a, b = (scheduler.get(_key(name)) for name in ("a", "b"))
    assert a is not None and b is not None
    assert (a.token_ids[6:], b.token_ids[6:]) == ([11, 12, 13], [21, 7])
    plan = scheduler.plan()
    assert _shape(plan) == [("b", 7, 8), ("a", 6, 9)]
    assert all(chunk.is_sampling for chunk in plan.chunks)
    second = _ahead(scheduler, plan)
    assert _shape(second) == [("b", 8, 9), ("a", 9, 10)]
    _commit(scheduler, plan)
    _commit(scheduler, second)
    assert a.token_ids[6:] == [11, 12, 13, 7, 7]
    assert (a.num_tokens, a.num_computed_tokens) == (11, 10)
