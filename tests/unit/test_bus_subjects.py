"""Which pattern stands for which subject."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.subjects import check_pattern, check_subject, matches


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*.>", "a", False),
    ],
)
def test_matches(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected


TOKENS = st.sampled_from(["a", "b", "*"])


@given(st.lists(TOKENS, min_size=1, max_size=4), st.booleans(), st.lists(TOKENS, min_size=1))
def test_matches_agrees_with_a_regular_expression(
    tokens: list[str], has_tail: bool, subject_tokens: list[str]
) -> None:
    pattern = ".".join([*tokens, ">"] if has_tail else tokens)
    check_pattern(pattern)
    subject = ".".join(token.replace("*", "c") for token in subject_tokens)
    expression = r"\.".join(r"[^.]+" if token == "*" else token for token in tokens)
    if has_tail:
        expression += r"\..+"
    assert matches(pattern, subject) is (re.fullmatch(expression, subject) is not None)


@pytest.mark.parametrize("subject", ["", ".", "a.", "a b", "a\n"])
def test_what_is_no_subject(subject: str) -> None:
    with pytest.raises(ValueError, match="not a subject"):
        check_subject(subject)


@pytest.mark.parametrize("pattern", ["a.>.b", "a>", "*a"])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match="wildcard"):
        check_pattern(pattern)
