from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shared.core.prefix import block_key, block_keys, extend_block_keys, root_key
from shared.core.randomness import uniform

ROOT = root_key("model", "tenant")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_only_full_blocks_have_keys() -> None:
    assert block_keys(range(7), 4, ROOT) == block_keys(range(4), 4, ROOT)
    assert len(block_keys(range(8), 4, ROOT)) == 2
    assert all(len(key) == 16 for key in block_keys(range(8), 4, ROOT))


def test_keys_are_frozen() -> None:
    # Engines and stores of different versions share a cache: a change here must be on purpose.
    assert ROOT.hex() == "6b744600e841580d7f4183768da73447"
    assert [key.hex() for key in block_keys(range(8), 4, ROOT)] == [
        "20997014ff0661744a22f84ca9bceee4",
        "a27cf3bba15670de153a8e0fca8096a1",
    ]


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_keys_agree_exactly_as_far_as_the_blocks_do(
    one: list[int], other: list[int], block_size: int
) -> None:
    for mine, theirs in zip(
        enumerate(block_keys(one, block_size, ROOT), start=1),
        block_keys(other, block_size, ROOT),
        strict=False,
    ):
        count, key = mine
        assert (key == theirs) == (one[: count * block_size] == other[: count * block_size])


@given(TOKENS, st.integers(0, 40), st.integers(1, 8))
def test_keys_can_be_computed_bit_by_bit(tokens: list[int], cut: int, block_size: int) -> None:
    keys = block_keys(tokens[:cut], block_size, ROOT)
    extend_block_keys(keys, tokens, block_size, ROOT)
    assert keys == block_keys(tokens, block_size, ROOT)


def test_models_and_tenants_are_apart() -> None:
    roots = {
        root_key(model, tenant)
        for model in ("", "m", "mt", "t")
        for tenant in ("", "m", "mt", "t", "a" * 200)
    }
    assert len(roots) == 20
    assert len({block_key(root, [1, 2]) for root in roots}) == 20


def test_random_numbers_are_frozen() -> None:
    # A resumed request must go on with the numbers it would have had, in every version.
    assert [uniform(0, i) for i in range(3)] == [
        0.6524484863740322,
        0.7012121095215252,
        0.3871241409757855,
    ]
    assert uniform(12345678901234567890, 99) == 0.39865256560081574


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_random_numbers_are_in_the_half_open_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed + 2**64, position)


def test_random_numbers_look_uniform_along_positions_and_seeds() -> None:
    for draws in ([uniform(5, i) for i in range(20_000)], [uniform(i, 5) for i in range(20_000)]):
        counts = [0] * 20
        for draw in draws:
            counts[int(draw * 20)] += 1
        chi_squared = sum((count - 1000) ** 2 / 1000 for count in counts)
        assert chi_squared < 43.8  # 19 degrees of freedom, p = 0.001; the draws are fixed
        follows = sum(a * b for a, b in pairwise(draws)) / (len(draws) - 1)
        assert abs(follows - 0.25) < 0.01  # neighbours are uncorrelated
