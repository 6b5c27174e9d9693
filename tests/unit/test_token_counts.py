from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shared.core.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 9), max_size=12)


def _expected(listed: Sequence[int], output: Sequence[int]) -> dict[int, int]:
    return dict.fromkeys(listed, 0) | Counter(output)


def _counted(counts: TokenCounts) -> dict[int, int]:
    assert len(set(counts.token_ids)) == len(counts.token_ids) == len(counts.output_counts)
    return dict(zip(counts.token_ids, counts.output_counts, strict=True))


@given(TOKENS, st.lists(TOKENS, max_size=6), st.booleans())
def test_counts_grow_with_the_output(
    prompt: list[int], pieces: list[list[int]], is_listing_prompt: bool
) -> None:
    listed = prompt if is_listing_prompt else []
    counts = TokenCounts(listed, len(prompt))
    output: list[int] = []
    for piece in pieces:
        output += piece
        counts.update([*prompt, *output])
        assert _counted(counts) == _expected(listed, output)


@given(TOKENS, TOKENS, TOKENS, st.integers(0, 12))
def test_tokens_taken_back_do_not_count(
    prompt: list[int], output: list[int], other: list[int], num_kept: int
) -> None:
    counts = TokenCounts(prompt, len(prompt))
    counts.update([*prompt, *output])
    kept = output[:num_kept]
    counts.update([*prompt, *kept])
    assert _counted(counts) == _expected(prompt, kept)
    counts.update([*prompt, *kept, *other])
    assert _counted(counts) == _expected(prompt, kept + other)
