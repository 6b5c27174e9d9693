"""The Triton kernels compute what torch computes: on a GPU, or without one in their interpreter."""

import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton does not run in its interpreter", allow_module_level=True)

from shared.engine.attention import AttentionBackend, AttentionBatch, TorchAttention
from shared.engine.cuda import attention as cuda_attention
from shared.engine.cuda import batch as cuda_batch
from shared.engine.cuda.attention import (
    GROUP_CONFIGS,
    ROW_CONFIGS,
    CudaAttention,
    DecodeConfig,
)
from shared.engine.cuda.kernels import CudaKernels
from shared.engine.cuda.linear import GEMV_CONFIGS, CudaGated, CudaLinear
from shared.engine.kernels import ACTIVATIONS, TorchKernels
from shared.kvcache.codec import PLAIN_DTYPES
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.pool import KVPool

# On a GPU an exponential becomes infinite without a word.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The interpreter cannot multiply matrices of bf16.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=DEVICE).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, float(error)


@dtypes
@pytest.mark.parametrize("width", [1, 40, 768])
def test_a_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = normal(9, width + 3, dtype=dtype)[:, :width], normal(width)
    expected = TorchKernels(dtype).rms_norm(x, weight, 1e-5)
    assert_close(CudaKernels(dtype).rms_norm(x, weight, 1e-5), expected, TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (12, 12)])
