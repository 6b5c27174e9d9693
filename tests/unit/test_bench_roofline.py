"""Bytes and operations of the roofline, against numbers worked out by hand."""

import pytest

from bench.roofline import (
    Cost,
    LayerAttention,
    MachineRates,
    ModelSize,
    iteration_cost,
    uniform_floor,
)

# Two layers of 1,000 weights, a head of 100; 8 KV numbers and 16 operations a token attended to.
SIZE = ModelSize(
    num_dense_params=2000,
    num_head_params=100,
    layers=(LayerAttention(kv_values=8, flops=16),) * 2,
)


def test_a_decode_step_reads_weights_once_and_every_context() -> None:
    cost = iteration_cost(SIZE, [(1, 9), (1, 19)], itemsize=2)
    assert cost.read_bytes == 2 * (2000 + 100 + 2 * 8 * (10 + 20))
    assert cost.flops == 2 * 2000 * 2 + 2 * 100 * 2 + 2 * 16 * (10 + 20)


def test_a_prefill_attends_causally_and_samples_one_row() -> None:
    cost = iteration_cost(SIZE, [(4, 0)], itemsize=4)
    assert cost.read_bytes == 4 * (2000 + 100 + 2 * 8 * 4)
    assert cost.flops == 2 * 2000 * 4 + 2 * 100 + 2 * 16 * (1 + 2 + 3 + 4)


def test_a_chunk_sees_what_was_before_it() -> None:
    in_one = iteration_cost(SIZE, [(6, 0)], itemsize=2)
    first, second = (iteration_cost(SIZE, [chunk], itemsize=2) for chunk in ((4, 0), (2, 4)))
    # Only the head's row is counted twice.
    assert first.flops + second.flops == in_one.flops + 2 * 100


@pytest.mark.parametrize(
    ("num_new", "num_past", "pairs", "tokens_read"),
    [
        (5, 0, 1 + 2 + 3 + 3 + 3, 5),
        (1, 1, 2, 2),
        (1, 2, 3, 3),
        (1, 10, 3, 3),
        (2, 10, 6, 4),
        (2, 1, 2 + 3, 3),
    ],
)
def test_a_window_bounds_what_is_seen(
    num_new: int, num_past: int, pairs: int, tokens_read: int
) -> None:
    layer = LayerAttention(kv_values=1, flops=1, window=3)
    assert layer.pairs(num_new, num_past) == pairs
    assert layer.tokens_read(num_new, num_past) == tokens_read


def test_experts_are_read_as_far_as_they_are_chosen() -> None:
    size = ModelSize(
        num_dense_params=100,
        num_head_params=10,
        layers=(),
        num_expert_params=800,
        num_experts=8,
        num_experts_per_token=2,
    )
    assert size.weight_params(1) == 100 + 10 + 200
    # The second token misses each expert with probability 6/8, as the first did.
    assert size.weight_params(2) == 100 + 10 + 800 * (1 - 36 / 64)
    assert size.flops_per_token() == 2 * (100 + 200)


def test_the_floor_is_the_longer_of_the_two_times() -> None:
    rates = MachineRates(read_bytes_per_s=100.0, flops_per_s=1000.0)
    assert rates.floor_s(Cost(read_bytes=200.0, flops=1000.0)) == 2.0
    assert rates.floor_s(Cost(read_bytes=100.0, flops=3000.0)) == 3.0


def test_the_floor_of_a_workload_is_one_prefill_and_its_decode_steps() -> None:
    rates = MachineRates(read_bytes_per_s=1e3, flops_per_s=1e9)  # only bytes count
    floor = uniform_floor(SIZE, rates, batch=2, input_len=10, output_len=3, itemsize=2)
    prefill_bytes = 2 * (2100 + 16 * 20)
    step_bytes = [2 * (2100 + 16 * 2 * context) for context in (11, 12)]
    assert floor.prefill_s == pytest.approx(prefill_bytes / 1e3)
    assert floor.decode_step_s == pytest.approx(sum(step_bytes) / 2 / 1e3)
    assert floor.total_s == pytest.approx((prefill_bytes + sum(step_bytes)) / 1e3)


def test_one_output_token_needs_no_decode_step() -> None:
    rates = MachineRates(read_bytes_per_s=1.0, flops_per_s=1.0)
    floor = uniform_floor(SIZE, rates, batch=1, input_len=4, output_len=1, itemsize=2)
    assert floor.decode_step_s == 0.0
    assert floor.total_s == floor.prefill_s
