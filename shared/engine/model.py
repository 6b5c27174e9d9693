"""Loads a transformers model and proves that our chain of its parts does what it does."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from shared.engine import probe
from shared.engine.chain import ModelChain
from shared.engine.families import ModelParts, find_parts
from shared.engine.fused import FUSED_MODELS
from shared.engine.kernels import LayerKernels
from shared.engine.native.library import load_library
from shared.engine.quantize import quantize, require_packages, require_torchao, stored_bytes
from shared.engine.select import make_kernels
from shared.engine.spec import ModelSpec, fingerprint
from shared.errors import BanyanError, ConfigError, OutOfMemory, UnsupportedModel
from shared.kvcache.codec import PLAIN_DTYPES
from shared.kvcache.layout import KVLayout
from shared.kvcache.sizing import device_memory_bytes

# Their frequencies depend on the longest request of a batch beyond the original context.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
WEIGHTS_BAR = "Loading weights"
"""What transformers calls the bar that counts weights as they are read."""


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
    loaded = 0.8 if quantization is None else 0.5
    with _counted_weights(lambda share: on_progress("loading weights", loaded * share)):
        model = _load(path, config, dtype, first)
    if quantization is not None:
        on_progress(f"quantising weights to {quantization}", 0.5)
        model = quantize(model, quantization, target, has_bf16_hardware=cpu_has_bf16())
    dtype = _loaded_dtype(model, dtype)
    on_progress("checking the model", 0.8)
    is_widened = dtype == "bf16" and _can_widen(config, target) and quantization is None
    kernels = make_kernels(target, torch.float32 if is_widened else model.dtype)
    return verified_chain(path, model, dtype, target, quantization, kernels)


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


@contextlib.contextmanager
def _counted_weights(on_share: Callable[[float], None]) -> Iterator[None]:
    """Have ``on_share`` told, at each tenth, what share 0..1 of the weights is loaded."""

    def counted(bar: Any) -> Iterator[Any]:
        tenth = 0
        for number, item in enumerate(bar):
            if number * 10 >= (tenth + 1) * len(bar):
                tenth = number * 10 // len(bar)
                on_share(tenth / 10)
            yield item

    def hook(make_bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") == WEIGHTS_BAR and args and hasattr(args[0], "__len__"):
            return counted(args[0])
        return make_bar(*args, **options)

    former = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(former)


def _load(
    path: Path, config: PreTrainedConfig, dtype: str, device: torch.device
) -> PreTrainedModel:
    # Progress goes to the caller; bars on stderr would only spoil a service's log.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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


def verified_chain(
    path: Path,
    model: PreTrainedModel,
    dtype: str,
    device: torch.device,
    quantization: str | None,
    kernels: LayerKernels,
) -> ModelChain:
    """Take the model apart and make sure that the parts do what the whole does.

    ``path`` is where it comes from, for the fingerprint; ``model`` cannot be used afterwards.
    Raises ``UnsupportedModel``.
    """
    probe.register_attention()
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
        ours = chain.trace(token_ids, expected)
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
