"""Small random checkpoints of many families, written where a test says."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB_SIZE = 256

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Configurations take more than their signatures say.
_HALF_ROTARY: dict[str, Any] = {**_SHAPE, "partial_rotary_factor": 0.5}
_WIDE_HEADS: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# Multi-head latent attention: keys of 8 + 8 numbers, values of 12.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama-mha": LlamaConfig(**_SHAPE, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=12),
    "qwen2": Qwen2Config(**_SHAPE, num_key_value_heads=2),
    "qwen2-mixed": Qwen2Config(
        **_SHAPE,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=12,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": Qwen3Config(**_WIDE_HEADS),
    "gemma": GemmaConfig(**_SHAPE, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
    "gemma2": Gemma2Config(
        **_WIDE_HEADS,
        query_pre_attn_scalar=16,
        sliding_window=12,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=200.0,
        tie_word_embeddings=False,
    ),
    "gemma3": Gemma3TextConfig(
        **_WIDE_HEADS,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=_MIXED,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt-neox": GPTNeoXConfig(**_HALF_ROTARY),
    "gpt-oss": GptOssConfig(
        **_WIDE_HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=12,
        layer_types=_MIXED,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "granite": GraniteConfig(
        **_SHAPE,
        num_key_value_heads=2,
        embedding_multiplier=0.5,
        logits_scaling=0.5,
        residual_multiplier=1.5,
        attention_multiplier=0.2,
    ),
    "phi": PhiConfig(**_HALF_ROTARY),
    "phi3": Phi3Config(**_SHAPE, num_key_value_heads=2),
    "mixtral": MixtralConfig(
        **_SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2-moe": Qwen2MoeConfig(
        **_SHAPE,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **_WIDE_HEADS,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
    ),
    "deepseek-v2": DeepseekV2Config(
        **_SHAPE,
        **_LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "deepseek-v3": DeepseekV3Config(
        **_SHAPE,
        **_LATENT,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def write_model(
    path: Path, config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a checkpoint of random weights, the same for the same seed, to the new ``path``.

    The weights are wide enough apart for the most likely token to be a clear one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(deepcopy(config))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.5 if "embed" in name else 0.2)
    model.to(dtype).save_pretrained(path)
    return path
