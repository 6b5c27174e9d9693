import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.predictor.distribution import (
    BUCKET_EDGES_TOKENS,
    NUM_BUCKETS,
    LengthDistribution,
    bucket_of,
)


def only_in(bucket: int) -> LengthDistribution:
    return LengthDistribution(tuple(float(i == bucket) for i in range(NUM_BUCKETS)))


@st.composite
def distributions(draw: st.DrawFn) -> LengthDistribution:
    weights = draw(st.lists(st.floats(0, 1), min_size=NUM_BUCKETS, max_size=NUM_BUCKETS))
    total = sum(weights)
    if total < 1e-3:
        return LengthDistribution.endless()
    return LengthDistribution(tuple(weight / total for weight in weights))


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (2048, 8), (2049, 9)]
)
def test_an_edge_belongs_to_the_bucket_below_it(length: int, bucket: int) -> None:
    assert bucket_of(length) == bucket


def test_quantiles_are_spread_evenly_in_the_logarithm() -> None:
    found = only_in(3)  # (32, 64]
    assert found.quantile_tokens(0.5, 4096) == 46  # 32 * sqrt(2) = 45.3
    assert found.quantile_tokens(1.0, 4096) == 64
    assert found.quantile_tokens(0.001, 4096) == 33


def test_a_quantile_at_the_seam_of_two_buckets_is_their_edge() -> None:
    found = LengthDistribution((0.5, 0.5, *[0.0] * 8))
    assert found.quantile_tokens(0.5, 4096) == 8
    assert found.quantile_tokens(0.9, 4096) == 14  # 8 * 2**0.8 = 13.9


def test_nothing_is_longer_than_max_tokens() -> None:
    found = only_in(5)
    assert found.quantile_tokens(0.5, 100) == 100
    assert found.truncated(100) == only_in(4).probabilities
    assert found.truncated(129) == only_in(5).probabilities
    assert LengthDistribution((0.25, 0.25, 0.5, *[0.0] * 7)).truncated(16) == (
        (0.25, 0.75, *[0.0] * 8)
    )


@pytest.mark.parametrize("max_tokens", [1, 8, 100, 5000])
def test_what_nothing_ends_is_max_tokens_long(max_tokens: int) -> None:
    endless = LengthDistribution.endless()
    assert endless.quantile_tokens(0.5, max_tokens) == max_tokens
    assert endless.quantile_tokens(0.9, max_tokens) == max_tokens
    assert endless.truncated(max_tokens) == only_in(bucket_of(max_tokens)).probabilities


@given(found=distributions(), max_tokens=st.integers(1, 10_000))
def test_quantiles_rise_from_1_to_max_tokens(found: LengthDistribution, max_tokens: int) -> None:
    quantiles = [found.quantile_tokens(q / 20, max_tokens) for q in range(1, 21)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] >= 1
    assert quantiles[-1] <= max_tokens


@given(found=distributions(), max_tokens=st.integers(1, 10_000))
def test_truncation_moves_probability_and_loses_none(
    found: LengthDistribution, max_tokens: int
) -> None:
    truncated = found.truncated(max_tokens)
    assert len(truncated) == NUM_BUCKETS
    assert sum(truncated) == pytest.approx(1.0)
    last = bucket_of(max_tokens)
    assert truncated[:last] == found.probabilities[:last]
    assert not any(truncated[last + 1 :])


@given(found=distributions(), q=st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_that_reaches_its_share(
    found: LengthDistribution, q: float
) -> None:
    length = found.quantile_tokens(q, 1 << 20)
    bucket = bucket_of(length)
    if length < 1 << 20:
        assert sum(found.probabilities[: bucket + 1]) >= q - 1e-5
        assert sum(found.probabilities[:bucket]) <= q + 1e-5


def test_a_cdf_becomes_its_steps() -> None:
    edges = [0.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert len(edges) == len(BUCKET_EDGES_TOKENS)
    found = LengthDistribution.from_cdf(edges)
    assert found.probabilities == (0.0, 0.25, 0.0, 0.75, *[0.0] * 6)


@pytest.mark.parametrize(
    "probabilities",
    [(1.0,), (0.5,) * 10, (-0.5, 1.5, *[0.0] * 8), (float("nan"), 1.0, *[0.0] * 8)],
)
def test_what_is_no_distribution_is_refused(probabilities: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"probabilities|distribution"):
        LengthDistribution(probabilities)
