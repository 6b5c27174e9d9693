"""Every family of models that is served gives transformers' tokens; the others are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV32Config,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    Gemma3Config,
    JambaConfig,
    Llama4TextConfig,
    MambaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
    StableLmConfig,
    ViTConfig,
)

from shared.engine.attention import AttentionBatch, TorchAttention
from shared.engine.chain import ModelChain
from shared.engine.engine import Engine
from shared.engine.model import load_model
from shared.errors import UnsupportedModel
from shared.kvcache.pool import KVPool
from tests.engines import Collector, Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, VOCAB_SIZE, write_model

LENGTHS = (30, 5, 17, 1)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}


class Family:
    """One family's checkpoint, the engine that serves it and the reference."""

    def __init__(self, path: Path, config: PreTrainedConfig) -> None:
        self.path = write_model(path, config)
        self.engine: Engine = make_engine(self.path)
        self.reference = Reference(self.path)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family") / "model", FAMILIES[request.param])


def test_chunked_prefills_and_mixed_arrivals(family: Family) -> None:
    requests = [
        make_request(str(i), random_prompt(length, seed=i), max_tokens=10)
        for i, length in enumerate(LENGTHS)
    ]
    collector = Collector()
    arrivals = {0: requests[:2], 2: requests[2:3], 5: requests[3:]}
    batch_sizes = set()
    for step in range(200):
        for request in arrivals.get(step, ()):
            family.engine.add(request)
        output = family.engine.step()
        if output is None:
            break
        batch_sizes.add(output.stats.num_batched_tokens)
        collector.take(output.outputs)
    assert max(batch_sizes) == 16
    assert len(collector.ends) == len(requests)
    for request in requests:
        tokens = collector.tokens[request.key]
        assert len(tokens) == 10
        family.reference.assert_same(request.prompt_token_ids, tokens)


def test_a_cached_prefix_gives_the_same_tokens(family: Family) -> None:
    cached = random_prompt(30, seed=11)
    run(family.engine, make_request("first", cached, max_tokens=1))
    request = make_request("second", cached + random_prompt(7, seed=12), max_tokens=6)
    assert family.engine.num_cached_tokens(request) == 24
    tokens = run(family.engine, request)["second"]
    family.reference.assert_same(request.prompt_token_ids, tokens)


def test_layers_can_be_run_in_segments(family: Family) -> None:
    chain = load_model(family.path, dtype="fp32", device="cpu")
    token_ids = torch.tensor(random_prompt(20, seed=1))
    whole = _forward(chain, token_ids, [(0, 3)])
    assert torch.equal(whole, _forward(chain, token_ids, [(0, 1), (1, 3)]))
    expected = family.reference.logits(token_ids.tolist())
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def _forward(
    chain: ModelChain, token_ids: torch.Tensor, segments: list[tuple[int, int]]
) -> torch.Tensor:
    pool = KVPool(chain.spec.kv_layout(8), 3, chain.device)
    positions = torch.arange(len(token_ids))
    batch = AttentionBatch(
        positions=positions,
        slot_mapping=positions,
        cu_seqlens_q=[0, len(token_ids)],
        context_lens=[len(token_ids)],
        block_tables=[[0, 1, 2]],
        backend=TorchAttention(pool, chain.spec.sliding_windows),
    )
    hidden = chain.embed(token_ids, positions)
    for lo, hi in segments:
        hidden = chain.run_layers(lo, hi, hidden, batch)
    return chain.head(hidden)


def test_latent_attention_is_cached_expanded(tmp_path: Path) -> None:
    spec = load_model(write_model(tmp_path / "model", FAMILIES["deepseek-v3"]), dtype="fp32").spec
    # Keys of 8 + 8 numbers; values of 12 are padded to as many.
    assert (spec.num_kv_heads, spec.head_dim) == (4, 16)
    assert spec.kv_bytes_per_token == 3 * 4 * (16 + 16) * 4


