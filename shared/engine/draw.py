"""Draws tokens by inversion: from a distribution over the vocabulary, or what is left of it.

Every cut (``min_p``, ``top_k``, ``top_p``) is a threshold on the probability, found from the most
likely token downwards: what is as likely as the last token kept is kept too, so that no order
among equals matters. Tokens are drawn in the order of their ids.

There are two ways to the same token. ``_draw_dense`` works on whole rows and never asks the device
for a value. On a CPU ``_draw_narrow`` looks at the likeliest tokens only, which is many times
faster there and mostly enough; rows for which it is not go the other way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from shared.core.randomness import uniform
from shared.core.request import SamplingParams
from shared.engine.logit_adjustments import SamplingRow, to_device

MIN_CANDIDATES, MAX_CANDIDATES = 64, 1024
"""So many of the likeliest tokens are looked at first, depending on ``top_k``."""

_SEARCH_BLOCK = 64
_SUM_BLOCK = 128


class _Cut(Enum):
    """What has to be known of a row to cut it."""

    NONE = auto()
    FLOOR = auto()
    """``min_p`` alone: nothing."""
    RANK = auto()
    """``top_k``, or ``top_p`` of what other cuts leave: the likeliest tokens."""
    SHARE = auto()
    """``top_p`` alone: the likeliest tokens and the mass of all."""


@dataclass(frozen=True, slots=True)
class _Columns:
    """Parameters of some rows, ``[num_rows, 1]`` each, on the device of their scores.

    A cut that is not asked for is 0 (``min_p``), the vocabulary (``top_k``), infinite (``top_p``);
    ``inverse_temperature`` is there unless all are 1. ``target`` is the random number.
    """

    best: Tensor
    inverse_temperature: Tensor | None
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    target: Tensor


def draw(
    scores: Tensor,
    best: Tensor,
    rows: Sequence[SamplingRow],
    wanted: Sequence[int],
    token_ids: Tensor,
    *,
    is_narrow_first: bool,
) -> None:
    """Put one drawn token into ``token_ids`` ``[num_rows]`` for each ``wanted`` row.

    ``scores`` ``[num_rows, vocab_size]`` fp32 are only read; ``best`` ``[num_rows]`` are the
    highest ones. A row without a finite one gets any token of the vocabulary.
    ``is_narrow_first`` is for a CPU.
    """
    groups: dict[tuple[_Cut, int], list[int]] = {}
    for i in wanted:
        cut, num_candidates = _way(rows[i].params, scores.shape[-1])
        key = cut, num_candidates if is_narrow_first else 0
        groups.setdefault(key, []).append(i)
    for (cut, num_candidates), index in groups.items():
        if cut is not _Cut.NONE and is_narrow_first:
            columns = _columns(best, rows, index, scores.shape[-1])
            chosen = _select(scores, index)
            tokens, is_done = _draw_narrow(chosen, columns, cut, num_candidates)
            token_ids[index] = tokens
            index = [i for i, done in zip(index, is_done, strict=True) if not done]
        if index:
            columns = _columns(best, rows, index, scores.shape[-1])
            place = to_device(torch.tensor(index), scores.device)
            token_ids[place] = _draw_dense(_select(scores, index), columns, cut)


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest scores of each row, best first, equal ones by id, and their ids.

    Both ``[num_rows, min(count, vocab_size)]``.
    """
    # Looking for more than are wanted, and mostly for equally many, keeps it from depending on
    # ``count`` which of the tokens equal to the last one are taken.
    num_searched = min(max(MIN_CANDIDATES, 1 << count.bit_length()), scores.shape[-1])
    if scores.device.type == "cpu":
        values, ids = _search(scores, num_searched)
    else:
        values, ids = scores.topk(num_searched, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids.gather(1, order)[:, :count]


def log_mass(scores: Tensor, best: Tensor) -> Tensor:
    """``log(sum(exp(scores)))`` ``[num_rows, 1]`` fp64; ``best`` ``[num_rows, 1]``."""
    sums = _block_sums(torch.sub(scores, best).exp_()).sum(dim=-1, keepdim=True)
    return best.double() + sums.log()


def _way(params: SamplingParams, vocab_size: int) -> tuple[_Cut, int]:
    """What to know, and how many of the likeliest tokens to look at first."""
    if params.top_k is not None and params.top_k < vocab_size:
        # One more shows whether others are as likely as the last one kept.
        count = 1 << params.top_k.bit_length()
        return _Cut.RANK, min(max(count, MIN_CANDIDATES), MAX_CANDIDATES)
    if params.top_p < 1.0:
        return _Cut.RANK if params.min_p > 0.0 else _Cut.SHARE, MIN_CANDIDATES
    return _Cut.FLOOR if params.min_p > 0.0 else _Cut.NONE, MIN_CANDIDATES


def _select(scores: Tensor, index: Sequence[int]) -> Tensor:
    """Some rows, without a copy if they lie together."""
    first, last = index[0], index[-1]
    if list(index) == list(range(first, last + 1)):
        return scores[first : last + 1]
    return scores.index_select(0, to_device(torch.tensor(index), scores.device))


def _columns(
    best: Tensor, rows: Sequence[SamplingRow], index: Sequence[int], vocab_size: int
) -> _Columns:
    packed = []
    for i in index:
        params, position = rows[i].params, rows[i].position
        packed.append(
            (
                i,
                1.0 / params.temperature,
                params.min_p,
                min(params.top_k or vocab_size, vocab_size),
                params.top_p if params.top_p < 1.0 else torch.inf,
                uniform(params.seed, position),
            )
        )
    is_scaled = any(rows[i].params.temperature != 1.0 for i in index)
    columns = to_device(torch.tensor(packed, dtype=torch.float64), best.device)
    return _Columns(
        best=best[columns[:, :1].long()],
        inverse_temperature=columns[:, 1:2].to(best.dtype) if is_scaled else None,
        min_p=columns[:, 2:3].to(best.dtype),
        top_k=columns[:, 3:4].long(),
        top_p=columns[:, 4:5],
        target=columns[:, 5:],
    )


def _draw_dense(scores: Tensor, columns: _Columns, cut: _Cut) -> Tensor:
    """Token ids ``[num_rows]``; works on any device without waiting for it."""
    weights = _weights(scores, columns)
    if cut is not _Cut.NONE:
        threshold = columns.min_p
        if cut is not _Cut.FLOOR:
            threshold = _threshold(_descending(weights), columns, None)[1]
        weights.masked_fill_(weights < threshold, 0.0)
    return _locate(weights, columns.target, None, is_passed=True)[:, 0]


def _draw_narrow(
    scores: Tensor, columns: _Columns, cut: _Cut, num_candidates: int
) -> tuple[Tensor, Sequence[bool]]:
    """Token ids ``[num_rows]`` by the likeliest tokens, and whether these were all that is kept.

    Only a bare ``top_p`` needs the mass of the whole vocabulary: what other cuts leave is known
    without looking at everything.
    """
    vocab_size = scores.shape[-1]
    found, ids = _search(scores, min(num_candidates, vocab_size))
    ids, order = ids.sort(dim=-1)
    weights = _weights(found.gather(1, order), columns)
    ordered = weights.sort(dim=-1, descending=True).values
    is_share = cut is _Cut.SHARE
    mass = _block_sums(_weights(scores, columns)).sum(dim=-1, keepdim=True) if is_share else None
    first, threshold = _threshold(ordered, columns, mass)
    # The tokens that were not looked at are no likelier than the last one that was.
    last = ordered[:, -1:]
    is_done = last < (threshold if is_share else first)
    is_done |= (last == 0.0) | (ordered.shape[-1] == vocab_size)
    weights.masked_fill_(weights < threshold, 0.0)
    index = _locate(weights, columns.target, None, is_passed=True)
    return ids.gather(1, index)[:, 0], is_done[:, 0].tolist()


def _weights(scores: Tensor, columns: _Columns) -> Tensor:
    """Probabilities as multiples of the best one; so no temperature can overflow them."""
    weights = torch.sub(scores, columns.best)
    if columns.inverse_temperature is not None:
        weights.mul_(columns.inverse_temperature)
    return weights.exp_()


def _threshold(ordered: Tensor, columns: _Columns, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least weights ``[num_rows, 1]`` kept: by ``min_p`` and ``top_k``, and by ``top_p`` too.

    ``ordered`` are the highest weights, falling. ``top_p`` is a share of ``mass``, by default of
    what the other cuts leave of ``ordered``.
    """
    num_ordered = ordered.shape[-1]
    kth = ordered.gather(1, columns.top_k.clamp(max=num_ordered) - 1)
    first = torch.maximum(columns.min_p, kth.where(columns.top_k <= num_ordered, 0.0))
    kept = ordered.masked_fill(ordered < first, 0.0)
    last = _locate(kept, columns.top_p, mass, is_passed=False)
    return first, torch.maximum(first, ordered.gather(1, last))


def _descending(weights: Tensor) -> Tensor:
    if weights.device.type == "cpu":  # numpy sorts with vector instructions, torch does not
        return torch.from_numpy(np.sort(weights.numpy(), axis=-1)).flip(-1)
    return weights.sort(dim=-1, descending=True).values


def _search(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest scores and their ids ``[num_rows, count]`` in any order, on a CPU.

    The highest lie in the blocks with the highest maxima, which are much fewer.
    """
    num_rows, vocab_size = scores.shape
    num_blocks = vocab_size // _SEARCH_BLOCK
    if num_blocks <= 2 * count:
        ids = _highest(scores, count)
        return scores.gather(1, ids), ids
    end = num_blocks * _SEARCH_BLOCK
    blocks = scores[:, :end].view(num_rows, num_blocks, _SEARCH_BLOCK)
    kept = _highest(blocks.amax(dim=-1), count)
    values = blocks[torch.arange(num_rows)[:, None], kept].flatten(1)
    if end < vocab_size:
        values = torch.cat((values, scores[:, end:]), dim=1)
    found = _highest(values, count)
    block, offset = found // _SEARCH_BLOCK, found % _SEARCH_BLOCK
    ids = kept.gather(1, block.clamp(max=count - 1)) * _SEARCH_BLOCK + offset
    # What lies behind the kept blocks is the rest of the vocabulary, less than a block.
    ids = ids.where(block < count, end + offset)
    return values.gather(1, found), ids


def _highest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest values of each row are, in any order."""
    if count == values.shape[-1]:
        return torch.arange(count).expand(len(values), -1)
    places = np.argpartition(values.numpy(), values.shape[-1] - count, axis=-1)
    return torch.from_numpy(places[:, -count:])


def _block_sums(weights: Tensor) -> Tensor:
    """Sums of ``_SUM_BLOCK`` consecutive weights, the last ones maybe of fewer, fp64."""
    num_blocks, rest = divmod(weights.shape[-1], _SUM_BLOCK)
    end = num_blocks * _SUM_BLOCK
    sums = weights[:, :end].view(len(weights), num_blocks, _SUM_BLOCK).sum(dim=-1)
    if rest:
        sums = torch.cat((sums, weights[:, end:].sum(dim=-1, keepdim=True)), dim=1)
    return sums.double()


def _locate(weights: Tensor, share: Tensor, mass: Tensor | None, *, is_passed: bool) -> Tensor:
    """First index ``[num_rows, 1]`` where the running sum reaches ``share`` of ``mass``.

    With ``is_passed`` it must be above it. ``mass`` is the sum of ``weights`` unless given. What is
    never reached, for want of mass or by rounding, gives the last index with any weight.

    Blocks are summed in fp32: that moves a border between two tokens by some 1e-7 of a
    probability, far less than draws could show.
    """
    is_short = weights.shape[-1] <= _SUM_BLOCK
    sums = weights.double() if is_short else _block_sums(weights)
    running = sums.cumsum(dim=-1)
    goal = share * (running[:, -1:] if mass is None else mass)
    if is_short:
        return _first(running, goal, is_passed)
    block = _first(running, goal, is_passed)
    rest = (goal - (running.gather(1, block) - sums.gather(1, block))).clamp(min=0.0)
    index = block * _SUM_BLOCK + torch.arange(_SUM_BLOCK, device=weights.device)
    members = weights.gather(1, index.clamp(max=weights.shape[-1] - 1)).double()
    members.masked_fill_(index >= weights.shape[-1], 0.0)
    return index.gather(1, _first(members.cumsum(dim=-1), rest, is_passed))


def _first(running: Tensor, goal: Tensor, is_passed: bool) -> Tensor:
    found = torch.searchsorted(running, goal, right=is_passed)
    last = torch.searchsorted(running, running[:, -1:].contiguous())
    return torch.minimum(found, last).clamp(max=running.shape[-1] - 1)
