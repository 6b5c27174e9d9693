"""Policies: what all of them keep, and the order of each."""

import random

import pytest

from shared.core.policies import (
    POLICIES,
    Capacity,
    PrefillSlot,
    QueuedRequest,
    create_policy,
)
from shared.core.policies.base import LengthEstimate
from shared.core.request import Request, SamplingParams
from shared.errors import ConfigError


def queued(name: str, *, num_tokens: int = 10, arrival_s: float = 0.0) -> QueuedRequest:
    request = Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=(1,) * num_tokens,
        sampling=SamplingParams(max_tokens=16),
    )
    return QueuedRequest(request=request, arrival_s=arrival_s)


def capacity(*instances: str, blocks: int = 1000, tokens: int = 100, requests: int = 4) -> Capacity:
    slots = tuple(
        PrefillSlot(instance=name, max_batched_tokens=tokens, max_requests=requests)
        for name in instances
    )
    return Capacity(slots=slots, free_decode_blocks=blocks, block_size=16, pool_blocks=1000)


def test_fifo_takes_the_oldest_first_and_fills_slot_after_slot() -> None:
    fifo = create_policy("fifo")
    for index, name in enumerate("abcdef"):
        fifo.on_arrival(queued(name, arrival_s=10.0 - index), 10.0)
    batches = fifo.next_prefill_batches(10.0, capacity("p", "q"))
    assert [b.instance for b in batches] == ["p", "q"]
    names = [[q.request.request_id for q in b.requests] for b in batches]
    assert names == [["f", "e", "d", "c"], ["b", "a"]]
    assert fifo.num_waiting == 0


def test_fifo_keeps_the_place_of_a_request_that_came_back() -> None:
    fifo = create_policy("fifo")
    fifo.on_arrival(queued("new", arrival_s=5.0), 5.0)
    fifo.on_arrival(queued("back", arrival_s=1.0), 6.0)
    (batch,) = fifo.next_prefill_batches(6.0, capacity("p", requests=1))
    assert batch.requests[0].request.request_id == "back"


def test_a_batch_closes_at_its_tokens_but_a_long_prompt_goes_alone() -> None:
    fifo = create_policy("fifo")
    fifo.on_arrival(queued("long", num_tokens=500, arrival_s=0), 0)
    fifo.on_arrival(queued("b", num_tokens=60, arrival_s=1), 1)
    fifo.on_arrival(queued("c", num_tokens=60, arrival_s=2), 2)
    batches = fifo.next_prefill_batches(3.0, capacity("p", "q", "r"))
    names = [[q.request.request_id for q in b.requests] for b in batches]
    assert names == [["long"], ["b"], ["c"]]


def test_without_blocks_nobody_overtakes() -> None:
    fifo = create_policy("fifo")
    fifo.on_arrival(queued("big", num_tokens=64, arrival_s=0), 0)  # 4 blocks and one ahead
    fifo.on_arrival(queued("small", num_tokens=1, arrival_s=1), 1)
    assert fifo.next_prefill_batches(2.0, capacity("p", blocks=4)) == []
    assert fifo.num_waiting == 2
    (batch,) = fifo.next_prefill_batches(2.0, capacity("p", blocks=5))
    assert [q.request.request_id for q in batch.requests] == ["big"]


def test_a_withdrawn_request_is_not_given_out() -> None:
    fifo = create_policy("fifo")
    fifo.on_arrival(queued("a"), 0)
    assert fifo.on_finish(queued("a").key, 1.0)
    assert not fifo.on_finish(queued("a").key, 1.0)
    assert fifo.next_prefill_batches(2.0, capacity("p")) == []


def test_a_prediction_is_kept_with_the_request_and_a_late_one_is_ignored() -> None:
    fifo = create_policy("fifo")
    fifo.on_arrival(queued("a", arrival_s=3.0), 3.0)
    estimate = LengthEstimate(p50_tokens=5, p90_tokens=9)
    fifo.on_prediction(queued("a").key, estimate, 4.0)
    fifo.on_prediction(queued("gone").key, estimate, 4.0)
    (kept,) = fifo.waiting()
    assert kept.estimate == estimate and kept.arrival_s == 3.0


def test_an_unknown_name_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"'fastest' is not one of .*fifo"):
        create_policy("fastest")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nothing_is_lost_or_given_out_twice_or_over_committed(name: str) -> None:
    policy, dice = create_policy(name), random.Random(7)
    waiting: set[str] = set()
    given: list[str] = []
    for step in range(300):
        for _ in range(dice.randint(0, 3)):
            item = queued(f"r{step}-{dice.random()}", num_tokens=dice.randint(1, 150))
            waiting.add(item.request.request_id)
            policy.on_arrival(item, float(step))
        room = capacity("p", "q", blocks=dice.randint(0, 30))
        batches = policy.next_prefill_batches(float(step), room)
        taken = [q.request for b in batches for q in b.requests]
        assert sum(room.blocks_for(request) for request in taken) <= room.free_decode_blocks
        assert len(batches) <= len(room.slots)
        given += [request.request_id for request in taken]
        waiting -= {request.request_id for request in taken}
        assert policy.num_waiting == len(waiting)
    assert len(given) == len(set(given))
    assert not waiting & set(given)
