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
    ``uniform(seed, position)`` and picks by inversion of the cumulative distribution. Order: mask
    and ``min_tokens``, temperature, ``top_k``, ``top_p`` (of what is left); ``logprobs`` are of
    the distribution before any of these.
    """
    scores = _forbid(logits, rows, mask)
    best_scores, best = scores.max(dim=-1)
    is_valid = torch.isfinite(best_scores).tolist()
    chosen = best.clone()
    for index in _random_groups(rows, is_valid):
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


def _random_groups(rows: Sequence[SamplingRow], is_valid: Sequence[bool]) -> list[list[int]]:
    """Valid rows to be drawn at random, those cut the same way together."""
    groups: dict[tuple[int | None, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if is_valid[index] and not row.params.is_greedy:
            cut = (row.params.top_k, row.params.top_p < 1.0)
            groups.setdefault(cut, []).append(index)
    return list(groups.values())


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids ``[num_rows]``; all rows have the same ``top_k`` and use ``top_p`` or do not."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    # Relative to the best one, so that a tiny temperature cannot overflow.
    relative = scores.double() - scores.amax(dim=-1, keepdim=True)
    probs = torch.softmax(relative / column([row.params.temperature for row in rows]), dim=-1)
    target = column([uniform(row.params.seed, row.position) for row in rows])
    top_p = column([row.params.top_p for row in rows])
    top_k, vocab_size = rows[0].params.top_k, scores.shape[-1]
    if top_k is None and bool((top_p >= 1.0).all()):
        return _invert(probs, target)
    if top_k is not None:
        return _draw_from_top(probs, target, top_p, min(top_k, vocab_size), is_top_k=True)
    count = min(NUCLEUS_CANDIDATES, vocab_size)
    chosen = _draw_from_top(probs, target, top_p, count)
    is_wider = probs.topk(count, dim=-1).values.sum(dim=-1) < top_p[:, 0]
    if count < vocab_size and bool(is_wider.any()):
        chosen[is_wider] = _draw_from_top(
            probs[is_wider], target[is_wider], top_p[is_wider], vocab_size
        )
    return chosen


def _draw_from_top(
    probs: Tensor, target: Tensor, top_p: Tensor, count: int, *, is_top_k: bool = False
) -> Tensor:
    """Draw from the nucleus among the ``count`` most likely tokens.

    With ``is_top_k`` they are the whole distribution, of which ``top_p`` is a share.
    """
    candidates, ids = probs.topk(count, dim=-1)
    # Equal probabilities in the order of their ids, whatever order ``topk`` has left them in.
    ids, order = ids.sort(dim=-1)
    candidates, resorted = candidates.gather(1, order).sort(dim=-1, descending=True, stable=True)
    if is_top_k:
        candidates = candidates / candidates.sum(dim=-1, keepdim=True)
    index = _invert(_nucleus(candidates, top_p), target)
    return ids.gather(1, resorted).gather(1, index[:, None])[:, 0]


def _nucleus(candidates: Tensor, top_p: Tensor) -> Tensor:
    """Zero what lies behind the smallest set of most likely tokens that reaches ``top_p``."""
    before = candidates.cumsum(dim=-1) - candidates
    kept = (before < top_p) | (top_p >= 1.0)
    kept[:, 0] = True
    return candidates * kept


def _invert(weights: Tensor, target: Tensor) -> Tensor:
    """Index ``[num_rows]`` where the running sum of ``weights`` passes ``target`` of the whole."""
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
