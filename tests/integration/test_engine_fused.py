"""Fused layers and the CPU kernels under a whole engine: transformers' tokens, and seen in use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from shared.engine import model as model_module
from shared.engine.model import cpu_has_bf16, load_model
from shared.engine.native.attention import NativeAttention
from shared.engine.native.kernels import NativeKernels
from shared.engine.native.library import load_library
from shared.kvcache.pool import KVPool
from tests.engines import Reference, make_engine, make_request, random_prompt, run
from tests.models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not compiled")

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_HEAD_DIM = {key: value for key, value in SHAPE.items() if key != "head_dim"} | {
    "hidden_size": 128
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=40),
    "qwen2": Qwen2Config(**NO_HEAD_DIM),
    "qwen3": Qwen3Config(**SHAPE),
    "phi3": Phi3Config(**NO_HEAD_DIM),
    "gemma": GemmaConfig(**SHAPE),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
}
LENGTHS = (70, 5, 33, 1, 140)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", MODELS[name])
    engine = make_engine(path, block_size=32, num_blocks=64, max_num_batched_tokens=64)
    reference = Reference(path)
    requests = [
        make_request(str(length), random_prompt(length, length), max_tokens=40)
        for length in LENGTHS
    ]
    tokens = run(engine, *requests)
    for request in requests:
        reference.assert_same(request.prompt_token_ids, tokens[request.request_id])


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_fused_and_attention_is_native(name: str, tmp_path: Path) -> None:
    chain = load_model(write_model(tmp_path / "model", MODELS[name]), dtype="fp32", device="cpu")
    assert chain.num_fused_layers == 2
    assert isinstance(chain.kernels, NativeKernels)
    pool = KVPool(chain.spec.kv_layout(32), 1, torch.device("cpu"))
    assert isinstance(chain.attention(pool), NativeAttention)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, mlp_bias=True),
        LlamaConfig(**SHAPE, hidden_act="relu"),
    ],
    ids=["mlp-bias", "relu"],
)
def test_what_has_no_fused_form_runs_as_it_is(config: PreTrainedConfig, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", config)
    chain = load_model(path, dtype="fp32", device="cpu")
    assert chain.num_fused_layers == 0
    request = make_request("a", random_prompt(20, 0))
    tokens = run(make_engine(path, block_size=32), request)
    Reference(path).assert_same(request.prompt_token_ids, tokens["a"])


def test_a_fused_layer_that_differs_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model", MODELS["llama"])
    monkeypatch.setattr(
        NativeKernels, "rms_norm", lambda self, x, weight, eps: 1.1 * x / x.norm(dim=-1)[:, None]
    )
    chain = load_model(path, dtype="fp32", device="cpu")
    assert chain.num_fused_layers == 0


@pytest.mark.skipif(cpu_has_bf16(), reason="this CPU computes in bf16")
@pytest.mark.parametrize("block_size", [32, 8])
def test_bf16_weights_compute_in_fp32_where_the_cpu_has_no_bf16(
    block_size: int, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model", MODELS["llama"])
    chain = load_model(path, dtype="bf16", device="cpu")
    assert (chain.spec.dtype, chain.kernels.activation_dtype) == ("bf16", torch.float32)
    request = make_request("a", random_prompt(20, 0), max_tokens=4)
    tokens = run(make_engine(path, dtype="bf16", block_size=block_size), request)
    assert len(tokens["a"]) == 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_bf16_activations(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with bf16 instructions: products by torch or oneDNN, the rest by our kernels."""
    monkeypatch.setattr(model_module, "cpu_has_bf16", lambda: True)
    path = write_model(tmp_path / "model", MODELS[name])
    chain = load_model(path, dtype="bf16", device="cpu")
    assert chain.kernels.activation_dtype == torch.bfloat16
    assert chain.num_fused_layers == 2
    engine = make_engine(path, dtype="bf16", block_size=32, max_num_batched_tokens=64)
    requests = [make_request(str(n), random_prompt(n, n), max_tokens=8) for n in (70, 5, 33)]
    tokens = run(engine, *requests)
    assert [len(tokens[request.request_id]) for request in requests] == [8, 8, 8]
    # bf16 rounds differently with the batch: a good share of the tokens is what can be asked for.
    reference = Reference(path)
    pairs = [
        pair
        for request in requests
        for pair in zip(
            tokens[request.request_id], reference.greedy(request.prompt_token_ids, 8), strict=True
        )
    ]
    assert sum(a == b for a, b in pairs) >= len(pairs) // 3
