"""A transformers model as a chain: embedding, layers one by one, head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from shared.engine import probe
from shared.engine.attention import AttentionBatch, TorchAttention
from shared.engine.families import ModelParts, find_parts
from shared.engine.spec import ModelSpec, fingerprint
from shared.errors import BanyanError, ConfigError, OutOfMemory, UnsupportedModel
from shared.kvcache.layout import KVLayout
from shared.kvcache.pool import TORCH_DTYPES, KVPool
from shared.kvcache.sizing import device_memory_bytes

# Their frequencies depend on the longest request of a batch beyond the original context.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class ModelChain:
    """A loaded model, run in segments ``[lo, hi)`` of its layers by whoever holds it.

    Tokens of all requests are flattened into one dimension. Every method runs without gradients
    and changes nothing but the KV cache behind ``batch.backend``.
    """

    def __init__(self, parts: ModelParts, spec: ModelSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._parts = parts

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[num_tokens, hidden_size]`` of token ids at positions.

        Both are ``[num_tokens]`` int64 on the device.
        """
        return self._parts.embed(token_ids.unsqueeze(0), positions.unsqueeze(0))[0]

    @torch.inference_mode()
    def run_layers(
        self,
        lo: int,
        hi: int,
        hidden: Tensor,
        batch: AttentionBatch,
        *,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Layers ``[lo, hi)`` on ``hidden`` ``[num_tokens, hidden_size]``; same shape out.

        Each layer writes the KV of the batch's tokens. ``on_layer`` is called right after each
        layer (its KV may still be on its way on an asynchronous device).
        """
        positions = batch.positions.unsqueeze(0)
        hidden = hidden.unsqueeze(0)
        kwargs: dict[str, Any] = {}
        if self._parts.rotary is not None:
            kwargs["position_embeddings"] = self._parts.rotary(hidden, position_ids=positions)
        for index in range(lo, hi):
            hidden = self._parts.layers[index](
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=None,
                use_cache=False,
                banyan_batch=batch,
                **kwargs,
            )
            if on_layer is not None:
                on_layer(index)
        return hidden[0]

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[num_rows, vocab_size]`` fp32 of rows of hidden states behind the last layer."""
        return self._parts.head(hidden).float()


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    on_progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> ModelChain:
    """Load a decoder-only transformers model from a local directory of safetensors.

    ``dtype`` ``auto`` is bf16, but fp32 for fp32 checkpoints and on a CPU without bf16
    instructions. ``device`` ``auto`` is the GPU if there is one. No code from the checkpoint is
    run. Raises ``UnsupportedModel`` saying what is in the way, ``OutOfMemory`` if the weights do
    not fit.
    """
    config = _read_config(path)
    target = torch.device(_pick_device(device))
    if dtype == "auto":
        dtype = _pick_dtype(config, target)
    _check_memory(path, target)
    on_progress("loading weights", 0.05)
    probe.register_attention()
    model = _load(path, config, dtype, target)
    on_progress("checking the model", 0.8)
    return _verified_chain(path, model, dtype, target)


def _read_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise UnsupportedModel(f"{path} is no model directory: it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise UnsupportedModel(f"{path} has no *.safetensors; other weight files are not loaded")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as exc:
        raise UnsupportedModel(f"{path}: {exc}") from exc
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder")
    return config


def _pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no GPU")
    return device


def _pick_dtype(config: PreTrainedConfig, device: torch.device) -> str:
    if getattr(config, "dtype", None) in (None, torch.float32):
        return "fp32"
    # Without instructions of its own bf16 is emulated, several times slower than fp32.
    return "bf16" if device.type != "cpu" or cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(has) for name, has in capabilities.items() if "bf16" in name)


def _check_memory(path: Path, device: torch.device) -> None:
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    total = device_memory_bytes(device)
    if size > total:
        raise OutOfMemory(f"the weights in {path} are {size} bytes; {device} has {total}")


def _load(
    path: Path, config: PreTrainedConfig, dtype: str, device: torch.device
) -> PreTrainedModel:
    # Progress goes to the caller; bars on stderr would only spoil a service's log.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=probe.PAGED_ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        return loaded
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise OutOfMemory(f"the weights in {path} do not fit on {device}: {exc}") from exc
    except Exception as exc:
        raise UnsupportedModel(f"{path}: {type(exc).__name__}: {exc}") from exc


def _verified_chain(
    path: Path, model: PreTrainedModel, dtype: str, device: torch.device
) -> ModelChain:
    """Take the model apart and make sure that the parts do what the whole does."""
    parts = find_parts(model)
    max_model_len = _max_model_len(model.config)
    num_tokens = min(probe.NUM_PROBE_TOKENS, max_model_len)
    token_ids = torch.arange(1, num_tokens + 1, device=device) * 7919 % parts.vocab_size
    try:
        notes = probe.observe(model, token_ids.unsqueeze(0))
        if len(notes.layers) != len(parts.layers):
            raise UnsupportedModel(f"{len(notes.layers)} of {len(parts.layers)} layers attend")
        spec = _make_spec(path, model, parts, notes, dtype, max_model_len)
        chain = ModelChain(parts, spec, device)
        probe.compare(model, token_ids.unsqueeze(0), _probe_logits(chain, token_ids), dtype)
    except BanyanError:
        raise
    except Exception as exc:
        raise UnsupportedModel(f"{type(model).__name__}: {type(exc).__name__}: {exc}") from exc
    return chain


def _make_spec(
    path: Path,
    model: PreTrainedModel,
    parts: ModelParts,
    notes: probe.AttentionNotes,
    dtype: str,
    max_model_len: int,
) -> ModelSpec:
    layout = KVLayout(layers=tuple(notes.layers), dtype=dtype)
    param_bytes = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    return ModelSpec(
        architecture=type(model).__name__,
        num_layers=len(parts.layers),
        num_kv_heads=notes.layers[0].num_kv_heads,
        head_dim=notes.layers[0].head_dim,
        hidden_size=model.config.hidden_size,
        vocab_size=parts.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(model),
        dtype=dtype,
        fingerprint=fingerprint(path, dtype),
        param_bytes=sum(param_bytes.values()),
        kv_bytes_per_token=layout.token_bytes,
        kv_layers=layout.layers,
        sliding_windows=tuple(notes.windows),
    )


@torch.inference_mode()
def _probe_logits(chain: ModelChain, token_ids: Tensor) -> Tensor:
    """Logits of all tokens by our loop, in two chunks so that the cache is read too."""
    num_tokens = token_ids.shape[0]
    layout = chain.spec.kv_layout(num_tokens)
    backend = TorchAttention(KVPool(layout, 1, chain.device), chain.spec.sliding_windows)
    logits = []
    for start, end in ((0, num_tokens // 2), (num_tokens // 2, num_tokens)):
        positions = torch.arange(start, end, device=chain.device)
        batch = AttentionBatch(positions, positions, [0, end - start], [end], [[0]], backend)
        hidden = chain.embed(token_ids[start:end], positions)
        logits.append(chain.head(chain.run_layers(0, chain.spec.num_layers, hidden, batch)))
    return torch.cat(logits)


def _max_model_len(config: PreTrainedConfig) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise UnsupportedModel(f"{config.model_type} does not say how many positions it has")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        # Up to there the frequencies are constant; beyond, KV would depend on the company it keeps.
        limit = rope.get("original_max_position_embeddings", limit)
    return limit


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    sources = (model.config, getattr(model, "generation_config", None))
    values = [getattr(source, "eos_token_id", None) for source in sources]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return frozenset(token for tokens in lists for token in tokens if token is not None)
