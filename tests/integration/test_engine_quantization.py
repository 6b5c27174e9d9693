"""Engines whose weights are int8 or int4, by torchao or by their checkpoint."""

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, MixtralConfig, OPTConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from shared.engine.config import EngineConfig
from shared.engine.model import load_model
from shared.engine.profile import ProfileOptions, run_profile
from shared.engine.thread import EngineInfo
from shared.errors import ConfigError, UnsupportedModel
from shared.worker.config import WorkerSettings
from shared.worker.latency import first_model
from tests.engines import make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, VOCAB_SIZE, write_model

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "opt": OPTConfig(  # with biases and projections around its layers
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, config) for name, config in CONFIGS.items()}


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization")


@torch.inference_mode()
def logits_of(path: Path, token_ids: list[int], **settings: Any) -> torch.Tensor:
    """The model's logits ``[num_tokens, vocab_size]`` by transformers' own loop, in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, **settings)
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


# -- int8 and int4 when loading


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "fp32"), ("llama", "bf16"), ("opt", "bf16"), ("mixtral", "fp32")],
)
def test_int8_is_a_quarter_of_fp32_and_serves(
    models: dict[str, Path], torchao: Any, family: str, dtype: str
) -> None:
    engine = make_engine(models[family], dtype=dtype, quantization="int8")
    full = load_model(models[family], dtype=dtype).spec
    quantised = engine.spec
    assert quantised.dtype == full.dtype == dtype
    embedding_bytes = VOCAB_SIZE * 64 * (4 if dtype == "fp32" else 2)
    saved = full.param_bytes - quantised.param_bytes
    assert saved > 0.4 * (full.param_bytes - 2 * embedding_bytes)
    prompt = random_prompt(20, 1)
    assert len(run(engine, make_request("a", prompt))["a"]) == 16


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_int4_is_smaller_still_and_serves(
    models: dict[str, Path], torchao: Any, family: str
) -> None:
    engine = make_engine(models[family], dtype="auto", quantization="int4")
    assert engine.spec.dtype == "bf16"
    int8 = load_model(models[family], dtype="bf16", quantization="int8").spec
    assert engine.spec.param_bytes < int8.param_bytes
    assert len(run(engine, make_request("a", random_prompt(20, 1)))["a"]) == 16


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_int8_in_fp32_does_not_depend_on_chunks_or_company(
    models: dict[str, Path], torchao: Any, family: str
) -> None:
    prompts = [random_prompt(length, length) for length in (40, 7, 23)]
    requests = [make_request(str(i), prompt) for i, prompt in enumerate(prompts)]
    together = run(make_engine(models[family], quantization="int8"), *requests)
    engine = make_engine(models[family], quantization="int8", max_num_batched_tokens=64)
    for i, prompt in enumerate(prompts):
        assert run(engine, make_request(str(i), prompt))[str(i)] == together[str(i)]


def test_the_fingerprint_tells_what_was_done_to_the_weights(
    models: dict[str, Path], torchao: Any
) -> None:
    specs = [
        load_model(models["llama"], dtype="bf16", quantization=method).spec
        for method in (None, "int8", "int8", "int4")
    ]
    full, int8, again, int4 = (spec.fingerprint for spec in specs)
    assert int8 == again
    assert len({full, int8, int4}) == 3


def test_a_profile_is_for_the_weights_it_was_measured_with(
    models: dict[str, Path], torchao: Any
) -> None:
    path = models["llama"]
    config = EngineConfig(
        model_path=str(path), dtype="fp32", device="cpu", num_blocks=64, quantization="int8"
    )
    profiled = run_profile(config, ProfileOptions(budget_s=1.0)).model
    settings = WorkerSettings.load(model=str(path))
    for method, is_taken in (("int8", True), (None, False)):
        engine = make_engine(path, quantization=method)
        info = EngineInfo(
            spec=engine.spec,
            layout=engine.layout,
            num_blocks=engine.num_blocks,
            max_model_len=engine.max_model_len,
            device=str(engine.device),
        )
        assert first_model(profiled, info, settings)[1] == is_taken


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 50])
def test_the_packed_int8_kernel_computes_what_torchao_computes(
    torchao: Any, has_bias: bool, num_rows: int
) -> None:
    from shared.engine.quantize import Int8Linear

    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=has_bias).bfloat16().requires_grad_(False)
    torchao.quantize_(plain, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    packed = deepcopy(plain)
    packed.__class__ = Int8Linear
    # The second half of a buffer is as aligned as the kernel needs it, the last one is not.
    buffer = torch.randn(2 * num_rows, 48).bfloat16()
    odd = torch.randn(48 * num_rows + 1).bfloat16()[1:].view(num_rows, 48)
    for limit in (None, 8):
        packed.max_packed_rows = limit  # type: ignore[assignment]
        for rows in (buffer[num_rows:], odd):
            expected = functional.linear(rows, plain.weight, plain.bias)
            torch.testing.assert_close(packed(rows[None])[0], expected, rtol=0.02, atol=0.02)


def test_experts_cannot_be_int4(models: dict[str, Path], torchao: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"int4.*experts of mixtures can be int8 only"):
        load_model(models["mixtral"], quantization="int4")


def test_shapes_that_the_int4_kernels_cannot_take_are_refused(tmp_path: Path, torchao: Any) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])  # rows of 48, no multiple of 32
    with pytest.raises(UnsupportedModel, match=r"of \d+ bytes .* only \d+ have a shape that int4"):
        load_model(path, quantization="int4")
    assert make_engine(path, quantization="int8", dtype="bf16").spec.dtype == "bf16"


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"quantization": "int3"}, "quantization='int3'"),
     ({"quantization": "int4", "dtype": "fp32"}, "dtype='fp32'")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineConfig(model_path="x", **settings)


def test_without_torchao_the_error_names_the_extra(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"quantization='int8'.*torchao.*extra 'quant'"):
        load_model(models["llama"], quantization="int8")


# -- checkpoints that are quantised already


def with_quantization_config(source: Path, target: Path, config: dict[str, Any]) -> Path:
    """A copy of a checkpoint that says it was quantised."""
    shutil.copytree(source, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    return target


@pytest.mark.parametrize(
    ("method", "module", "package"),
    [("gptq", "gptqmodel", "gptqmodel"),
     ("awq", "gptqmodel", "gptqmodel"),
     ("torchao", "torchao", "torchao"),
     ("compressed-tensors", "compressed_tensors", "compressed-tensors")],
)  # fmt: skip
def test_a_checkpoint_whose_library_is_missing_is_refused_by_name(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    module: str,
    package: str,
) -> None:
    config = {"quant_method": method, "bits": 4, "group_size": 32}
    path = with_quantization_config(models["llama"], tmp_path / "model", config)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedModel, match=rf"quantised with {method}.*{package} .*installed"):
        load_model(path)


def test_a_method_that_transformers_does_not_have_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    config = {"quant_method": "runes"}
    path = with_quantization_config(models["llama"], tmp_path / "model", config)
    with pytest.raises(UnsupportedModel, match="runes"):
        load_model(path)


def test_a_checkpoint_without_some_weights_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(models["llama"], path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lacks model.layers.1.self_attn.q_proj.weight"):
        load_model(path)


def test_a_torchao_checkpoint_is_served_as_transformers_loads_it(
    models: dict[str, Path], tmp_path: Path, torchao: Any
) -> None:
    from transformers import TorchAoConfig

    scheme = TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(models["llama"]), dtype=torch.float32, quantization_config=scheme
    )
    path = tmp_path / "model"
    model.save_pretrained(path)
    engine = make_engine(path)
    assert engine.spec.param_bytes < load_model(models["llama"], dtype="fp32").spec.param_bytes
    prompt = random_prompt(12, 3)
    tokens = run(engine, make_request("a", prompt, max_tokens=1))["a"]
    assert tokens == [int(logits_of(path, list(prompt))[-1].argmax())]
    with pytest.raises(ConfigError, match=r"quantization='int8'.*quantised already"):
        load_model(path, quantization="int8")


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_a_compressed_tensors_checkpoint_is_served_as_transformers_loads_it(
    models: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    path = write_compressed(models["llama"], tmp_path / "model", scheme)
    engine = make_engine(path)
    prompt = random_prompt(12, 3)
    tokens = run(engine, make_request("a", prompt, max_tokens=1))["a"]
    expected = logits_of(path, list(prompt))
    assert tokens == [int(expected[-1].argmax())]
    error = (expected - logits_of(models["llama"], list(prompt))).norm() / expected.norm()
    assert 1e-4 < error < (0.05 if scheme == "W8A16" else 0.7)


def write_compressed(source: Path, target: Path, scheme: str) -> Path:
    """Quantise the linear layers of a checkpoint by rounding, packed by compressed-tensors."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    group = quantization.preset_name_to_scheme(scheme, ["Linear"])
    group.weights.strategy, group.weights.group_size = "channel", None
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="initialized"
    )
    quantization.apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            limit = 2 ** (group.weights.num_bits - 1) - 0.5
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / limit
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
    return target
