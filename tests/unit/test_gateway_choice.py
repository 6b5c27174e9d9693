"""A choice shows text exactly once, ends where it should, and counts what was generated."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.choice import Choice, ChoiceDelta
from services.gateway.generation import TokenEvent
from services.gateway.tokenizer import Tokenizer
from shared.core.request import FinishReason, TokenLogprobs

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-chat"
END = 2


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_model_dir(MODEL)


def ids(text: str) -> list[int]:
    return tokenizer().encode_now(text, add_special_tokens=False)


def choice(**kwargs: Any) -> Choice:
    return Choice(index=0, detokenizer=tokenizer().detokenizer(), **kwargs)


def event(token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> TokenEvent:
    logprobs = tuple(TokenLogprobs(logprob=-float(token_id)) for token_id in token_ids)
    return TokenEvent(token_ids=tuple(token_ids), logprobs=logprobs, finish_reason=finish_reason)


def run(target: Choice, events: Sequence[TokenEvent]) -> list[ChoiceDelta]:
    deltas = []
    for one in events:
        deltas.append(target.feed(one))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text_of(deltas: Sequence[ChoiceDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def shown_ids(deltas: Sequence[ChoiceDelta]) -> list[int]:
    return [position.token_id for delta in deltas for position in delta.logprobs]


def test_the_stop_token_is_counted_but_not_shown() -> None:
    newline = ids("\n")
    assert len(newline) == 1
    target = choice(has_logprobs=True)
    deltas = run(target, [event(ids("Hi")), event(newline, FinishReason.STOP)])
    assert text_of(deltas) == "Hi"
    assert shown_ids(deltas) == ids("Hi")
    assert target.num_output_tokens == len(ids("Hi")) + 1


def test_the_last_token_of_a_full_length_is_shown() -> None:
    target = choice(has_logprobs=True)
    deltas = run(target, [event(ids("Hello there"), FinishReason.LENGTH)])
    assert text_of(deltas) == "Hello there"
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert shown_ids(deltas) == ids("Hello there")


def test_a_character_broken_off_by_the_length_is_shown_as_replaced() -> None:
    deltas = run(choice(), [event(ids("😀")[:-1], FinishReason.LENGTH)])
    assert text_of(deltas) == "�"


def test_a_stop_string_ends_the_choice_and_nothing_of_it_is_shown() -> None:
    words = ids("one two three four")
    target = choice(stop_strings=[" three"], has_logprobs=True)
    deltas = run(target, [event([token_id]) for token_id in words])
    assert text_of(deltas) == "one two"
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert tokenizer().decode(shown_ids(deltas)) == "one two"
    assert target.num_output_tokens == len(ids("one two three"))


def test_text_held_for_a_stop_string_comes_with_the_end() -> None:
    deltas = run(choice(stop_strings=["!!!"]), [event(ids("a!!")), event([END], FinishReason.STOP)])
    assert text_of(deltas) == "a!!"
    assert text_of(deltas[:1]) == "a"


def test_logprobs_wait_for_the_text_they_belong_to() -> None:
    token_ids = ids("a😀b")
    target = choice(has_logprobs=True)
    deltas = run(target, [event([t]) for t in token_ids] + [event([END], FinishReason.STOP)])
    for number in range(1, len(deltas) + 1):
        shown = shown_ids(deltas[:number])
        assert tokenizer().decode(shown) == text_of(deltas[:number])
    assert shown_ids(deltas) == token_ids
    offsets = [p.text_offset for delta in deltas for p in delta.logprobs]
    assert offsets == [0] + [1] * (len(token_ids) - 2) + [2]


def test_special_tokens_inside_have_logprobs_but_no_text() -> None:
    token_ids = [*ids("a"), END, END, *ids("b")]
    deltas = run(choice(has_logprobs=True), [event(token_ids, FinishReason.LENGTH)])
    assert text_of(deltas) == "ab"
    assert shown_ids(deltas) == token_ids


def test_a_stop_string_in_the_first_min_tokens_does_not_stop() -> None:
    words = ids("stop one stop two")
    target = choice(stop_strings=["stop"], min_tokens=len(ids("stop")))
    assert text_of(run(target, [event([t]) for t in words])) == "stop one "


def test_cached_tokens_are_remembered_whenever_they_come() -> None:
    target = choice()
    target.feed(TokenEvent(token_ids=(100,), num_cached_tokens=64))
    target.feed(TokenEvent(token_ids=(101,)))
    assert target.num_cached_tokens == 64


@given(
    token_ids=st.lists(st.integers(0, 8191), min_size=1, max_size=40),
    stops=st.lists(st.text("ab e\n", min_size=1, max_size=3), max_size=3),
    finish=st.sampled_from(FinishReason),
    data=st.data(),
)
def test_how_tokens_are_grouped_into_events_does_not_matter(
    token_ids: list[int], stops: list[str], finish: FinishReason, data: st.DataObject
) -> None:
    def outcome(cuts: list[int]) -> tuple[str, list[int], int, FinishReason | None]:
        bounds = [0, *cuts, len(token_ids)]
        groups = [token_ids[lo:hi] for lo, hi in pairwise(bounds)]
        events = [event(group) for group in groups[:-1]] + [event(groups[-1], finish)]
        target = choice(stop_strings=stops, has_logprobs=True)
        deltas = run(target, events)
        return (
            text_of(deltas),
            shown_ids(deltas),
            target.num_output_tokens,
            deltas[-1].finish_reason,
        )

    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids) - 1)))) if token_ids[1:] else []
    one_by_one = list(range(1, len(token_ids)))
    assert outcome(cuts) == outcome([]) == outcome(one_by_one)
    text = outcome([])[0]
    assert not any(stop in text for stop in stops)
