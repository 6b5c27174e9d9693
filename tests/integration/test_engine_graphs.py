"""Decodes replayed from graphs: on a GPU, or without one as calls in Triton's interpreter.

On the CPU nothing is asynchronous, but what a replay overwrites is the same.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton does not run in its interpreter", allow_module_level=True)

from shared.engine.attention import AttentionBatch
from shared.engine.chain import ModelChain
from shared.engine.cuda.attention import CudaAttention
from shared.engine.cuda.graphs import GraphedLayers, GraphRecorder, Recorder
from shared.engine.cuda.kernels import CudaKernels
from shared.engine.model import verified_chain
from shared.kvcache.pool import KVPool
from tests.models import FAMILIES, write_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS, NUM_USED_BLOCKS, BLOCK_SIZE = 24, 20, 8

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


class _CallRecorder:
    """Repeats the call itself, into the same memory."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        output = run().clone()
        return lambda: output.copy_(run()), output

    def forget(self) -> None:
        """Nothing is kept."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> ModelChain:
    path: Path = write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(DEVICE).eval().requires_grad_(False)
    return verified_chain(path, model, "fp32", DEVICE, None, CudaKernels(torch.float32))


def _batch(contexts: list[int], backend: CudaAttention) -> AttentionBatch:
    """One new token a request, in blocks of its own from the highest used ids down."""
    last = NUM_USED_BLOCKS
    tables, slots = [], []
    for context in contexts:
        num_blocks = -(-context // BLOCK_SIZE)
        tables.append(list(range(last - 1, last - 1 - num_blocks, -1)))
        slots.append(tables[-1][-1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE)
        last -= num_blocks
    return AttentionBatch(
        positions=torch.tensor(contexts, device=DEVICE) - 1,
        slot_mapping=torch.tensor(slots, device=DEVICE),
        cu_seqlens_q=range(len(contexts) + 1),
        context_lens=contexts,
        block_tables=tables,
        backend=backend,
    )


def test_replays_are_what_the_layers_themselves_would_give(chain: ModelChain) -> None:
    torch.manual_seed(0)
    past = torch.randn(NUM_BLOCKS, 2, 2, BLOCK_SIZE, chain.spec.head_dim, device=DEVICE)
    pools = [KVPool(chain.spec.kv_layout(BLOCK_SIZE), NUM_BLOCKS, DEVICE) for _ in range(2)]
    backends = [CudaAttention(pool, chain.spec.sliding_windows) for pool in pools]
    for pool in pools:
        for layer in pool.layers:
            layer.tensor.copy_(past)
    is_cuda = DEVICE.type == "cuda"
    recorder: Recorder = GraphRecorder(DEVICE) if is_cuda else _CallRecorder()
    graphed = GraphedLayers(chain, backends[1], recorder)
    num_layers = chain.spec.num_layers
    # Twice the same size with other requests, two padded sizes, and in segments.
    for contexts, segments in (
        ([5, 40], [(0, num_layers)]),
        ([17, 3], [(0, num_layers)]),
        ([9, 24, 1], [(0, 1), (1, num_layers)]),
    ):
        given = torch.randn(len(contexts), chain.spec.hidden_size, device=DEVICE)
        expected = chain.run_layers(0, num_layers, given.clone(), _batch(contexts, backends[0]))
        batch, hidden = _batch(contexts, backends[1]), given
        for lo, hi in segments:
            hidden = graphed(lo, hi, hidden, batch)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    assert graphed.num_graphs == 3
    for ours, plain in zip(pools[1].layers, pools[0].layers, strict=True):
        torch.testing.assert_close(ours.tensor, plain.tensor, rtol=1e-4, atol=1e-5)
    pools[1].give_back(
        NUM_BLOCKS - NUM_USED_BLOCKS
    )  # the caches have moved: what was recorded is not used any more
    assert graphed.num_graphs == 3
    graphed(0, num_layers, torch.randn(1, chain.spec.hidden_size, device=DEVICE),
            _batch([2], backends[1]))  # fmt: skip
    assert graphed.num_graphs == 1
