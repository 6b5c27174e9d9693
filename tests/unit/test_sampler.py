import math

import pytest
import torch

from shared.core.request import SamplingParams
from shared.engine.sampler import SampledRow, SamplingRow, sample

VOCAB_SIZE = 8
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, -torch.inf])


def _row(
    position: int = 0,
    *,
    eos: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    min_tokens: int = 0,
    stop: tuple[int, ...] = (),
    logprobs: int | None = None,
) -> SamplingRow:
    params = SamplingParams(
        max_tokens=100,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        min_tokens=min_tokens,
        stop_token_ids=stop,
        logprobs=logprobs,
    )
    return SamplingRow(params, position, frozenset(eos))


def _frequencies(row: SamplingRow, num_draws: int = 20_000) -> torch.Tensor:
    rows = [SamplingRow(row.params, position, row.eos_token_ids) for position in range(num_draws)]
    drawn = sample(LOGITS.expand(num_draws, -1), rows)
    counts = torch.bincount(torch.tensor([one.token_id for one in drawn]), minlength=VOCAB_SIZE)
    return counts / num_draws


def _one(logits: torch.Tensor, row: SamplingRow, mask: torch.Tensor | None = None) -> SampledRow:
    return sample(logits[None], [row], mask=None if mask is None else mask[None])[0]


@pytest.mark.parametrize(
    ("row", "kept", "temperature"),
    [
        (_row(), 8, 1.0),
        (_row(temperature=0.5, seed=3), 8, 0.5),
        (_row(temperature=2.0, seed=2**63 + 5), 8, 2.0),
        (_row(top_k=3), 3, 1.0),
        (_row(top_k=100), 8, 1.0),
        (_row(top_p=0.7), 2, 1.0),  # 0.53 does not reach 0.7, 0.72 does
        (_row(top_p=0.75), 3, 1.0),
        (_row(top_p=1e-9), 1, 1.0),
        (_row(top_k=3, top_p=0.85), 2, 1.0),  # 0.63, 0.86 of what top_k leaves
    ],
)
def test_tokens_are_drawn_from_the_distribution_asked_for(
    row: SamplingRow, kept: int, temperature: float
) -> None:
    expected = torch.softmax(LOGITS / temperature, dim=0)
    expected[kept:] = 0.0
    expected /= expected.sum()
    frequencies = _frequencies(row)
    assert (frequencies[expected == 0] == 0).all()
    # 4.5 standard deviations; the draws are always the same ones.
    assert ((frequencies - expected).abs() <= 4.5 * (expected / 20_000).sqrt()).all()


def test_a_nucleus_wider_than_the_first_candidates_is_complete() -> None:
    logits = torch.zeros(1000)
    rows = [_row(position, top_p=0.9) for position in range(4000)]
    drawn = {one.token_id for one in sample(logits.expand(4000, -1), rows)}
    assert len(drawn) > 850
    assert max(drawn) < 901


def test_greedy_takes_the_most_likely() -> None:
    assert _one(LOGITS, _row(temperature=0.0)).token_id == 0
    assert _one(LOGITS, _row(temperature=1e-300)).token_id == 0


def test_a_draw_depends_on_nothing_but_its_own_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 500, generator=generator) * 3
    logits = logits.bfloat16().float()  # with ties
    rows = [
        _row(
            position,
            seed=position * 7,
            temperature=(0.0, 0.7, 1.0)[position % 3],
            top_k=(None, 5, 50)[position % 4 % 3],
            top_p=(1.0, 0.9, 0.999)[position % 5 % 3],
        )
        for position in range(40)
    ]
    together = [one.token_id for one in sample(logits, rows)]
    assert together == [_one(logits[i], row).token_id for i, row in enumerate(rows)]
    backwards = sample(logits.flip(0), rows[::-1])
    assert together == [one.token_id for one in backwards[::-1]]


def test_seed_and_position_decide_the_draw() -> None:
    by_position = [_one(torch.zeros(1000), _row(position)).token_id for position in range(20)]
    by_seed = [_one(torch.zeros(1000), _row(seed=seed)).token_id for seed in range(20)]
    assert len(set(by_position)) > 15
    assert len(set(by_seed)) > 15
    assert by_position == [_one(torch.zeros(1000), _row(p)).token_id for p in range(20)]


def test_below_min_tokens_nothing_can_end_the_request() -> None:
    row = _row(1, eos=(0,), stop=(1,), min_tokens=2, temperature=0.0)
    assert _one(LOGITS, row).token_id == 2
    row = _row(2, eos=(0,), stop=(1,), min_tokens=2, temperature=0.0)
    assert _one(LOGITS, row).token_id == 0
    assert LOGITS[0] == 2.0  # the logits are only read


def test_a_mask_leaves_only_what_it_allows() -> None:
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[[3, 5]] = True
    assert _one(LOGITS, _row(temperature=0.0), mask).token_id == 3
    drawn = {_one(LOGITS, _row(position), mask).token_id for position in range(50)}
    assert drawn == {3, 5}


def test_a_row_without_a_choice_is_reported_and_the_others_are_not() -> None:
    nothing = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    assert _one(LOGITS, _row(), nothing).error is not None
    broken = LOGITS.clone()
    broken[4] = torch.nan
    for temperature in (0.0, 1.0):
        results = sample(torch.stack([broken, LOGITS]), [_row(temperature=temperature)] * 2)
        assert results[0].error is not None
        assert results[1] == _one(LOGITS, _row(temperature=temperature))


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    expected = torch.log_softmax(LOGITS, dim=0)
    row = _row(temperature=0.3, top_k=1, logprobs=2)
    logprobs = _one(LOGITS, row).logprobs
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(float(expected[0]))
    assert logprobs.top_ids == (0, 1)
    assert logprobs.top_logprobs == pytest.approx(expected[:2].tolist())

    results = sample(
        LOGITS.expand(3, -1), [_row(temperature=0.0), _row(logprobs=0), _row(logprobs=20)]
    )
    assert results[0].logprobs is None
    assert results[1].logprobs is not None
    assert results[1].logprobs.top_ids == ()
    assert results[2].logprobs is not None
    assert len(results[2].logprobs.top_ids) == VOCAB_SIZE
    assert results[2].logprobs.top_logprobs[-1] == -math.inf
