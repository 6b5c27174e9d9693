"""Small random checkpoints of many families, written where a test says."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
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
    "qwen3": Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=16),
    "gemma": GemmaConfig(**_SHAPE, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
    "phi3": Phi3Config(**_SHAPE, num_key_value_heads=2),
    "mixtral": MixtralConfig(
        **_SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
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
