"""The sampler against the logits processors of transformers, token by token."""

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared.core.randomness import uniform
from shared.core.request import SamplingParams
from shared.core.token_counts import TokenCounts
from shared.engine.logit_adjustments import SamplingRow
from shared.engine.sampler import sample

NUM_ROWS = 64

CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 0.6},
    {"min_p": 0.02},
    {"min_p": 0.3, "temperature": 1.7},
    {"top_p": 0.4},
    {"top_p": 0.95, "temperature": 1.4},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 1000, "temperature": 2.0},
    {"top_k": 50, "top_p": 0.9},
    {"logit_bias": ((3, 4.0), (70, -100.0))},
    {
        "logit_bias": ((3, 4.0), (9, -2.0)),
        "repetition_penalty": 1.2,
        "temperature": 0.8,
        "min_p": 0.01,
        "top_k": 40,
        "top_p": 0.9,
    },
]


def _processors(params: SamplingParams) -> LogitsProcessorList:
    """Those that are asked for, in the sampler's order."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(
            SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias])
        )
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k is not None:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    return processors


@pytest.mark.parametrize("vocab_size", [100, 5_003])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_those_of_transformers_processors(case: dict[str, Any], vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    scales = torch.linspace(0.5, 5.0, NUM_ROWS)[:, None]
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * scales
    token_ids = torch.randint(0, vocab_size, (NUM_ROWS, 80), generator=generator)
    token_ids[:, 40:] = logits.topk(40).indices  # where a penalty shows
    rows = []
    for position, tokens in enumerate(token_ids.tolist()):
        counts = TokenCounts(tokens[:50], 50)
        counts.update(tokens)
        params = SamplingParams(max_tokens=1, seed=3, **case)
        rows.append(SamplingRow(params, position, frozenset(), counts))

    processors: Any = _processors(rows[0].params)
    scores = processors(token_ids, logits)
    running = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
    targets = torch.tensor([uniform(3, i) for i in range(NUM_ROWS)], dtype=torch.float64)
    goals = targets[:, None] * running[:, -1:]
    expected = torch.searchsorted(running, goals, right=True)[:, 0]
    assert [row.token_id for row in sample(logits, rows)] == expected.tolist()

    greedy = [
        SamplingRow(
            SamplingParams(max_tokens=1, **(case | {"temperature": 0.0})), 0, frozenset(), each
        )
        for each in (row.token_counts for row in rows)
    ]
    assert [row.token_id for row in sample(logits, greedy)] == scores.argmax(dim=-1).tolist()
