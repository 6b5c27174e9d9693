"""What a loaded model costs and what it runs on, for the latency model."""

import platform
from pathlib import Path

import torch
from transformers import AutoConfig

from shared.core.latency_model import ModelFacts, windows_of
from shared.engine.spec import ModelSpec

BYTES_PER_PARAM = {"bf16": 2, "fp16": 2, "fp32": 4}
CPU_INFO = Path("/proc/cpuinfo")


def facts_of(spec: ModelSpec, path: Path) -> ModelFacts:
    """Count FLOPs and bytes of the model in ``path`` from its configuration and what was loaded.

    All experts of a mixture are counted, of which a token uses some, and quantised weights as if
    they were fewer: a fitted rate makes up for both.
    """
    config = AutoConfig.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    ).get_text_config()
    num_heads = getattr(config, "num_attention_heads", spec.num_kv_heads)
    bytes_per_param = BYTES_PER_PARAM[spec.dtype]
    head_params = spec.vocab_size * spec.hidden_size
    # A tied head is the embedding; of an embedding on its own only a few rows are read.
    num_copies = 1 if config.tie_word_embeddings else 2
    layer_param_bytes = max(1, spec.param_bytes - num_copies * head_params * bytes_per_param)
    return ModelFacts(
        num_layers=spec.num_layers,
        layer_param_bytes=layer_param_bytes,
        head_param_bytes=head_params * bytes_per_param,
        layer_flops_per_token=2.0 * layer_param_bytes / bytes_per_param,
        head_flops_per_token=2.0 * head_params,
        attention_flops_per_pair=4.0 * num_heads * spec.head_dim * spec.num_layers,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        windows=windows_of(spec.sliding_windows),
    )


def profile_fingerprint(spec: ModelSpec) -> str:
    """What a profile of a model is known by: its content, and how its KV is stored.

    The model's own fingerprint, with the type of the KV behind it where that has scales: int8 and
    fp8 take the same bytes, but not the same time.
    """
    if spec.kv_cache_dtype is None:
        return spec.fingerprint
    return f"{spec.fingerprint}/{spec.kv_cache_dtype}"


def hardware_of(device: torch.device) -> str:
    """The name of the processor that ``device`` is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
