"""Keys and values in eight bits: how far off they may be, and that scales go where blocks go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kvcache.codec import EIGHT_BITS, make_codec, storage_dtype
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.pool import KVPool

CPU = torch.device("cpu")
HEADS, HEAD_DIM, BLOCK_SIZE = 3, 16, 4
BF16_STEP = 2.0**-8  # relative distance of neighbouring bf16 numbers, at most


def layout(dtype: str, num_layers: int = 1) -> KVLayout:
    return KVLayout(
        layers=(LayerKV(HEADS, HEAD_DIM),) * num_layers, block_size=BLOCK_SIZE, dtype=dtype
    )


def round_trip(dtype: str, source: torch.Tensor) -> torch.Tensor:
    """``source`` ``[num_tokens, num_kv_heads, head_dim]`` written as keys and read again."""
    num_tokens = source.shape[0]
    pool = KVPool(layout(dtype), -(-num_tokens // BLOCK_SIZE), CPU)
    cache = pool.layers[0].tensor
    slots = torch.arange(num_tokens)
    key, value = pool.codec.write(
        cache, slots // BLOCK_SIZE, slots % BLOCK_SIZE, source, torch.zeros_like(source)
    )
    gathered = pool.codec.gather(cache, torch.arange(pool.num_blocks), source.dtype)
    keys, values = gathered[:, 0, :num_tokens].transpose(0, 1), gathered[:, 1, :num_tokens]
    # What write returns is what a later chunk will read.
    torch.testing.assert_close(keys, key, rtol=0, atol=0, equal_nan=True)
    assert not value.any()
    assert not values.any()
    return keys


def rows_of(seed: int, num_tokens: int) -> torch.Tensor:
    """Random numbers ``[num_tokens, num_kv_heads, head_dim]`` of all sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator)
    exponents = torch.randint(-5, 5, (num_tokens, HEADS, 1), generator=generator)
    zeros = torch.rand(num_tokens, HEADS, HEAD_DIM, generator=generator) < 0.2
    zeros[0, 0] = True
    return (rows * 10.0**exponents).masked_fill(zeros, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.sampled_from(["int8", "fp8"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_numbers_come_back_within_half_a_step(
    seed: int, num_tokens: int, dtype: str, kind: torch.dtype
) -> None:
    source = rows_of(seed, num_tokens).to(kind)
    error = (round_trip(dtype, source).float() - source.float()).abs()
    largest = source.float().abs().amax(-1, keepdim=True)
    # Half a step of the numbers, and what rounding scale and product to bf16 adds.
    if dtype == "int8":
        bound = largest / 127 / 2 * (1 + BF16_STEP)
    else:
        bound = (source.float().abs() / 16).maximum(largest / 448 * 2**-10) * (1 + BF16_STEP)
    if kind == torch.bfloat16:
        bound = bound + source.float().abs() * BF16_STEP
    assert (error <= bound * 1.001 + 1e-30).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_every_number_of_eight_bits_is_read_as_torch_reads_it(kind: torch.dtype) -> None:
    stored = torch.arange(-128, 128).to(torch.int8)
    fp8 = EIGHT_BITS["fp8"]
    expected = stored.view(torch.float8_e4m3fn).float()
    is_number = expected.isfinite()
    got = fp8.decode(stored, kind).float() * fp8.factor
    assert torch.equal(got[is_number], expected[is_number])
    assert torch.equal(EIGHT_BITS["int8"].decode(stored, kind).float(), stored.float())


def test_wider_activations_are_read_as_they_are_stored() -> None:
    source = rows_of(1, 5)
    assert torch.equal(round_trip("bf16", source), source.bfloat16().float())
    assert torch.equal(round_trip("fp32", source), source)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_largest_number_of_a_head_sets_only_that_heads_scale(dtype: str) -> None:
    source = torch.full((2, HEADS, HEAD_DIM), 0.01)
    source[0, 1, 3] = 1000.0
    back = round_trip(dtype, source)
    untouched = back[:, [0, 2]], back[1, 1]
    for part in untouched:
        torch.testing.assert_close(part, torch.full_like(part, 0.01), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_stays_visible(dtype: str, broken: float) -> None:
    source = torch.ones(2, HEADS, HEAD_DIM)
    source[1, 2, 5] = broken
    back = round_trip(dtype, source)
    assert not back[1, 2].isfinite().any()
    back[1, 2] = 1
    torch.testing.assert_close(back, torch.ones_like(back), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_token_is_stored_alike_whatever_is_written_before_and_beside_it(dtype: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(8, HEADS, HEAD_DIM) * torch.logspace(-2, 2, 8)[:, None, None]
    pools = [KVPool(layout(dtype), 2, CPU) for _ in range(2)]
    slots = torch.arange(8)
    for pool, chunks in zip(pools, ([8], [3, 2, 1, 2]), strict=True):
        for part in torch.split(slots, chunks):
            rows = tokens[part]
            cache = pool.layers[0].tensor
            pool.codec.write(cache, part // BLOCK_SIZE, part % BLOCK_SIZE, rows, -rows)
    whole, pieces = pools
    assert torch.equal(whole.layers[0].tensor, pieces.layers[0].tensor)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8", "fp8"])
def test_blocks_moved_by_heads_take_their_scales_along(dtype: str) -> None:
    torch.manual_seed(0)
    source, target = (KVPool(layout(dtype, num_layers=2), 3, CPU) for _ in range(2))
    slots = torch.arange(3 * BLOCK_SIZE)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    rows = torch.randn(len(slots), HEADS, HEAD_DIM).mul(7).to(kind)
    for layer in source.layers:
        blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        source.codec.write(layer.tensor, blocks, offsets, rows, rows / 3)
    head_bytes = source.layout.head_bytes(1)
    for head in range(HEADS):
        data = source.export_blocks(1, [2, 0], head, head + 1)
        assert data.nbytes == 2 * head_bytes
        target.import_blocks(1, [0, 1], head, head + 1, data.tobytes())
    expected = source.codec.gather(source.layers[1].tensor, torch.tensor([2, 0]), kind)
    got = target.codec.gather(target.layers[1].tensor, torch.tensor([0, 1]), kind)
    assert expected.abs().max() > 1
    assert torch.equal(got, expected)
    target.copy_blocks([(0, 2)])
    target.zero_blocks([0])
    again = target.codec.gather(target.layers[1].tensor, torch.tensor([2, 0]), kind)
    assert torch.equal(again[:, :, :BLOCK_SIZE], expected[:, :, :BLOCK_SIZE])
    assert not again[:, :, BLOCK_SIZE:].any()


def test_the_layout_counts_the_scales_and_says_what_is_stored() -> None:
    assert layout("int8").head_bytes(0) == 2 * BLOCK_SIZE * (HEAD_DIM + 2)
    assert layout("bf16").head_bytes(0) == 2 * BLOCK_SIZE * HEAD_DIM * 2
    names = {layout(dtype).name for dtype in ("bf16", "fp16", "fp32", "int8", "fp8")}
    assert len(names) == 5
    assert layout("fp8").name == "fp8-b4-1x3x16"
    for dtype in ("bf16", "int8", "fp8"):
        wanted = layout(dtype)
        inner = make_codec(wanted).block_shape(wanted.layers[0])
        elements = torch.Size(inner).numel()
        assert elements * storage_dtype(wanted).itemsize == wanted.block_bytes(0)
    assert [layout(dtype).has_scales for dtype in ("bf16", "fp32", "int8", "fp8")] == [
        False,
        False,
        True,
        True,
    ]