def test_of_a_model_that_sees_the_text_decoder_is_served(tmp_path: Path) -> None:
    text = FAMILIES["gemma3"].to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    path = write_model(tmp_path / "model", config)
    prompt = random_prompt(20, seed=1)
    tokens = run(make_engine(path), make_request("a", prompt))["a"]
    Reference(path).assert_same(prompt, tokens)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_the_load_of_experts_is_what_the_router_says(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "model", FAMILIES[name])
    engine = make_engine(path)
    assert set(engine.expert_load()) == {0, 1, 2}
    assert all(sum(load) == 0 for load in engine.expert_load().values())
    prompt = random_prompt(30, seed=1)
    tokens = run(engine, make_request("a", prompt, max_tokens=5))["a"]
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    computed = torch.tensor([[*prompt, *tokens[:-1]]])
    routers = model(computed, output_router_logits=True).router_logits
    for layer, logits in enumerate(routers):
        chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
        counts = chosen.bincount(minlength=logits.shape[-1])
        assert engine.expert_load()[layer] == tuple(counts.tolist())


def test_dense_layers_have_no_load_of_experts(tmp_path: Path) -> None:
    deepseek = make_engine(write_model(tmp_path / "deepseek", FAMILIES["deepseek-v3"]))
    run(deepseek, make_request("a", random_prompt(9, seed=1), max_tokens=1))
    assert {layer: sum(load) for layer, load in deepseek.expert_load().items()} == {1: 18, 2: 18}
    assert make_engine(write_model(tmp_path / "llama", FAMILIES["llama-mha"])).expert_load() == {}


def test_a_deep_mixture_of_experts_is_not_refused_for_rounding(tmp_path: Path) -> None:
    config = type(FAMILIES["deepseek-v3"]).from_dict(
        FAMILIES["deepseek-v3"].to_dict() | {"num_hidden_layers": 16}
    )
    path = write_model(tmp_path / "model", config, dtype=torch.bfloat16)
    # Where two experts are as good, rounding decides, and 16 layers on the logits are others.
    assert load_model(path, dtype="bf16", device="cpu").spec.dtype == "bf16"


LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS: dict[str, Any] = {"num_experts": 2, "moe_intermediate_size": 16}
NO_HEADS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2}
LLAMA4: dict[str, Any] = {"head_dim": 12, "intermediate_size_mlp": 96, "num_local_experts": 2}
HALF_ROTARY: dict[str, Any] = {"partial_rotary_factor": 0.5}
REFUSED: list[tuple[PreTrainedConfig, str]] = [
    (BertConfig(**SMALL), "BertLMHeadModel is an encoder"),
    (BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=48, n_layer=2, n_head=4), "the layout of"),
    (DeepseekV32Config(**SMALL, **LATENT, n_routed_experts=8), "of kind indexed_attention"),
    (DiffLlamaConfig(**GROUPED), "does not attend once a layer"),
    (DogeConfig(**GROUPED), "works on attention masks itself"),
    (FalconConfig(**SMALL), "does not call the attention it is given"),
    (JambaConfig(**GROUPED, num_experts=2), "of kind linear_attention; .* the KV of each token"),
    (Llama4TextConfig(**GROUPED, **LLAMA4), "of kind chunked_attention"),
    (MambaConfig(**NO_HEADS), "of kind linear_attention"),
    (NanoChatConfig(**GROUPED), "the embedding of NanoChatForCausalLM does not do"),
    (Qwen3NextConfig(**GROUPED, **EXPERTS), "of kind linear_attention"),
    (RwkvConfig(**NO_HEADS), "keeps a recurrent state"),
    (StableLmConfig(**GROUPED, **HALF_ROTARY), "does not pass extra arguments on"),
]


@pytest.mark.parametrize(
    ("config", "reason"), [pytest.param(*case, id=case[0].model_type) for case in REFUSED]
)
def test_what_would_go_wrong_is_refused_with_the_reason(
    tmp_path: Path, config: PreTrainedConfig, reason: str
) -> None:
    path = write_model(tmp_path / "model", config)
    with pytest.raises(UnsupportedModel, match=reason):
        load_model(path, device="cpu")


def test_what_generates_no_text_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["opt"])
    ViTConfig().save_pretrained(path)
    with pytest.raises(UnsupportedModel, match="no causal language model for vit"):
        load_model(path, device="cpu")
