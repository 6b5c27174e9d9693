"""What is said of a request at its end: times, and whether promises were kept."""

import pytest

from services.gateway.ended_request import EndedRequest
from services.gateway.generation import GenerationRequest
from shared.core.lifecycle import RequestState
from shared.core.request import FinishReason, SamplingParams, Slo

FINISHED, FAILED, CANCELLED = (
    RequestState.FINISHED,
    RequestState.FAILED,
    RequestState.CANCELLED,
)


def ended(
    state: RequestState = FINISHED,
    *,
    first: float | None = 10.2,
    last: float | None = 11.2,
    end: float = 11.25,
    num_tokens: int = 11,
    slo: Slo = Slo(),  # noqa: B008 (frozen)
) -> EndedRequest:
    return EndedRequest(
        request=GenerationRequest(
            request_id="r",
            index=0,
            model="m",
            prompt_token_ids=(1, 2),
            sampling=SamplingParams(max_tokens=20),
            slo=slo,
        ),
        state=state,
        num_attempts=1,
        num_cached_tokens=0,
        num_output_tokens=num_tokens,
        finish_reason=FinishReason.STOP if state is FINISHED else None,
        error=None,
        accepted_s=10.0,
        first_token_s=first,
        last_token_s=last,
        ended_s=end,
    )


def test_times_are_those_of_the_glossary() -> None:
    it = ended()
    assert it.ttft_s == pytest.approx(0.2)
    assert it.tpot_s == pytest.approx(0.1)
    assert it.e2e_s == pytest.approx(1.25)


def test_what_was_not_seen_has_no_time() -> None:
    nothing = ended(FAILED, first=None, last=None, num_tokens=0)
    assert (nothing.ttft_s, nothing.tpot_s) == (None, None)
    assert ended(num_tokens=1, last=10.2).tpot_s is None


def met(it: EndedRequest) -> tuple[bool | None, bool | None, bool | None]:
    return (it.is_ttft_met, it.is_tpot_met, it.is_e2e_met)


LOOSE = Slo(ttft_s=1, tpot_s=1, e2e_s=2)
TIGHT = Slo(ttft_s=0.1, tpot_s=0.05, e2e_s=1)


@pytest.mark.parametrize("state", [FINISHED, FAILED, CANCELLED])
def test_no_promise_is_neither_kept_nor_broken(state: RequestState) -> None:
    assert met(ended(state)) == (None, None, None)


def test_promises_of_an_answer_are_measured() -> None:
    assert met(ended(slo=LOOSE)) == (True, True, True)
    assert met(ended(slo=TIGHT)) == (False, False, False)
    assert met(ended(num_tokens=1, last=10.2, slo=LOOSE)) == (True, True, True)


def test_a_request_that_failed_kept_no_promise() -> None:
    assert met(ended(FAILED, slo=LOOSE)) == (False, False, False)


def test_of_a_request_that_was_given_up_only_what_could_be_seen_counts() -> None:
    assert met(ended(CANCELLED, slo=LOOSE)) == (True, True, None)
    assert met(ended(CANCELLED, slo=TIGHT)) == (False, False, False)
    early = ended(CANCELLED, first=None, last=None, num_tokens=0, end=10.05, slo=TIGHT)
    assert met(early) == (None, None, None)
    late = ended(CANCELLED, first=None, last=None, num_tokens=0, end=10.5, slo=TIGHT)
    assert met(late) == (False, None, None)
