"""A transformers model as a chain: embedding, layers one by one, head."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from shared.engine import probe
from shared.engine.attention import AttentionBackend, AttentionBatch
from shared.engine.experts import ExpertLoad
from shared.engine.families import ModelParts, find_parts
from shared.engine.fused import FUSED_MODELS, FusedHead, FusedLayer, RotaryTable, fusable_layers
from shared.engine.kernels import LayerKernels
from shared.engine.native.library import load_library
from shared.engine.quantize import quantize, require_packages, require_torchao, stored_bytes
from shared.engine.select import make_kernels
from shared.engine.spec import ModelSpec, fingerprint
from shared.errors import BanyanError, ConfigError, OutOfMemory, UnsupportedModel
from shared.kvcache.codec import PLAIN_DTYPES
from shared.kvcache.layout import KVLayout
from shared.kvcache.pool import KVPool
from shared.kvcache.sizing import device_memory_bytes

logger = logging.getLogger(__name__)

PROBE_BLOCK_SIZE = 64  # holds all tokens of the probe

# Their frequencies depend on the longest request of a batch beyond the original context.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class ModelChain:
    """A loaded model, run in segments ``[lo, hi)`` of its layers by whoever holds it.

    Tokens of all requests are flattened into one dimension. Every method runs without gradients
    and changes nothing but the KV cache behind ``batch.backend`` and the counts in
    ``expert_load``.
    """

    def __init__(
        self, parts: ModelParts, spec: ModelSpec, device: torch.device, kernels: LayerKernels
    ) -> None:
        self.spec = spec
        self.device = device
        self.expert_load = ExpertLoad(parts.layers, device)
        self.kernels = kernels
        self._parts = parts
        self._rotary: RotaryTable | None = None
        self._fused: list[FusedLayer | None] = [None] * spec.num_layers

    @property
    def num_fused_layers(self) -> int:
        """How many layers run in their fused form."""
        return sum(layer is not None for layer in self._fused)

    def attention(self, pool: KVPool) -> AttentionBackend:
        """The best attention there is for this model, device and pool."""
        return self.kernels.attention(pool, self.spec)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[num_tokens, hidden_size]`` of token ids at positions.

        Both are ``[num_tokens]`` int64 on the device.
        """
        hidden = self._parts.embed(token_ids.unsqueeze(0), positions.unsqueeze(0))[0]
        return hidden.to(self.kernels.activation_dtype)

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
        cos_sin = None if self._rotary is None else self._rotary.lookup(batch.positions)
        embeddings: Sequence[Any] | None = None
        for index in range(lo, hi):
            fused = self._fused[index]
            if fused is not None and cos_sin is not None:
                hidden = fused(hidden, batch, cos_sin)
            else:
                if embeddings is None:
                    positions = batch.positions.unsqueeze(0)
                    embeddings = self._parts.position_embeddings(hidden[None], positions, lo, hi)
                hidden = self._run_module(index, hidden, batch, embeddings[index - lo])
            if on_layer is not None:
                on_layer(index)
        return hidden

    def _run_module(
        self, index: int, hidden: Tensor, batch: AttentionBatch, position_embeddings: Any
    ) -> Tensor:
        output: Tensor = self._parts.layers[index](
            hidden.unsqueeze(0),
            attention_mask=None,
            position_ids=batch.positions.unsqueeze(0),
            past_key_values=None,
            use_cache=False,
            banyan_batch=batch,
            position_embeddings=position_embeddings,
        )
        return output[0]

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[num_rows, vocab_size]`` fp32 of rows of hidden states behind the last layer."""
        return self._parts.head(hidden).float()

    def fuse(self, expected: probe.Trace, dtype: str) -> None:
        """Replace the pieces that have a fused form by it, if it does what they did.

        ``expected`` is what went into and out of each. The modules of replaced layers are let go.
        """
        rotary = self._parts.rotary
        fusable = fusable_layers(list(self._parts.layers))
        # Without one there is no use for a table, and not every rotary embedding makes cosines.
        if rotary is None or self._parts.rotary_kinds or not any(fusable):
            return
        self._rotary = RotaryTable(rotary, self.device)
        self._rotary.reserve(self.spec.max_model_len)
        layers = self._parts.layers
        for index, is_fusable in enumerate(fusable):
            if not is_fusable:
                continue
            self._fused[index] = FusedLayer(layers[index], self.kernels)
            given, output = expected.hidden[index : index + 2]
            error = probe.piece_error(given, output, _run_layer(self, index, given))
            if error <= probe.TOLERANCE[dtype]:
                layers[index] = nn.Identity()
            else:
                logger.warning(
                    "fused layer differs from its module, which stays",
                    extra={"layer": index, "relative_error": error},
                )
                self._fused[index] = None
        if self.num_fused_layers == self.spec.num_layers and self._parts.plain_head is not None:
            norm, output_layer = self._parts.plain_head
            self._parts = replace(self._parts, head=FusedHead(norm, output_layer, self.kernels))


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    on_progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> ModelChain:
    """Load a decoder-only transformers model from a local directory of safetensors.

    ``dtype`` ``auto`` is bf16, but fp32 for fp32 checkpoints and on a CPU without bf16
    instructions; with ``quantization`` it is always bf16, for which the kernels are. ``device``
    ``auto`` is the GPU if there is one. ``quantization`` is done to the weights after loading
    (``shared.engine.quantize``); checkpoints that are quantised already load as they are.
    No code from the checkpoint is run. Raises ``UnsupportedModel`` saying what is in the
    way, ``ConfigError`` for settings that this machine or checkpoint cannot follow, ``OutOfMemory``
    if the weights do not fit.
    """
    config = _read_config(path)
    target = torch.device(_pick_device(device))
    _check_quantization(path, config, quantization)
    if dtype == "auto":
        dtype = _pick_dtype(config, target) if quantization is None else "bf16"
    # Weights that are to be quantised move to the device one by one, when they are.
    first = target if quantization is None else torch.device("cpu")
    _check_memory(path, first)
    on_progress("loading weights", 0.05)
    probe.register_attention()
    model = _load(path, config, dtype, first)
    if quantization is not None:
        on_progress(f"quantising weights to {quantization}", 0.5)
        model = quantize(model, quantization, target, has_bf16_hardware=cpu_has_bf16())
    dtype = _loaded_dtype(model, dtype)
    on_progress("checking the model", 0.8)
    is_widened = dtype == "bf16" and _can_widen(config, target) and quantization is None
    kernels = make_kernels(target, torch.float32 if is_widened else model.dtype)
    return _verified_chain(path, model, dtype, target, quantization, kernels)


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
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"transformers has no causal language model for {config.model_type}")
    return config


def _check_quantization(path: Path, config: PreTrainedConfig, quantization: str | None) -> None:
    is_quantised = require_packages(path, config)
    if quantization is not None:
        require_torchao(quantization)
        if is_quantised:
            raise ConfigError(f"quantization={quantization!r}: {path} is quantised already")


def _pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no GPU")
    return device


def _pick_dtype(config: PreTrainedConfig, device: torch.device) -> str:
    if getattr(config, "dtype", None) in (None, torch.float32):
        return "fp32"
    # Without instructions of its own bf16 is emulated, several times slower than fp32, but for the
    # models whose weights our kernels widen as they read them.
    is_fast = device.type != "cpu" or cpu_has_bf16() or _can_widen(config, device)
    return "bf16" if is_fast else "fp32"


def _can_widen(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether bf16 weights are used with fp32 activations."""
    return (
        device.type == "cpu"
        and not cpu_has_bf16()
        and config.model_type in FUSED_MODELS
        and getattr(config, "quantization_config", None) is None
        and load_library() is not None
    )


