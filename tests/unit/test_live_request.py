"""The gateway's record of one request: each token once, in order, one terminal state."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.live_request import LiveRequest
from shared.core.lifecycle import RequestEvent, RequestState
from shared.core.request import FinishReason, Request, SamplingParams, TokenLogprobs
from shared.errors import LifecycleError
from shared.messages.tokens import TokenDelta


def live_request(num_output: int = 0) -> LiveRequest:
    request = Request(
        request_id="r",
        attempt=0,
        prompt_token_ids=(1, 2, 3),
        output_token_ids=tuple(range(num_output)),
        sampling=SamplingParams(max_tokens=64),
    )
    live = LiveRequest(request, accepted_s=0.0)
    live.on_accepted(0.0)
    return live


def delta(offset: int, *token_ids: int, attempt: int = 0, **more: object) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        attempt=attempt,
        offset=offset,
        token_ids=token_ids,
        **more,  # type: ignore[arg-type]
    )


def test_tokens_in_order_pass_and_the_end_is_terminal() -> None:
    live = live_request()
    live.on_placed(0, ("d", "p"), 0.1)
    assert live.on_delta(delta(0, 10), 0.2).token_ids == (10,)
    last = live.on_delta(delta(1, 11, 12, finish_reason=FinishReason.STOP), 0.3)
    assert last.token_ids == (11, 12)
    assert last.finish_reason is FinishReason.STOP
    assert live.state is RequestState.FINISHED
    assert live.on_delta(delta(3, 13), 0.4).is_stale


def test_tokens_behind_a_gap_wait_until_it_is_filled() -> None:
    live = live_request()
    early = live.on_delta(delta(2, 12, finish_reason=FinishReason.LENGTH), 0.1)
    assert early.has_gap and early.token_ids == ()
    assert not live.is_terminal
    filled = live.on_delta(delta(0, 10, 11), 0.2)
    assert filled.token_ids == (10, 11, 12)
    assert filled.finish_reason is FinishReason.LENGTH


def test_an_end_that_overtakes_the_tokens_before_it_does_not_end_the_request() -> None:
    live = live_request()
    assert live.on_delta(delta(1, 11, finish_reason=FinishReason.STOP), 0.1).finish_reason is None
    assert live.on_delta(delta(0, 10), 0.2).finish_reason is FinishReason.STOP


def test_repeated_tokens_are_skipped_with_their_logprobs() -> None:
    live = live_request()
    probs = tuple(TokenLogprobs(logprob=-float(i)) for i in range(3))
    assert live.on_delta(delta(0, 10, 11, logprobs=probs[:2]), 0.1).logprobs == probs[:2]
    again = live.on_delta(delta(0, 10, 11, 12, logprobs=probs), 0.2)
    assert again.token_ids == (12,)
    assert again.logprobs == probs[2:]


def test_the_next_attempt_goes_on_from_what_was_emitted_and_the_old_one_is_stale() -> None:
    live = live_request()
    live.on_delta(delta(0, 10, 11), 0.1)
    live.on_delta(delta(5, 15), 0.2)
    assert live.on_lost(0, 0.0)
    assert live.request().attempt == 1
    assert live.request().output_token_ids == (10, 11)
    assert not live.has_gap
    assert live.on_delta(delta(2, 99), 0.3).is_stale
    assert live.on_delta(delta(2, 12, attempt=1), 0.4).token_ids == (12,)


def test_an_attempt_is_lost_once() -> None:
    live = live_request()
    assert live.on_lost(0, 0.0)
    assert not live.on_lost(0, 0.0)
    live.lifecycle.apply(RequestEvent.CANCEL)
    assert not live.on_lost(1, 0.0)


def test_news_about_an_old_attempt_do_not_change_the_instances() -> None:
    live = live_request()
    live.on_lost(0, 0.0)
    live.on_placed(0, ("gone",), 0.1)
    assert not live.instances
    live.on_placed(1, ("d",), 0.2)
    assert live.instances == ("d",)


def test_an_illegal_event_raises() -> None:
    live = live_request()
    live.lifecycle.apply(RequestEvent.FAIL)
    with pytest.raises(LifecycleError, match="finish is not allowed in state failed"):
        live.lifecycle.apply(RequestEvent.FINISH)


@settings(max_examples=200)
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_any_order_with_repeats_gives_each_token_once(num_tokens: int, seed: int) -> None:
    shuffled = random.Random(seed)
    tokens = list(range(100, 100 + num_tokens))
    deltas = []
    for _ in range(3):  # three instances tell the story in pieces of their own
        at = 0
        while at < num_tokens:
            upto = min(num_tokens, at + shuffled.randint(1, 5))
            end = FinishReason.LENGTH if upto == num_tokens else None
            deltas.append(delta(at, *tokens[at:upto], finish_reason=end))
            at = upto
    shuffled.shuffle(deltas)
    live = live_request()
    seen: list[int] = []
    ends = 0
    for item in deltas:
        progress = live.on_delta(item, 0.0)
        seen += progress.token_ids
        ends += progress.finish_reason is not None
    assert seen == tokens
    assert ends == 1
    assert live.state is RequestState.FINISHED
