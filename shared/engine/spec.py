"""What one has to know about a loaded model; and a fingerprint of its content."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from shared.kvcache.layout import KVLayout, LayerKV

SAMPLE_BYTES = 1 << 16
SAMPLES_PER_FILE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Facts about a loaded model.

    ``dtype`` (``bf16``, ``fp32``, or ``fp16`` where a checkpoint insists on it) is that of weights
    and activations, and of KV too unless ``kv_cache_dtype`` (``int8`` or ``fp8``) is set.
    ``num_kv_heads`` and ``head_dim`` are those of the first layer; ``kv_layers`` has every layer's,
    and ``sliding_windows`` how many tokens it looks back (its own included), ``None`` for all.
    ``attention_features`` are what an attention backend must have for it beyond plain attention
    (``softcap``, ``sinks``). ``kv_bytes_per_token`` is what is stored: for multi-head latent
    attention (DeepSeek) expanded keys and values of ``head_dim`` each, not latents.
    ``max_model_len`` is the number of positions the model was made for. ``fingerprint`` is equal
    for equal content whatever the path or host, and everything that KV depends on is in it.
    """

    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    dtype: str
    fingerprint: str
    param_bytes: int
    kv_bytes_per_token: int
    kv_layers: tuple[LayerKV, ...]
    sliding_windows: tuple[int | None, ...]
    attention_features: frozenset[str]
    kv_cache_dtype: str | None = None

    def with_kv_cache_dtype(self, dtype: str) -> "ModelSpec":
        """The same model with its KV stored as ``dtype``."""
        spec = replace(self, kv_cache_dtype=dtype)
        return replace(spec, kv_bytes_per_token=spec.kv_layout(1).token_bytes)

    def kv_layout(self, block_size: int) -> KVLayout:
        """The layout of this model's KV in blocks of ``block_size`` tokens."""
        dtype = self.kv_cache_dtype or self.dtype
        return KVLayout(layers=self.kv_layers, block_size=block_size, dtype=dtype)


def fingerprint(path: Path, dtype: str, quantization: str | None = None) -> str:
    """Hash of a model directory, 32 hex digits, cheap for any size.

    Covers ``dtype``, ``quantization`` (what is done to the weights after loading; what a checkpoint
    has been through before is in its configuration), ``config.json`` and of every
    ``*.safetensors`` file its name, size, header and ``SAMPLES_PER_FILE`` evenly spaced slices.
    Weights that differ only between the slices are not told apart, which an edit by training never
    does.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = json.loads((path / "config.json").read_text())
    # Says who saved it, not what it is.
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    digest.update(json.dumps([dtype, quantization, config], sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_size, size)))
            for index in range(SAMPLES_PER_FILE):
                stream.seek(size * index // SAMPLES_PER_FILE)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