def _loaded_dtype(model: PreTrainedModel, dtype: str) -> str:
    """What transformers made of ``dtype``: for some quantised checkpoints only fp16 will do."""
    return next((name for name, kind in PLAIN_DTYPES.items() if kind is model.dtype), dtype)


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
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=PLAIN_DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, report = pair
        if report["missing_keys"]:
            # transformers would leave random numbers in their place.
            raise UnsupportedModel(f"{path} lacks {', '.join(sorted(report['missing_keys']))}")
        loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        return loaded
    except UnsupportedModel:
        raise
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise OutOfMemory(f"the weights in {path} do not fit on {device}: {exc}") from exc
    except Exception as exc:
        raise UnsupportedModel(f"{path}: {type(exc).__name__}: {exc}") from exc


def _verified_chain(
    path: Path,
    model: PreTrainedModel,
    dtype: str,
    device: torch.device,
    quantization: str | None,
    kernels: LayerKernels,
) -> ModelChain:
    """Take the model apart and make sure that the parts do what the whole does."""
    parts = find_parts(model)
    max_model_len = _max_model_len(model.config.get_text_config())
    num_tokens = min(probe.NUM_PROBE_TOKENS, max_model_len)
    token_ids = torch.arange(1, num_tokens + 1, device=device) * 7919 % parts.vocab_size
    try:
        notes = probe.observe(model, token_ids.unsqueeze(0))
        if len(notes.layers) != len(parts.layers):
            raise UnsupportedModel(f"{len(notes.layers)} of {len(parts.layers)} layers attend")
        content = fingerprint(path, dtype, quantization)
        spec = _make_spec(model, parts, notes, dtype, max_model_len, content)
        chain = ModelChain(parts, spec, device, kernels)
        expected = probe.trace(model, parts.layers, notes, token_ids.unsqueeze(0))
        chain.fuse(expected, dtype)
        if kernels.activation_dtype is not model.dtype and chain.num_fused_layers < spec.num_layers:
            raise UnsupportedModel(
                f"this CPU has no bf16 instructions and {spec.architecture} no layers that do "
                "without; load it with dtype fp32"
            )
        ours = _trace_pieces(chain, token_ids, expected)
        probe.compare(type(model).__name__, expected, ours, dtype)
        chain.expert_load.reset()
    except BanyanError:
        raise
    except Exception as exc:
        raise UnsupportedModel(f"{type(model).__name__}: {type(exc).__name__}: {exc}") from exc
    return chain


