"""From logits to tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared.core.request import TokenLogprobs
from shared.engine.draw import draw, likeliest, log_mass
from shared.engine.kernels import argmax
from shared.engine.logit_adjustments import SamplingRow, adjust, to_device

__all__ = [
    "NOTHING_TO_SAMPLE",
    "SampledBatch",
    "SampledColumns",
    "SampledRow",
    "SamplingRow",
    "sample",
    "sample_on_device",
]


ArgMax = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``LayerKernels.argmax``."""

NOTHING_TO_SAMPLE = "the logits are not finite or no token is allowed"


class SampledRow(NamedTuple):
    """The token of one row, or why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class SampledColumns(NamedTuple):
    """What was sampled, on the host.

    ``token_ids`` mean something where ``is_valid``; ``logprobs`` has the rows that asked for them.
    """

    token_ids: list[int]
    is_valid: list[bool]
    logprobs: dict[int, TokenLogprobs]

    def rows(self) -> list[SampledRow]:
        """The same row by row."""
        return [
            SampledRow(token_id, self.logprobs.get(row), None if is_valid else NOTHING_TO_SAMPLE)
            for row, (token_id, is_valid) in enumerate(
                zip(self.token_ids, self.is_valid, strict=True)
            )
        ]


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """What was sampled, still on the device.

    ``token_ids`` ``[num_rows]`` int64 are always in the vocabulary, so that the next step can be
    started with them; ``is_valid`` ``[num_rows]`` says which were chosen from something.
    ``logprobs`` ``[num_asking, 1 + 2 * most]`` fp64: the token's, the best ones', their ids;
    ``num_logprobs`` says which rows these are, and how many best ones each asked for.
    """

    token_ids: Tensor
    is_valid: Tensor
    logprobs: Tensor | None
    num_logprobs: dict[int, int]

    def fetch(self) -> SampledColumns:
        """Everything on the host; waits for the device."""
        logprobs = {}
        if self.logprobs is not None:
            for values, (row, count) in zip(
                self.logprobs.tolist(), self.num_logprobs.items(), strict=True
            ):
                logprobs[row] = _token_logprobs(values, count)
        return SampledColumns(self.token_ids.tolist(), self.is_valid.tolist(), logprobs)


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], *, mask: Tensor | None = None
) -> list[SampledRow]:
    """``sample_on_device``, brought back to the host."""
    return sample_on_device(logits, rows, mask=mask).fetch().rows()


@torch.inference_mode()
def sample_on_device(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    *,
    mask: Tensor | None = None,
    find_best: ArgMax = argmax,
) -> SampledBatch:
    """Choose one token a row of ``logits`` ``[num_rows, vocab_size]`` fp32 (left unchanged).

    ``mask`` (bool, same shape) is ``True`` where a token is allowed. A row's result depends on its
    own logits, parameters, tokens and position only, not on the other rows: the random number is
    ``uniform(seed, position)`` and picks by inversion of the cumulative distribution.

    The order is vLLM's: ``mask``, ``min_tokens``, ``logit_bias``, ``repetition_penalty``,
    ``frequency_penalty`` and ``presence_penalty``; if not greedy, ``temperature``, ``min_p``,
    ``top_k`` and ``top_p`` (of what is left by then). ``logprobs`` are of the distribution before
    any of these. Unlike there, tokens as likely as the last one that ``top_p`` keeps are kept too.

    Nothing here waits for the device, except where it is a CPU and waiting costs nothing.
    """
    adjusted = [i for i, row in enumerate(rows) if mask is not None or row.has_adjustments]
    if len(adjusted) == len(rows) > 0:
        scores = logits.clone() if mask is None else logits.masked_fill(~mask, -torch.inf)
        adjust(scores, rows)
        token_ids, best = _choose(scores, rows, find_best)
    else:
        token_ids, best = _choose(logits, rows, find_best, without=adjusted)
        if adjusted:
            place = to_device(torch.tensor(adjusted), logits.device)
            scores = logits.index_select(0, place)
            adjust(scores, [rows[i] for i in adjusted])
            chosen = _choose(scores, [rows[i] for i in adjusted], find_best)
            token_ids[place], best[place] = chosen
    num_logprobs = {
        index: row.params.logprobs
        for index, row in enumerate(rows)
        if row.params.logprobs is not None
    }
    return SampledBatch(
        token_ids=token_ids,
        is_valid=torch.isfinite(best),
        logprobs=_logprobs(logits, token_ids, num_logprobs),
        num_logprobs=num_logprobs,
    )


def _choose(
    scores: Tensor,
    rows: Sequence[SamplingRow],
    find_best: ArgMax,
    *,
    without: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Tokens and highest scores ``[num_rows]``; in the rows ``without`` they mean nothing."""
    token_ids, best = find_best(scores)
    drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy and i not in without]
    if drawn:
        draw(scores, best, rows, drawn, token_ids, is_narrow_first=scores.device.type == "cpu")
    return token_ids, best


def _logprobs(logits: Tensor, token_ids: Tensor, counts: Mapping[int, int]) -> Tensor | None:
    if not counts:
        return None
    if len(counts) < len(token_ids):
        place = to_device(torch.tensor(list(counts)), logits.device)
        logits, token_ids = logits.index_select(0, place), token_ids[place]
    most = max(counts.values())
    top, ids = likeliest(logits, max(most, 1))
    mass = log_mass(logits, top[:, :1])
    own = logits.gather(1, token_ids[:, None])
    return torch.cat((own - mass, top[:, :most] - mass, ids[:, :most].double()), dim=1)


def _token_logprobs(values: Sequence[float], count: int) -> TokenLogprobs:
    most = len(values) // 2
    return TokenLogprobs(
        logprob=values[0],
        top_ids=tuple(int(token) for token in values[1 + most : 1 + most + min(count, most)]),
        top_logprobs=tuple(values[1 : 1 + min(count, most)]),
    )