@pytest.mark.parametrize("is_normed", [False, True])
def test_rotary_positions(
    dtype: torch.dtype, head_dim: int, rotary_dim: int, is_normed: bool
) -> None:
    angles = torch.rand(5, rotary_dim // 2, device=DEVICE) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    norm = torch.rand(head_dim, device=DEVICE) + 0.5 if is_normed else None
    both = normal(5, 40, head_dim, dtype=dtype)
    ours, expected = both.clone(), both.clone()
    # Heads 2..37 only: the others stay as they are.
    CudaKernels(dtype).rope(ours[:, 2:37], cos_sin, norm, 1e-6)
    TorchKernels(dtype).rope(expected[:, 2:37], cos_sin, norm, 1e-6)
    assert_close(ours, expected, TOLERANCE[dtype])
    assert torch.equal(ours[:, :2], both[:, :2]) and torch.equal(ours[:, 37:], both[:, 37:])


@dtypes
@pytest.mark.parametrize("config", [None, *GEMV_CONFIGS], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product(dtype: torch.dtype, config: Any, num_rows: int, with_bias: bool) -> None:
    for num_outputs, num_inputs in ((70, 1024), (33, 1100)):
        weight = normal(num_outputs, num_inputs, dtype=dtype)
        x, residual = normal(num_rows, num_inputs, dtype=dtype), normal(num_rows, num_outputs)
        bias = normal(num_outputs, dtype=dtype) if with_bias else None
        linear = CudaLinear(weight, bias, config)
        wide_bias = None if bias is None else bias.float()
        expected = functional.linear(x.float(), weight.float(), wide_bias)
        assert_close(linear(x), expected.to(dtype), TOLERANCE[dtype])
        sum_ = (residual.to(dtype) + expected).to(dtype)
        assert_close(linear.add_to(residual.to(dtype), x), sum_, TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("config", [None, GEMV_CONFIGS[0]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_gated_product(dtype: torch.dtype, config: Any, activation: str, num_rows: int) -> None:
    width = 37
    weight, x = normal(2 * width, 1024, dtype=dtype), normal(num_rows, 1024, dtype=dtype) / 8
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    expected = (ACTIVATIONS[activation](gate) * up).to(dtype)
    assert_close(CudaGated(weight, activation, config)(x), expected, 2 * TOLERANCE[dtype])


@dataclass(frozen=True)
class Shape:
    """Of one layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


# (new tokens, all tokens): decodes, whole prompts, later chunks, all in one batch.
MIXED = [(1, 1), (35, 67), (1, 77), (40, 40), (2, 65), (20, 20), (1, 64)]
DECODES = [(1, 1), (1, 77), (1, 130), (1, 64), (1, 5)]
MIN_WHOLE_TOKENS = 30

SHAPES = [
    Shape(4, 4, 64, 64),
    Shape(6, 2, 80, 64, window=70),
    Shape(16, 1, 32, 16),
    Shape(4, 4, 12, 8),
    Shape(4, 2, 16, 12, window=12),
    Shape(4, 4, 64, 64, dtype=HALF),
    Shape(8, 2, 64, 32, dtype=HALF, window=1),
    Shape(8, 2, 16, 16, softcap=5.0, window=40),
    Shape(3, 3, 16, 16, softcap=30.0),
    Shape(8, 4, 16, 64, has_sinks=True),
    Shape(2, 2, 16, 64, has_sinks=True, dtype=HALF),
]


class Case:
    """A batch over a cache of random content, and what to attend with."""

    def __init__(self, shape: Shape, lens: list[tuple[int, int]]) -> None:
        self.shape = shape
        self.layout = KVLayout(
            layers=(LayerKV(num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim),),
            dtype=next(name for name, kind in PLAIN_DTYPES.items() if kind is shape.dtype),
            block_size=shape.block_size,
        )
        num_blocks = sum(self.layout.blocks_for(context_len) for _, context_len in lens) + 3
        self.pools = [KVPool(self.layout, num_blocks, DEVICE) for _ in range(2)]
        past = normal(*self.pools[0].layers[0].tensor.shape, dtype=shape.dtype)
        ids = list(range(num_blocks))
        random.Random(0).shuffle(ids)
        self.tables: list[list[int]] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.cu_seqlens_q = [0]
        self.context_lens = [context_len for _, context_len in lens]
        size = shape.block_size
        for query_len, context_len in lens:
            table = [ids.pop() for _ in range(self.layout.blocks_for(context_len))]
            self.tables.append(table)
            # What lies behind a request's last token may be anything but is not to be seen.
            past[table[-1], :, :, (context_len - 1) % size + 1 :] = 1e4
            for position in range(context_len - query_len, context_len):
                self.positions.append(position)
                self.slots.append(table[position // size] * size + position % size)
            self.cu_seqlens_q.append(len(self.positions))
        for pool in self.pools:
            pool.layers[0].tensor.copy_(past)
        num_rows = shape.num_heads + 2 * shape.num_kv_heads
        self.qkv = normal(len(self.positions), num_rows, shape.head_dim, dtype=shape.dtype)
        self.sinks = normal(shape.num_heads, dtype=shape.dtype) if shape.has_sinks else None

    def attend(self, backend: AttentionBackend) -> Tensor:
        shape = self.shape
        batch = AttentionBatch(
            positions=torch.tensor(self.positions, device=DEVICE),
            slot_mapping=torch.tensor(self.slots, device=DEVICE),
            cu_seqlens_q=self.cu_seqlens_q,
            context_lens=self.context_lens,
            block_tables=self.tables,
            backend=backend,
        )
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        query, key, value = torch.split(self.qkv, heads, dim=1)
        return backend.forward(
            0,
            query,
            key,
            value,
            scaling=0.2,
            batch=batch,
            softcap=shape.softcap,
            sinks=self.sinks,
        )

    def check(self, backend: CudaAttention) -> None:
        expected = self.attend(TorchAttention(self.pools[0], (self.shape.window,)))
        assert_close(self.attend(backend), expected, TOLERANCE[self.shape.dtype])
        ours, torchs = (pool.layers[0].tensor for pool in reversed(self.pools))
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lens", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_attention(
    shape: Shape, lens: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_batch, "MIN_WHOLE_TOKENS", MIN_WHOLE_TOKENS)
    case = Case(shape, lens)
    case.check(CudaAttention(case.pools[1], (shape.window,)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_decode_in_many_parts(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecodeConfig(
        by_group=shape.num_heads > shape.num_kv_heads, tile=16, num_warps=4, programs_per_sm=640
    )
    for name in ("ROW_CONFIGS", "GROUP_CONFIGS", "EXACT_CONFIGS"):
        monkeypatch.setattr(cuda_attention, name, (config,))
    case = Case(shape, DECODES)
    case.check(CudaAttention(case.pools[1], (shape.window,)))


@pytest.mark.parametrize("config", [*ROW_CONFIGS, *GROUP_CONFIGS], ids=str)
def test_each_way_to_decode(config: DecodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "GROUP_CONFIGS" if config.by_group else "ROW_CONFIGS"
    monkeypatch.setattr(cuda_attention, name, (config,))
    case = Case(Shape(8, 2 if config.by_group else 8, 64, 64, dtype=HALF), DECODES)
    case.check(CudaAttention(case.pools[1], (None,)))
