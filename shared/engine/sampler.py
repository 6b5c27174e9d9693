"""From logits to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.core.randomness import uniform
from shared.core.request import SamplingParams, TokenLogprobs

# Of the most likely tokens this many are looked at first for ``top_p``; a full sort of a large
# vocabulary costs more than a decode step.
NUCLEUS_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to sample one row of logits.

    ``position`` is the index of the token among the request's output tokens; ``eos_token_ids``
    cannot be sampled below ``min_tokens``, nor can the request's stop tokens.
    """

    params: SamplingParams
    position: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """The token of one row, or why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@torch.inference_mode()
def sample(
    logits: Tensor, rows: Sequence[SamplingRow], *, mask: Tensor | None = None
) -> list[SampledRow]:
    """Choose one token a row of ``logits`` ``[num_rows, vocab_size]`` fp32 (left unchanged).

    ``mask`` (bool, same shape) is ``True`` where a token is allowed. A row's result depends on its
    own logits, parameters and position only, not on the other rows: the random number is
    ``uniform(seed, position)`` and picks by inversion of the cumulative distribution. Order:
    mask and ``min_tokens``, temperature, ``top_k``, ``top_p`` (of what is left); ``logprobs`` are of the
    distribution before any of these.
    """
    scores = _forbid(logits, rows, mask)
    best_scores, best = scores.max(dim=-1)
    is_valid = torch.isfinite(best_scores).tolist()
    chosen = best.clone()
    for index in _random_groups(rows):
        group = torch.tensor(index, device=logits.device)
        chosen[group] = _draw(scores[group], [rows[i] for i in index])
    logprobs = _logprobs(logits, chosen, rows)
    return [
        SampledRow(token, logprobs.get(i))
        if is_valid[i]
        else SampledRow(token, error="the logits are not finite or no token is allowed")
        for i, token in enumerate(chosen.tolist())
    ]


def _forbid(logits: Tensor, rows: Sequence[SamplingRow], mask: Tensor | None) -> Tensor:
    scores = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    banned = [
        (i, token)
        for i, row in enumerate(rows)
        if row.position < row.params.min_tokens
        for token in row.eos_token_ids.union(row.params.stop_token_ids)
        if 0 <= token < logits.shape[-1]
    ]
    if banned:
        scores = scores.clone() if scores is logits else scores
        index = torch.tensor(banned, device=logits.device)
        scores[index[:, 0], index[:, 1]] = -torch.inf
    return scores


def _random_groups(rows: Sequence[SamplingRow]) -> list[list[int]]:
    """Rows to be drawn at random, those cut the same way together."""
    groups: dict[tuple[int | None, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if not row.params.is_greedy:
            cut = (row.params.top_k, row.params.top_p < 1.0)
            groups.setdefault(cut, []).append(index)
    return list(groups.values())


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids ``[num_rows]``; all rows have the same ``top_k`` and use ``top_p`` or do not."""
    device = scores.device
    temperature = [row.params.temperature for row in rows]
    scaled = (
        scores.double() / torch.tensor(temperature, dtype=torch.float64, device=device)[:, None]
    )
    # Large scores over a tiny temperature stay finite.
    probs = torch.softmax(scaled - scaled.amax(dim=-1, keepdim=True), dim=-1)
    random = [uniform(row.params.seed, row.position) for row in rows]
    target = torch.tensor(random, dtype=torch.float64, device=device)[:, None]
    top_k, top_p = rows[0].params.top_k, [row.params.top_p for row in rows]
    if top_k is None and min(top_p) >= 1.0:
        return _invert(probs, target)
    vocab_size = scores.shape[-1]
    limit = torch.tensor(top_p, dtype=torch.float64, device=device)[:, None]
    count = min(vocab_size, top_k or NUCLEUS_CANDIDATES)
    candidates, ids = probs.topk(count, dim=-1)
    if top_k is None:
        is_short = bool((candidates.sum(dim=-1, keepdim=True) < limit).any())
        if is_short and count < vocab_size:
            candidates, ids = probs.topk(vocab_size, dim=-1)
    return ids.gather(1, _invert(_nucleus(candidates, limit, top_k is not None), target)[:, None])[
        :, 0
    ]


def _nucleus(candidates: Tensor, top_p: Tensor, renormalise: bool) -> Tensor:
    """Zero what lies behind the smallest set of most likely tokens that reaches ``top_p``."""
    if renormalise:
        candidates = candidates / candidates.sum(dim=-1, keepdim=True)
    before = candidates.cumsum(dim=-1) - candidates
    kept = (before < top_p) | (top_p >= 1.0)
    kept[:, 0] = True
    return candidates * kept


def _invert(weights: Tensor, target: Tensor) -> Tensor:
    """Index ``[num_rows]`` at which the running sum of ``weights`` passes ``target`` of the whole."""
    running = weights.cumsum(dim=-1)
    total = running[:, -1:].contiguous()
    index = torch.searchsorted(running, target * total, right=True)
    # Rounding may lift the target onto the total: then take the last token with any weight.
    last = torch.searchsorted(running, total, right=False)
    return torch.minimum(index, last)[:, 0]


def _logprobs(
    logits: Tensor, chosen: Tensor, rows: Sequence[SamplingRow]
) -> dict[int, TokenLogprobs]:
    counts = {
        i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None
    }
    if not counts:
        return {}
    index = torch.tensor(list(counts), device=logits.device)
    distribution = torch.log_softmax(logits[index], dim=-1)
    own = distribution.gather(1, chosen[index, None])[:, 0].tolist()
    most = min(max(counts.values()), logits.shape[-1])
    top, ids = distribution.topk(most, dim=-1)
    return {
        i: TokenLogprobs(
            logprob=own[row],
            top_ids=tuple(ids[row, :count].tolist()),
            top_logprobs=tuple(top[row, :count].tolist()),
        )
        for row, (i, count) in enumerate(counts.items())
    }
