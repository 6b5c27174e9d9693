"""Decodes repeated from recorded calls do what the layers do, to the last bit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PreTrainedConfig, Qwen3Config

from shared.engine.attention import AttentionBatch
from shared.engine.chain import ModelChain
from shared.engine.model import load_model
from shared.engine.native.attention import NativeAttention
from shared.engine.native.library import load_library
from shared.engine.native.recording import MAX_ROWS, RecordedLayers
from shared.engine.select import make_layer_runner
from shared.kvcache.pool import KVPool
from tests.models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not compiled")

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_BLOCKS = 32, 12, 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=40),
    "qwen3": Qwen3Config(**SHAPE),
}


def _load(config: PreTrainedConfig, path: Path) -> tuple[ModelChain, NativeAttention]:
    chain = load_model(write_model(path / "model", config), dtype="fp32", device="cpu")
    pool = KVPool(chain.spec.kv_layout(BLOCK_SIZE), NUM_BLOCKS, CPU, capacity_blocks=NUM_BLOCKS + 4)
    attention = chain.attention(pool)
    assert isinstance(attention, NativeAttention)
    for layer in pool.layers:
        layer.tensor.normal_()
    return chain, attention


def _decodes(contexts: list[int], attention: NativeAttention) -> AttentionBatch:
    """One new token a request; they share blocks, as nobody reads what another writes last."""
    rng = random.Random(len(contexts))
    tables = [[rng.randrange(NUM_BLOCKS) for _ in range(MAX_BLOCKS)] for _ in contexts]
    # Those written to are different ones while there are enough.
    slots = [
        (index % NUM_BLOCKS) * BLOCK_SIZE + (index // NUM_BLOCKS) for index in range(len(contexts))
    ]
    return AttentionBatch(
        positions=torch.tensor([context - 1 for context in contexts]),
        slot_mapping=torch.tensor(slots),
        cu_seqlens_q=range(len(contexts) + 1),
        context_lens=contexts,
        block_tables=tables,
        backend=attention,
    )


def _both(
    chain: ModelChain, attention: NativeAttention, layers: RecordedLayers, num_rows: int
) -> tuple[Tensor, Tensor]:
    rng = random.Random(num_rows)
    contexts = [rng.randint(1, MAX_BLOCKS * BLOCK_SIZE) for _ in range(num_rows)]
    hidden = torch.randn(num_rows, chain.spec.hidden_size)
    batch = _decodes(contexts, attention)
    expected = chain.run_layers(0, chain.spec.num_layers, hidden.clone(), batch)
    return layers(0, chain.spec.num_layers, hidden.clone(), batch).clone(), expected


@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_rows(name: str, tmp_path: Path) -> None:
    chain, attention = _load(CONFIGS[name], tmp_path)
    layers = make_layer_runner(chain, attention)
    assert isinstance(layers, RecordedLayers)
    # Recorded with 3 rows; fewer, more, the most, and more than are recorded.
    for num_rows in (3, 3, 1, 17, MAX_ROWS, MAX_ROWS + 1, 2):
        actual, expected = _both(chain, attention, layers, num_rows)
        assert torch.equal(actual, expected), num_rows


def test_a_segment_of_the_layers(tmp_path: Path) -> None:
    chain, attention = _load(CONFIGS["llama"], tmp_path)
    layers = make_layer_runner(chain, attention)
    hidden = torch.randn(4, chain.spec.hidden_size)
    batch = _decodes([9, 100, 1, 64], attention)
    expected = chain.run_layers(0, chain.spec.num_layers, hidden.clone(), batch)
    for _ in range(2):
        half = layers(0, 2, hidden.clone(), batch)
        assert torch.equal(layers(2, 3, half, batch), expected)


def test_a_cache_that_moved_and_other_threads(tmp_path: Path) -> None:
    chain, attention = _load(CONFIGS["llama"], tmp_path)
    layers = make_layer_runner(chain, attention)
    assert isinstance(layers, RecordedLayers)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            actual, expected = _both(chain, attention, layers, 5)
            assert torch.equal(actual, expected)
        attention.pool.grow(4)
        actual, expected = _both(chain, attention, layers, 5)
        assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_decode_is_not_repeated(tmp_path: Path) -> None:
    chain, attention = _load(CONFIGS["llama"], tmp_path)
    layers = make_layer_runner(chain, attention)
    _both(chain, attention, layers, 2)  # type: ignore[arg-type]
    batch = AttentionBatch(
        positions=torch.tensor([0, 1, 2, 70]),
        slot_mapping=torch.tensor([0, 1, 2, 5 * BLOCK_SIZE + 6]),
        cu_seqlens_q=[0, 3, 4],
        context_lens=[3, 71],
        block_tables=[[0], [3, 4, 5]],
        backend=attention,
    )
    hidden = torch.randn(4, chain.spec.hidden_size)
    seen: list[int] = []
    expected = chain.run_layers(0, 3, hidden.clone(), batch)
    assert torch.equal(layers(0, 3, hidden.clone(), batch, on_layer=seen.append), expected)
    assert seen == [0, 1, 2]


def test_layers_with_modules_of_their_own_are_not_recorded(tmp_path: Path) -> None:
    config = MixtralConfig(**SHAPE, num_local_experts=4)
    chain, attention = _load(config, tmp_path)
    assert chain.num_fused_layers == 3 and chain.fused_segment(0, 3) is None
    layers = make_layer_runner(chain, attention)
    assert isinstance(layers, RecordedLayers)
    for _ in range(2):
        actual, expected = _both(chain, attention, layers, 4)
        assert torch.equal(actual, expected)
