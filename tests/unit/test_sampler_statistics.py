"""Drawn tokens follow the distribution that the definitions of the parameters give."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shared.core.request import SamplingParams
from shared.core.token_counts import TokenCounts
from shared.engine.logit_adjustments import SamplingRow
from shared.engine.sampler import sample

NUM_DRAWS = {150: 8_000, 9_000: 800}
PROMPT = (3, 3, 11, 40)
OUTPUT = (5, 5, 5, 11, 60, 0)
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": -0.3}

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.9},
    {"top_k": 5},
    {"top_k": 40},
    {"top_k": 130, "temperature": 2.0},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.98, "temperature": 2.0},
    {"min_p": 0.2},
    {"min_p": 0.01},
    {"min_p": 1e-4, "temperature": 1.5},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.05, "top_k": 9, "top_p": 0.9, "temperature": 1.3},
    {"min_p": 0.01, "top_p": 0.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.5},
    {"logit_bias": ((7, 3.0), (0, -100.0), (120, 2.5))},
    {**PENALTIES, "temperature": 0.8},
    {**PENALTIES, "top_p": 0.9, "logit_bias": ((2, 1.0),), "temperature": 1.2},
]


def _logits(vocab_size: int) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    logits: list[float] = (torch.randn(vocab_size, generator=generator) * 2).tolist()
    # So that it shows what becomes of them.
    for token, logit in zip(
        sorted({*PROMPT, *OUTPUT}), (3.5, 3.0, 4.0, -1.0, 2.5, 3.2), strict=True
    ):
        logits[token] = logit
    return logits


def _distribution(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Token by token, as the docstrings define it."""
    scores = list(logits)
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in {*PROMPT, *OUTPUT}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(OUTPUT).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    best = max(scores)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    if params.top_k is not None:
        least = sorted(weights, reverse=True)[: params.top_k][-1]
        weights = [weight if weight >= least else 0.0 for weight in weights]
    by_weight = sorted(range(len(weights)), key=lambda token: -weights[token])
    share, kept, total = 0.0, set(), sum(weights)
    for token in by_weight:
        if share >= params.top_p * total:
            break
        kept.add(token)
        share += weights[token]
    weights = [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
    total = sum(weights)
    return [weight / total for weight in weights]


def _draws(logits: Sequence[float], params: SamplingParams) -> list[int]:
    counts = TokenCounts(PROMPT, len(PROMPT))
    counts.update(PROMPT + OUTPUT)
    num_draws = NUM_DRAWS[len(logits)]
    rows = [SamplingRow(params, i, frozenset(), counts) for i in range(num_draws)]
    drawn = sample(torch.tensor(logits).expand(num_draws, -1), rows)
    return [row.token_id for row in drawn]


def _chi_square(drawn: Sequence[int], expected: Sequence[float]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells of fewer than 5 draws go together."""
    counts = Counter(drawn)
    cells, rest = [], [0.0, 0.0]
    for token, probability in enumerate(expected):
        if probability * len(drawn) >= 5:
            cells.append((counts[token], probability * len(drawn)))
        else:
            rest[0] += counts[token]
            rest[1] += probability * len(drawn)
    if rest[1] >= 5:
        cells.append((int(rest[0]), rest[1]))
    return sum((seen - mean) ** 2 / mean for seen, mean in cells), max(1, len(cells) - 1)


def _limit(degrees: int) -> float:
    """What chi-square exceeds with a probability of 1e-4 (Wilson and Hilferty, 1931)."""
    ratio = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - ratio + 3.719 * math.sqrt(ratio)) ** 3


@pytest.mark.parametrize("vocab_size", NUM_DRAWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_distribution(case: dict[str, Any], vocab_size: int) -> None:
    params = SamplingParams(max_tokens=1, seed=17, **case)
    logits = _logits(vocab_size)
    expected = _distribution(logits, params)
    drawn = _draws(logits, params)
    assert all(expected[token] > 0 for token in drawn)
    statistic, degrees = _chi_square(drawn, expected)
    assert statistic < _limit(degrees)


@pytest.mark.parametrize(
    ("drawn_with", "expected_with"),
    [
        ({"temperature": 1.1}, {}),
        ({"top_p": 0.9}, {"top_p": 0.95}),
        ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.1}),
    ],
)
def test_the_statistic_tells_neighbouring_parameters_apart(
    drawn_with: dict[str, Any], expected_with: dict[str, Any]
) -> None:
    logits = _logits(150)
    drawn = _draws(logits, SamplingParams(max_tokens=1, seed=17, **drawn_with))
    expected = _distribution(logits, SamplingParams(max_tokens=1, **expected_with))
    statistic, degrees = _chi_square(drawn, expected)
    assert statistic > _limit(degrees)
