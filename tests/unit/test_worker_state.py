"""A worker's pure state: the fence, the attempts, the outputs it keeps."""

import pytest

from shared.core.request import FinishReason, Request, RequestKey, SamplingParams
from shared.errors import StaleCommand
from shared.messages.tokens import StreamState, TokenDelta
from shared.messages.workers import RequestStage
from shared.worker.attempts import Attempt, AttemptTable
from shared.worker.output_log import OutputLog

KEY = RequestKey("r", 0)


def attempt(number: int = 0) -> Attempt:
    request = Request(
        request_id="r",
        attempt=number,
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_tokens=4),
    )
    return Attempt(request=request, gateway="g", stage=RequestStage.PREFILL)


def delta(offset: int, *token_ids: int, end: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(
        request_id="r", attempt=0, offset=offset, token_ids=token_ids, finish_reason=end
    )


def test_an_older_epoch_is_refused_and_counted() -> None:
    table = AttemptTable()
    table.check_epoch(5)
    table.check_epoch(5)
    with pytest.raises(StaleCommand, match="epoch 4 is over, 5 leads"):
        table.check_epoch(4)
    assert table.num_stale == 1


def test_a_newer_attempt_displaces_an_older_one_and_not_the_other_way_round() -> None:
    table = AttemptTable()
    old = attempt(0)
    table.put(old)
    assert table.older(RequestKey("r", 1)) is old
    table.put(attempt(1))
    assert table.get(KEY) is None
    with pytest.raises(StaleCommand):
        table.older(KEY)
    assert table.remove(KEY) is None
    assert table.remove(RequestKey("r", 1)) is not None


def test_the_log_repeats_from_any_offset() -> None:
    log = OutputLog(ttl_s=60)
    log.open(KEY, gateway="g", offset=2)
    log.append(delta(2, 12, 13), 0.0)
    log.append(delta(4, 14, end=FinishReason.STOP), 1.0)
    state, told = log.since(KEY, 3)
    assert state is StreamState.ENDED
    assert told is not None
    assert (told.offset, told.token_ids, told.finish_reason) == (3, (13, 14), FinishReason.STOP)


def test_the_log_does_not_invent_what_was_before_it() -> None:
    log = OutputLog(ttl_s=60)
    log.open(KEY, gateway="g", offset=2)
    assert log.since(KEY, 1) == (StreamState.UNKNOWN, None)
    assert log.since(KEY, 2) == (StreamState.RUNNING, None)
    assert log.since(RequestKey("r", 1), 2) == (StreamState.UNKNOWN, None)


def test_tokens_known_from_the_trailer_are_not_doubled() -> None:
    log = OutputLog(ttl_s=60)
    log.open(KEY, gateway="g", offset=0)
    log.append(delta(0, 10), 0.0)
    log.append(delta(0, 10, 11), 0.0)
    _, told = log.since(KEY, 0)
    assert told is not None and told.token_ids == (10, 11)


def test_an_end_that_the_gateway_has_not_seen_is_told_again_without_tokens() -> None:
    log = OutputLog(ttl_s=60)
    log.open(KEY, gateway="g", offset=0)
    log.append(delta(0, 10, end=FinishReason.LENGTH), 0.0)
    _, told = log.since(KEY, 1)
    assert told is not None and told.token_ids == ()
    assert told.finish_reason is FinishReason.LENGTH


def test_ended_outputs_go_when_acknowledged_or_old_and_running_ones_stay() -> None:
    log = OutputLog(ttl_s=60)
    for name in "abc":
        log.open(RequestKey(name, 0), gateway="g", offset=0)
    log.close(RequestKey("a", 0), 0.0)
    log.close(RequestKey("b", 0), 50.0)
    log.expire(61.0)
    assert len(log) == 2
    log.discard([RequestKey("b", 0)])
    assert log.since(RequestKey("c", 0), 0) == (StreamState.RUNNING, None)
    assert len(log) == 1


def test_only_what_ended_here_counts_as_ended() -> None:
    log = OutputLog(ttl_s=60)
    for name in "ab":
        log.open(RequestKey(name, 0), gateway="g", offset=0)
    log.close(RequestKey("a", 0), 0.0)  # handed over: its end is somewhere else
    end = TokenDelta(
        request_id="b", attempt=0, offset=0, token_ids=(1,), finish_reason=FinishReason.STOP
    )
    log.append(end, 0.0)
    assert log.ended() == [(RequestKey("b", 0), "g")]
