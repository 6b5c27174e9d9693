"""Attention written out, for what ``scaled_dot_product_attention`` cannot do."""

import torch
from torch import Tensor

MAX_SCORES = 1 << 24  # held at once; 64 MiB in fp32


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention with capped scores or with sinks; the result has the shape of ``query``.

    ``query`` is ``[num_seqs, num_kv_heads, group_size, num_rows, head_dim]``, ``key`` and
    ``value`` are ``[num_seqs, num_kv_heads, length, head_dim]``, ``mask`` is bool, of as many
    rows, and can be broadcast to ``[num_seqs, 1, 1, num_rows, length]``.

    With ``softcap`` ``c`` a score ``s`` becomes ``c * tanh(s / c)`` (Gemma 2, arXiv:2408.00118,
    section 2). ``sinks`` ``[num_kv_heads * group_size]`` has for each query head the score of a
    key that every token sees and that has no value: it takes weight and gives nothing
    (arXiv:2309.17453, section 3.3, with learned scores as in GPT-OSS).
    """
    num_seqs, num_kv_heads, group_size, _, _ = query.shape
    step = max(1, MAX_SCORES // (num_seqs * num_kv_heads * group_size * key.shape[2]))
    if sinks is not None:
        sinks = sinks.float().view(1, num_kv_heads, group_size, 1, 1)
    parts = [
        _attend(rows, key, value, seen, scale, softcap, sinks)
        for rows, seen in zip(
            torch.split(query, step, -2), torch.split(mask, step, -2), strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    # The heads of a group become rows of one matrix, so that keys are not copied for each of them.
    scores = (query.flatten(2, 3) @ key.transpose(2, 3)).float() * scale
    scores = scores.view(*query.shape[:4], -1)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights.flatten(2, 3) @ value).view(query.shape)
