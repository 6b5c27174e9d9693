"""What a request does to its logits before its token is chosen: masks, biases, penalties.

Only single entries change, so that a row costs what its entries cost, and one copy of it.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.core.request import SamplingParams
from shared.core.token_counts import TokenCounts


class SamplingRow(NamedTuple):
    """How to sample one row of logits.

    ``position`` is the index of the token among the request's output tokens; ``eos_token_ids``
    cannot be sampled below ``min_tokens``, nor can the request's stop tokens. ``token_counts`` are
    those of all its tokens so far; without them penalties have nothing to go by.
    """

    params: SamplingParams
    position: int
    eos_token_ids: frozenset[int]
    token_counts: TokenCounts | None = None

    @property
    def has_adjustments(self) -> bool:
        """Whether the choice is made from other logits than the model's."""
        params = self.params
        return (
            self.position < params.min_tokens
            or bool(params.logit_bias)
            or (params.has_penalties and self.token_counts is not None)
        )


PLAIN_ROW = SamplingRow(SamplingParams(max_tokens=1, temperature=0.0), 0, frozenset())
"""For every row whose request ``is_plain``."""


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device`` without waiting for what it still has to do."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def adjust(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Change ``scores`` ``[num_rows, vocab_size]`` fp32 in place, as ``rows`` ask for it.

    In this order: tokens forbidden below ``min_tokens``, ``logit_bias``, repetition penalty,
    frequency and presence penalty. Stop tokens and biases outside the vocabulary are passed over;
    tokens counted are inside.
    """
    vocab_size = scores.shape[-1]
    forbidden = [
        (index, token)
        for index, row in enumerate(rows)
        if row.position < row.params.min_tokens
        for token in row.eos_token_ids.union(row.params.stop_token_ids)
        if 0 <= token < vocab_size
    ]
    if forbidden:
        place = to_device(torch.tensor(forbidden), scores.device)
        scores.index_put_((place[:, 0], place[:, 1]), scores.new_full((), -torch.inf))
    biased = [(index, row.params) for index, row in enumerate(rows) if row.params.logit_bias]
    if biased:
        _bias(scores, biased)
    penalised = [
        (index, row.params, row.token_counts)
        for index, row in enumerate(rows)
        if row.params.has_penalties and row.token_counts is not None
    ]
    if penalised:
        _penalise(scores, penalised)


def _bias(scores: Tensor, biased: Sequence[tuple[int, SamplingParams]]) -> None:
    entries = []
    for row, params in biased:
        pairs = np.fromiter(chain.from_iterable(params.logit_bias), np.float64).reshape(-1, 2)
        pairs = pairs[(pairs[:, 0] >= 0) & (pairs[:, 0] < scores.shape[-1])]
        entries.append(np.insert(pairs, 0, row, axis=1))
    packed = to_device(torch.from_numpy(np.concatenate(entries)), scores.device)
    index, token = packed[:, 0].long(), packed[:, 1].long()
    scores[index, token] += packed[:, 2].to(scores.dtype)


def _penalise(scores: Tensor, penalised: Sequence[tuple[int, SamplingParams, TokenCounts]]) -> None:
    entries, penalties = [], []
    for number, (row, params, counts) in enumerate(penalised):
        block = np.empty((4, len(counts.token_ids)), np.int64)
        block[0], block[1] = number, row
        block[2] = np.frombuffer(counts.token_ids, np.int64)
        block[3] = np.frombuffer(counts.output_counts, np.int64)
        entries.append(block)
        penalties.append(
            (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        )
    packed = to_device(torch.from_numpy(np.concatenate(entries, axis=1)), scores.device)
    which, index, token, count = packed.unbind()
    values = to_device(torch.tensor(penalties, dtype=scores.dtype), scores.device)[which]
    repetition, frequency, presence = values.unbind(dim=1)
    old = scores[index, token]
    new = torch.where(old > 0, old / repetition, old * repetition)
    scores[index, token] = new - frequency * count - presence * (count > 0)