def _make_spec(
    model: PreTrainedModel,
    parts: ModelParts,
    notes: probe.AttentionNotes,
    dtype: str,
    max_model_len: int,
    content: str,
) -> ModelSpec:
    layout = KVLayout(layers=tuple(notes.layers), dtype=dtype)
    return ModelSpec(
        architecture=type(model).__name__,
        num_layers=len(parts.layers),
        num_kv_heads=notes.layers[0].num_kv_heads,
        head_dim=notes.layers[0].head_dim,
        hidden_size=model.config.get_text_config().hidden_size,
        vocab_size=parts.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(model),
        dtype=dtype,
        fingerprint=content,
        param_bytes=stored_bytes(model),
        kv_bytes_per_token=layout.token_bytes,
        kv_layers=layout.layers,
        sliding_windows=tuple(notes.windows),
        attention_features=frozenset(notes.features),
    )


@torch.inference_mode()
def _trace_pieces(chain: ModelChain, token_ids: Tensor, expected: probe.Trace) -> probe.Trace:
    """What each of our pieces makes of its input in ``expected``."""
    positions = torch.arange(len(token_ids), device=chain.device)
    hidden = [chain.embed(token_ids, positions)]
    hidden += [
        _run_layer(chain, index, expected.hidden[index]) for index in range(chain.spec.num_layers)
    ]
    last = expected.hidden[-1].to(chain.kernels.activation_dtype)
    return probe.Trace(tuple(hidden), chain.head(last))


@torch.inference_mode()
def _run_layer(chain: ModelChain, index: int, given: Tensor) -> Tensor:
    """Layer ``index`` on ``given``, in two chunks of tokens, so that the cache is read too."""
    num_tokens = len(given)
    backend = chain.attention(KVPool(chain.spec.kv_layout(PROBE_BLOCK_SIZE), 1, chain.device))
    outputs = []
    for start, end in ((0, num_tokens // 2), (num_tokens // 2, num_tokens)):
        positions = torch.arange(start, end, device=chain.device)
        batch = AttentionBatch(positions, positions, [0, end - start], [end], [[0]], backend)
        chunk = given[start:end].to(chain.kernels.activation_dtype, copy=True)
        outputs.append(chain.run_layers(index, index + 1, chunk, batch))
    return torch.cat(outputs)


def _max_model_len(config: PreTrainedConfig) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise UnsupportedModel(f"{config.model_type} does not say how many positions it has")
    parameters = getattr(config, "rope_parameters", None) or {}
    # Either of all layers or by kind of layer.
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            # Up to there the frequencies are constant; beyond, KV would depend on the company it
            # keeps.
            limit = min(limit, rope.get("original_max_position_embeddings", limit))
    return limit


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    config = model.config
    sources = (config, config.get_text_config(), getattr(model, "generation_config", None))
    values = [getattr(source, "eos_token_id", None) for source in sources]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return frozenset(token for tokens in lists for token in tokens if token is not None)
