"""From logits to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared.core.request import TokenLogprobs
from shared.engine.draw import draw, likeliest, log_mass
from shared.engine.logit_adjustments import SamplingRow, adjust, to_device

__all__ = ["SampledBatch", "SampledRow", "SamplingRow", "sample", "sample_on_device"]


class SampledRow(NamedTuple):
    """The token of one row, or why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """What was sampled, still on the device.

    ``token_ids`` ``[num_rows]`` int64 are always in the vocabulary, so that the next step can be
    started with them; ``is_valid`` ``[num_rows]`` says which were chosen from something.
    ``logprobs`` ``[num_asking, 1 + 2 * most]`` fp64: the token's, the best ones', their ids;
    ``num_logprobs`` says for each row how many best ones it asked for, if it did.
    """

    token_ids: Tensor
    is_valid: Tensor
    logprobs: Tensor | None
    num_logprobs: Sequence[int | None]

    def fetch(self) -> list[SampledRow]:
        """The rows; waits for the device."""
        logprobs = iter(() if self.logprobs is None else self.logprobs.tolist())
        return [
            SampledRow(
                token,
                None if count is None else _token_logprobs(next(logprobs), count),
                None if is_valid else "the logits are not finite or no token is allowed",
            )
            for token, is_valid, count in zip(
                self.token_ids.tolist(), self.is_valid.tolist(), self.num_logprobs, strict=True
            )
        ]


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], *, mask: Tensor | None = None
) -> list[SampledRow]:
    """``sample_on_device``, brought back to the host."""
    return sample_on_device(logits, rows, mask=mask).fetch()


@torch.inference_mode()
def sample_on_device(
    logits: Tensor, rows: Sequence[SamplingRow], *, mask: Tensor | None = None
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
        token_ids, best = _choose(scores, rows)
    else:
        token_ids, best = _choose(logits, rows, without=adjusted)
        if adjusted:
            place = to_device(torch.tensor(adjusted), logits.device)
            scores = logits.index_select(0, place)
            adjust(scores, [rows[i] for i in adjusted])
            token_ids[place], best[place] = _choose(scores, [rows[i] for i in adjusted])
    return SampledBatch(
        token_ids=token_ids,
        is_valid=torch.isfinite(best),
        logprobs=_logprobs(logits, token_ids, rows),
        num_logprobs=[row.params.logprobs for row in rows],
    )


def _choose(
    scores: Tensor, rows: Sequence[SamplingRow], *, without: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Tokens and highest scores ``[num_rows]``; in the rows ``without`` they mean nothing."""
    is_cpu = scores.device.type == "cpu"
    if is_cpu:  # numpy's uses vector instructions, torch's does not
        token_ids = torch.from_numpy(scores.numpy().argmax(axis=-1))
    else:
        token_ids = scores.argmax(dim=-1)
    best = scores.gather(1, token_ids[:, None])[:, 0]
    drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy and i not in without]
    if drawn:
        draw(scores, best, rows, drawn, token_ids, is_narrow_first=is_cpu)
    return token_ids, best


def _logprobs(logits: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> Tensor | None:
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return None
    if len(asking) < len(rows):
        place = to_device(torch.tensor(asking), logits.device)
        logits, token_ids = logits.index_select(0, place), token_ids[place]
    most = max(rows[i].params.logprobs or 0 for i in asking)
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
