"""Attention with capped scores and with sinks, against the formula in double precision."""

import pytest
import torch
from torch import Tensor

from shared.engine import plain_attention
from shared.engine.plain_attention import attend

NUM_SEQS, NUM_KV_HEADS, GROUP_SIZE, NUM_ROWS, LENGTH, HEAD_DIM = 2, 2, 3, 5, 7, 4
SCALE = 0.7


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(NUM_SEQS, NUM_KV_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, NUM_SEQS, NUM_KV_HEADS, LENGTH, HEAD_DIM, generator=generator)
    seen = torch.arange(LENGTH) <= torch.arange(NUM_ROWS)[:, None] + LENGTH - NUM_ROWS
    return 2 * query, 2 * key, value, seen


def _formula(row: Tensor, key: Tensor, value: Tensor, softcap: float, sink: float) -> Tensor:
    """One row of one head; ``key`` and ``value`` are those it sees."""
    scores = softcap * torch.tanh(key.double() @ row.double() * SCALE / softcap)
    weights = scores.exp() / (scores.exp().sum() + torch.tensor(sink).double().exp())
    return weights @ value.double()


@pytest.mark.parametrize("max_scores", [1, 100, 1 << 24])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("softcap", [1.5, None])
def test_every_row_is_what_the_formula_says(
    monkeypatch: pytest.MonkeyPatch, max_scores: int, has_sinks: bool, softcap: float | None
) -> None:
    monkeypatch.setattr(plain_attention, "MAX_SCORES", max_scores)
    query, key, value, seen = _inputs()
    sinks = torch.linspace(-1, 2, NUM_KV_HEADS * GROUP_SIZE) if has_sinks else None
    output = attend(query, key, value, mask=seen, scale=SCALE, softcap=softcap, sinks=sinks)
    assert output.shape == query.shape
    cap = 1e6 if softcap is None else softcap
    for seq, head, group, row in torch.cartesian_prod(
        *(torch.arange(size) for size in query.shape[:4])
    ).tolist():
        sink = float("-inf") if sinks is None else float(sinks[head * GROUP_SIZE + group])
        expected = _formula(
            query[seq, head, group, row],
            key[seq, head, seen[row]],
            value[seq, head, seen[row]],
            cap,
            sink,
        )
        torch.testing.assert_close(
            output[seq, head, group, row].double(), expected, rtol=1e-4, atol=1e-5
        )
