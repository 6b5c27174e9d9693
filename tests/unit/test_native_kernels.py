"""The C kernels compute what torch computes, in every build that this CPU can run."""

import random
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.engine.attention import AttentionBatch, TorchAttention
from shared.engine.kernels import ACTIVATIONS, TorchKernels
from shared.engine.native.attention import NativeAttention
from shared.engine.native.kernels import NativeKernels, NativeLinear, OneDnnLinear, make_kernels
from shared.engine.native.library import NativeLibrary, load_library, runnable_builds
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.pool import KVPool

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
pytestmark = needs_compiler


@pytest.fixture(params=runnable_builds())
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    library = load_library([request.param])
    assert library is not None, "not compiled: run make"
    return library


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 61, 260])
@pytest.mark.parametrize("shape", [(64, 48), (70, 33), (8, 130), (70, 2051)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product(
    library: NativeLibrary, num_rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    x, residual = torch.randn(num_rows, shape[1]), torch.randn(num_rows, shape[0])
    expected = x @ weight.float().T + bias.float()
    linear = NativeLinear(library, weight, bias)
    if num_rows:
        assert_close(linear(x), expected)
        assert_close(linear.add_to(residual.clone(), x), residual + expected)
    else:
        assert linear(x).shape == expected.shape


def test_rows_may_lie_apart(library: NativeLibrary) -> None:
    weight, x = torch.randn(40, 32), torch.randn(5, 64)
    assert_close(NativeLinear(library, weight, None)(x[:, 7:39]), x[:, 7:39] @ weight.T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [16, 37, 96])
@pytest.mark.parametrize("num_rows", [1, 16, 120])
def test_a_gated_product(
    library: NativeLibrary, activation: str, width: int, num_rows: int
) -> None:
    weight, x = torch.randn(2 * width, 24).bfloat16(), torch.randn(num_rows, 24)
    gate, up = (x @ weight.float().T).chunk(2, dim=-1)
    expected = ACTIVATIONS[activation](gate) * up
    assert_close(NativeKernels(library, torch.float32).gated(weight, activation)(x), expected)
    # With bf16 activations the product is another's and only the gate is ours.
    in_bf16 = NativeKernels(library, torch.bfloat16).gated(weight, activation)
    assert_close(in_bf16(x.bfloat16()), expected, 2e-2)


@pytest.mark.parametrize("width", [1, 15, 64, 2047, 2048, 2049, 6300])
def test_where_rows_are_highest(library: NativeLibrary, width: int) -> None:
    rows = torch.randn(40, width + 3)[:, :width]
    rows[1] = 0.25  # a tie everywhere: the first one counts
    rows[2] = -torch.inf
    for row in range(4, 16):  # where a vector, a chunk or the row ends
        rows[row, min((0, 1, 14, 16, 63, 64, 2046, 2047, 2048, 2049)[row % 10], width - 1)] = 9.0
    rows[16:20, width // 2] = torch.inf
    rows[20:24, width - 1] = torch.nan
    rows[24:28, 0] = torch.nan
    indices, values = NativeKernels(library, torch.float32).argmax(rows)
    expected, expected_values = TorchKernels(torch.float32).argmax(rows)
    assert torch.equal(values.isnan(), expected_values.isnan())
    assert torch.equal(values[:20], expected_values[:20])
    assert torch.equal(indices[:20], expected[:20])
    assert torch.equal(indices[28:], expected[28:])
    assert all(0 <= index < width for index in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 40, 768])
def test_a_norm(library: NativeLibrary, dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(9, width).to(dtype), torch.randn(width)
    ours, torchs = NativeKernels(library, dtype), TorchKernels(dtype)
    expected = torchs.rms_norm(x, weight, 1e-5)
    assert_close(ours.rms_norm(x, weight, 1e-5), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (8, 8)])
@pytest.mark.parametrize("is_normed", [False, True])
def test_rotary_positions(
    library: NativeLibrary, dtype: torch.dtype, head_dim: int, rotary_dim: int, is_normed: bool
) -> None:
    angles = torch.rand(5, rotary_dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    norm = torch.rand(head_dim) + 0.5 if is_normed else None
    both = torch.randn(5, 7, head_dim).to(dtype)
    ours, expected = both.clone(), both.clone()
    # Heads 2..5 only: the others stay as they are.
    NativeKernels(library, dtype).rope(ours[:, 2:5], cos_sin, norm, 1e-6)
    TorchKernels(dtype).rope(expected[:, 2:5], cos_sin, norm, 1e-6)
    assert_close(ours, expected, TOLERANCE[dtype])
    assert torch.equal(ours[:, [0, 1, 5, 6]], both[:, [0, 1, 5, 6]])


@pytest.mark.parametrize(
    ("cache", "activations"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.float32),
        ("bf16", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 80), (16, 1, 32)]
)
def test_attention(
    library: NativeLibrary,
    cache: str,
    activations: torch.dtype,
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    # (new tokens, all tokens): decodes, whole prompts, later chunks, all in one batch.
    lens = [(1, 1), (130, 300), (1, 77), (200, 200), (2, 65), (1, 500), (57, 57), (1, 64)]
    layout = KVLayout(layers=(LayerKV(num_kv_heads=num_kv_heads, head_dim=head_dim),), dtype=cache)
    num_blocks = sum(layout.blocks_for(context_len) for _, context_len in lens)
    pools = [KVPool(layout, num_blocks, CPU) for _ in range(2)]
    assert NativeAttention.supports(library, pools[0])
    past = torch.randn(pools[0].layers[0].tensor.shape).to(pools[0].layers[0].tensor.dtype)
    # What lies behind a request's last token may be anything but is not to be seen.
    ids = list(range(num_blocks))
    random.Random(0).shuffle(ids)
    tables, positions, slots, cu_seqlens_q = [], [], [], [0]
    for query_len, context_len in lens:
        table = [ids.pop() for _ in range(layout.blocks_for(context_len))]
        tables.append(table)
        past[table[-1], :, :, (context_len - 1) % layout.block_size + 1 :] = 1e4
        for position in range(context_len - query_len, context_len):
            positions.append(position)
            slots.append(table[position // 64] * 64 + position % 64)
        cu_seqlens_q.append(len(positions))
    qkv = torch.randn(len(positions), num_heads + 2 * num_kv_heads, head_dim).to(activations)
    outputs = []
    for pool, backend in (
        (pools[0], TorchAttention(pools[0], (window,))),
        (pools[1], NativeAttention(library, pools[1], (window,), activations)),
    ):
        pool.layers[0].tensor.copy_(past)
        batch = AttentionBatch(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=cu_seqlens_q,
            context_lens=[context_len for _, context_len in lens],
            block_tables=tables,
            backend=backend,
        )
        query, key = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
        value = qkv[:, num_heads + num_kv_heads :]
        outputs.append(backend.forward(0, query, key, value, scaling=0.1, batch=batch))
    assert torch.equal(pools[0].layers[0].tensor, pools[1].layers[0].tensor)
    # The kernels see the new tokens as the cache has rounded them.
    tolerance = 2e-6 if cache == "fp32" else 5e-3
    assert_close(outputs[1], outputs[0], tolerance)


def _dense_attention(
    query: Tensor, cache: Tensor, table: list[int], context_len: int, window: int | None
) -> Tensor:
    """In fp64, for rows ``[num_rows, num_heads, head_dim]`` at the end of a request's context."""
    num_rows, num_heads, head_dim = query.shape
    group = num_heads // cache.shape[1]
    blocks = cache[table].double().permute(2, 1, 0, 3, 4)  # keys and values, by KV head
    keys, values = blocks.reshape(2, cache.shape[1], -1, head_dim)[:, :, :context_len]
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * 0.3
    distance = torch.arange(context_len - num_rows, context_len)[:, None] - torch.arange(
        context_len
    )
    is_hidden = (distance < 0) | (distance >= (window or context_len))
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(dim=-1)
    output: Tensor = (weights @ values).transpose(0, 1)
    return output


# (heads that share a KV head, vectors in a head): odd numbers of both are what is left over.
EDGE_HEADS = [(1, 1), (3, 3), (5, 1), (6, 2), (7, 3), (8, 7), (9, 3)]


@pytest.mark.parametrize(
    ("cache", "activations"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.float32),
        ("bf16", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("block_size", "window"), [(32, None), (32, 37), (64, None), (64, 1)])
def test_attention_at_the_edges(
    library: NativeLibrary,
    cache: str,
    activations: torch.dtype,
    block_size: int,
    window: int | None,
) -> None:
    """Contexts that end about where blocks, vectors and what is kept at a time end.

    Whatever is not a token of the request is no number; that must neither be seen nor written.
    """
    lens = [(1, context_len) for context_len in (1, 15, 16, 17, 33, 64, 65, 512, 513)]
    if activations is torch.float32:  # else prefills are torch's
        lens += [(2, 2), (63, 64), (65, 65), (33, 96), (70, 200)]
    tables: list[list[int]] = []
    past: list[int] = []
    slots: list[int] = []
    cu_seqlens_q, num_blocks = [0], 1
    for query_len, context_len in lens:
        tables.append([*range(num_blocks, num_blocks - (-context_len // block_size))])
        first = num_blocks * block_size
        past += range(first, first + context_len - query_len)
        slots += range(first + context_len - query_len, first + context_len)
        num_blocks += len(tables[-1])
        cu_seqlens_q.append(len(slots))
    blocks, offsets = torch.tensor(past) // block_size, torch.tensor(past) % block_size
    for group, num_vectors in EDGE_HEADS:
        head_dim = num_vectors * library.vector_width
        kv = LayerKV(num_kv_heads=2, head_dim=head_dim)
        pool = KVPool(KVLayout(layers=(kv,), block_size=block_size, dtype=cache), num_blocks, CPU)
        tensor = pool.layers[0].tensor
        tensor.fill_(torch.nan)
        old = torch.randn(len(past), 2, 2, head_dim).to(tensor.dtype)
        tensor.permute(0, 3, 1, 2, 4)[blocks, offsets] = old
        query = torch.randn(len(slots), 2 * group, head_dim).to(activations)
        key, value = torch.randn(2, len(slots), 2, head_dim).to(activations)
        backend = NativeAttention(library, pool, (window,), activations)
        batch = AttentionBatch(
            positions=torch.tensor(slots),  # not looked at
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=cu_seqlens_q,
            context_lens=[context_len for _, context_len in lens],
            block_tables=tables,
            backend=backend,
        )
        output = backend.forward(0, query, key, value, scaling=0.3, batch=batch)
        assert torch.equal(tensor.permute(0, 3, 1, 2, 4)[blocks, offsets], old)
        assert int(tensor.isfinite().sum()) == old.numel() + 2 * key.numel()
        for index, (table, (_, context_len)) in enumerate(zip(tables, lens, strict=True)):
            rows = slice(cu_seqlens_q[index], cu_seqlens_q[index + 1])
            expected = _dense_attention(query[rows], tensor, table, context_len, window)
            assert_close(output[rows], expected, TOLERANCE[activations])


def test_what_the_kernels_cannot_do_is_left_to_torch(library: NativeLibrary) -> None:
    for layout in (
        KVLayout(layers=(LayerKV(num_kv_heads=1, head_dim=64),), block_size=12, dtype="fp32"),
        KVLayout(layers=(LayerKV(num_kv_heads=1, head_dim=6),), dtype="fp32"),
        KVLayout(layers=(LayerKV(num_kv_heads=1, head_dim=64),), dtype="fp16"),
    ):
        assert not NativeAttention.supports(library, KVPool(layout, 1, CPU))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_by_onednn(with_bias: bool) -> None:
    weight, x, residual = torch.randn(40, 24), torch.randn(5, 24), torch.randn(5, 40)
    bias = torch.randn(40) if with_bias else None
    linear = OneDnnLinear(weight, bias)
    assert_close(linear(x), functional.linear(x, weight, bias))
    assert_close(linear.add_to(residual.clone(), x), residual + functional.linear(x, weight, bias))


def test_the_best_build_is_taken() -> None:
    kernels = make_kernels(CPU, torch.float32)
    assert isinstance(kernels, NativeKernels)
    library = load_library()
    assert library is not None and library.name == runnable_builds()[0]
    assert isinstance(make_kernels(CPU, torch.float16), TorchKernels)
