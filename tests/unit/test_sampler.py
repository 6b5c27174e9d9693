import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core.request import SamplingParams
from shared.core.token_counts import TokenCounts
from shared.engine.draw import draw
from shared.engine.logit_adjustments import SamplingRow
from shared.engine.sampler import SampledRow, sample, sample_on_device

VOCAB_SIZE = 8
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, -torch.inf])


def _row(
    position: int = 0,
    *,
    eos: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
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
        min_p=min_p,
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


def test_what_is_as_likely_as_the_last_token_kept_is_kept() -> None:
    logits = torch.tensor([1.0, 0.0] + [-1.0] * 998)
    for cut in ({"top_p": 0.1}, {"top_k": 3}, {"top_k": 300}, {"min_p": 0.13}):
        rows = [_row(position, **cut) for position in range(2000)]
        drawn = {one.token_id for one in sample(logits.expand(2000, -1), rows)}
        assert len(drawn) > 800
    tied = torch.tensor([0.0] * 70 + [-1.0] * 930)
    for cut in ({"top_p": 0.01}, {"top_k": 1}, {"min_p": 0.5}):
        rows = [_row(position, **cut) for position in range(1000)]
        assert {one.token_id for one in sample(tied.expand(1000, -1), rows)} == set(range(70))


@pytest.mark.parametrize("vocab_size", [70, 1000, 8_192, 8_200, 20_011])
@pytest.mark.parametrize(
    "cut",
    [{"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 40}, {"top_k": 500}, {"min_p": 0.02, "top_p": 0.8}],
    ids=str,
)
def test_looking_at_the_likeliest_tokens_first_changes_nothing(
    cut: dict[str, Any], vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    scales = torch.linspace(0.3, 8.0, 24)[:, None]
    logits = torch.randn(24, vocab_size, generator=generator) * scales
    rows = [_row(position, seed=4, temperature=0.9, **cut) for position in range(24)]
    tokens = [torch.full((24,), -1), torch.full((24,), -1)]
    for is_narrow_first in False, True:
        draw(
            logits,
            logits.amax(dim=-1),
            rows,
            range(24),
            tokens[is_narrow_first],
            is_narrow_first=is_narrow_first,
        )
    assert tokens[0].tolist() == tokens[1].tolist()
    assert [row.token_id for row in sample(logits, rows)] == tokens[0].tolist()


def test_nothing_waits_for_a_device() -> None:
    counts = TokenCounts([1, 2, 3], 3)
    params: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.9, "min_tokens": 3, "logprobs": 0},
        {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2},
        {"logit_bias": ((5, 1.0), (900, 1.0))},
        {"temperature": 0.0},
    ]
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, **each), 0, frozenset((2,)), counts)
        for each in params
    ]
    # A tensor without data: whoever asks it for a value gets an error.
    logits = torch.empty(len(rows), 9000, device="meta")
    for mask in (None, torch.empty(len(rows), 9000, dtype=torch.bool, device="meta")):
        sampled = sample_on_device(logits, rows, mask=mask)
        assert sampled.token_ids.shape == (len(rows),)
        assert sampled.logprobs is not None
        assert sampled.logprobs.shape == (2, 7)


def test_greedy_takes_the_most_likely() -> None:
    assert _one(LOGITS, _row(temperature=0.0)).token_id == 0
    assert _one(LOGITS, _row(temperature=1e-300)).token_id == 0


PARAMS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.5]),
        "top_p": st.sampled_from([0.5, 0.9, 0.999]),
        "top_k": st.sampled_from([1, 5, 63, 64, 65, 400]),
        "min_p": st.sampled_from([0.001, 0.1, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "min_tokens": st.sampled_from([0, 9]),
        "stop_token_ids": st.sampled_from([(1,), (3, 10**6)]),
        "logprobs": st.integers(0, 20),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.4]),
        "frequency_penalty": st.sampled_from([-1.0, 0.4]),
        "logit_bias": st.sampled_from([((0, 5.0), (4, -100.0)), ((2, 100.0), (10**6, 1.0))]),
    },
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[SamplingRow]]:
    """Logits with ties, and rows of every kind."""
    seed = draw(st.integers(0, 2**32))
    vocab_size = draw(st.sampled_from([7, 65, 500, 8_192, 9_001]))
    rows = []
    for params in draw(st.lists(PARAMS, min_size=1, max_size=9)):
        tokens = draw(st.lists(st.integers(0, 6), max_size=9))
        counts = TokenCounts(tokens[:4], min(4, len(tokens)))
        counts.update(tokens)
        sampling = SamplingParams(max_tokens=99, **params)
        rows.append(SamplingRow(sampling, len(tokens), frozenset((2,)), counts))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab_size, generator=generator)
    return (logits * draw(st.sampled_from([0.2, 2.0, 9.0]))).bfloat16().float(), rows


@settings(max_examples=100)
@given(batches(), st.randoms(use_true_random=False))
def test_a_draw_depends_on_nothing_but_its_own_row(
    batch: tuple[torch.Tensor, list[SamplingRow]], random: Random
) -> None:
    logits, rows = batch
    untouched = logits.clone()
    together = sample(logits, rows)
    assert torch.equal(logits, untouched)
    assert together == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = random.sample(range(len(rows)), len(rows))
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_a_draw_does_not_depend_on_the_size_of_the_vocabulary_or_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 32_003, generator=generator) * 3
    rows = [_row(position, seed=7, top_p=(1.0, 0.95)[position % 2]) for position in range(16)]
    together = sample(logits, rows)
    assert together == [_one(logits[i], row) for i, row in enumerate(rows)]
    longer = torch.cat((logits, torch.full((16, 100), -torch.inf)), dim=1)
    assert together == sample(longer, rows)


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
