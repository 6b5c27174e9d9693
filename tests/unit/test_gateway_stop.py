"""Stop strings end the text at the same place however it is cut into pieces."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.stop import StopMatcher, StopScan


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        scan = matcher.feed(piece)
        shown += scan.text
        if scan.is_stopped:
            return shown, True
    return shown + matcher.flush(), False


def test_the_stop_string_and_what_follows_is_dropped() -> None:
    assert run(["END"], ["one END two"]) == ("one ", True)


def test_a_stop_string_over_three_pieces_is_never_shown_in_part() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("go S") == StopScan("go ")
    assert matcher.feed("TO") == StopScan("")
    assert matcher.feed("P!") == StopScan("", is_stopped=True)


def test_what_turns_out_to_be_none_is_shown_late() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("ST") == StopScan("")
    assert matcher.feed("ICK") == StopScan("STICK")
    assert matcher.flush() == ""


def test_the_end_of_the_text_releases_what_was_held() -> None:
    assert run(["\n\n"], ["a", "\n"]) == ("a\n", False)


def test_the_string_completed_first_wins_and_among_those_the_longest() -> None:
    assert run(["abcd", "bc"], ["abcd"]) == ("a", True)
    assert run(["c", "abc"], ["xabc"]) == ("x", True)


def test_a_failed_begin_can_contain_the_real_one() -> None:
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", True)


def test_skipped_text_cannot_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("E") == StopScan("")
    assert matcher.skip("ND") == "END"
    assert matcher.feed("END").is_stopped


def test_without_stop_strings_everything_passes() -> None:
    assert run([], ["any", "thing"]) == ("anything", False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    text=st.text("abc", max_size=30),
    data=st.data(),
)
def test_the_cut_into_pieces_does_not_matter(
    stops: list[str], text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    bounds = [0, *cuts, len(text)]
    pieces = [text[lo:hi] for lo, hi in pairwise(bounds)]
    ends = sorted(
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if end >= len(stop) and text[:end].endswith(stop)
    )
    expected = (text[: ends[0][1]], True) if ends else (text, False)
    assert run(stops, pieces) == expected
