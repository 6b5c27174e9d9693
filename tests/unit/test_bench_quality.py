"""The figures of ``bench.quality``, by hand."""

import math

import pytest
import torch

from bench.quality import Observed, common_prefix, compare, table


def observed(
    probabilities: list[float], best: list[int], generated: list[tuple[int, ...]]
) -> Observed:
    return Observed(
        logprobs=torch.tensor(probabilities).log(),
        best=torch.tensor(best),
        generated=tuple(generated),
        weight_bytes=3_000_000,
        kv_bytes_per_token=64,
    )


def test_figures_are_those_of_two_short_answers() -> None:
    reference = observed([0.5, 0.5, 0.5], [1, 2, 3], [(1, 2, 3, 4), (5, 6, 7, 8)])
    variant = observed([0.25, 0.5, 1.0], [1, 9, 3], [(1, 2, 9, 4), (9, 6, 7, 8)])
    row = compare("variant", variant, reference)
    assert row.perplexity == pytest.approx((0.25 * 0.5) ** (-1 / 3))
    assert math.isclose(row.perplexity_change, row.perplexity / 2 - 1, abs_tol=1e-6)
    assert row.top1_agreement == pytest.approx(2 / 3)
    assert row.greedy_agreement == 6 / 8
    assert row.mean_common_prefix_tokens == (2 + 0) / 2
    assert "| variant | 3.0 MB | 64 B | 2.000 | +0.00% | 66.7% | 75.0% | 1.0 |" in table([row])


@pytest.mark.parametrize(
    ("mine", "theirs", "length"), [((), (1,), 0), ((1, 2), (1, 2), 2), ((1, 2, 3), (1, 4, 3), 1)]
)
def test_the_common_prefix_ends_before_the_first_difference(
    mine: tuple[int, ...], theirs: tuple[int, ...], length: int
) -> None:
    assert common_prefix(mine, theirs) == length
