"""The engine gives the tokens that transformers gives, whatever the batch looks like."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from shared.engine.config import EngineConfig
from shared.engine.model import load_model
from shared.engine.sampler import SamplingRow, sample
from shared.errors import BanyanError, ConfigError, OutOfMemory, UnsupportedModel
from tests.engines import Collector, Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model

TINY_CHAT = Path(__file__).parents[2] / "models" / "tiny-chat"
USED = ("llama-gqa", "llama-mha", "mistral-window", "opt", "qwen2-mixed", "qwen3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, FAMILIES[name]) for name in USED}


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "opt"])
def test_preempted_requests_go_on_as_if_nothing_had_happened(
    models: dict[str, Path], family: str
) -> None:
    engine = make_engine(models[family], num_blocks=9, enable_prefix_cache=False)
    reference = Reference(models[family])
    requests = [
        make_request(str(i), random_prompt(length, seed=i), max_tokens=24)
        for i, length in enumerate((9, 14, 12))
    ]
    tokens = run(engine, *requests)
    assert engine.stats().total_preemptions > 0
    assert engine.stats().num_free_blocks == 9
    for request in requests:
        reference.assert_same(request.prompt_token_ids, tokens[request.request_id])


@pytest.mark.parametrize("family", ["llama-mha", "qwen2-mixed"])
def test_a_cached_prefix_gives_the_same_tokens(models: dict[str, Path], family: str) -> None:
    engine = make_engine(models[family])
    reference = Reference(models[family])
    shared = random_prompt(30, seed=1)
    prompts = [shared, shared + random_prompt(9, seed=2), shared[:24], shared]
    for i, prompt in enumerate(prompts):
        tokens = run(engine, make_request(str(i), prompt))[str(i)]
        reference.assert_same(prompt, tokens)
    # 0, then 24 (all full blocks), 16 (one token at least is computed), 24
    assert engine.stats().total_cached_tokens == 64
    other = make_request("other", shared, tenant="somebody else")
    assert engine.num_cached_tokens(other) == 0


def test_generation_stops_at_the_model_s_end_of_sequence(models: dict[str, Path]) -> None:
    path = models["llama-gqa"]
    reference = Reference(path)
    prompt = random_prompt(12, seed=4)
    expected = reference.greedy(prompt, 12)
    index = next(i for i, token in enumerate(expected) if token not in expected[:i] and i >= 3)
    ending = models["llama-gqa"].parent / "ending"
    write_model(ending, _with_eos(FAMILIES["llama-gqa"], expected[index]))
    engine = make_engine(ending)
    engine.add(make_request("a", prompt, ignore_eos=False))
    collector = Collector()
    while (step := engine.step()) is not None:
        collector.take(step.outputs)
    (end,) = collector.ends.values()
    assert end.finish_reason == "stop"
    assert collector.tokens[end.key] == expected[: index + 1]


def _with_eos(config: PreTrainedConfig, token: int) -> PreTrainedConfig:
    changed = config.to_dict() | {"eos_token_id": [token, 2]}
    return type(config).from_dict(changed)


def test_logprobs_agree_with_the_reference(models: dict[str, Path]) -> None:
    engine = make_engine(models["qwen3"])
    prompt = random_prompt(20, seed=8)
    engine.add(make_request("a", prompt, max_tokens=4, logprobs=3))
    tokens: list[int] = []
    while (step := engine.step()) is not None:
        for output in step.outputs:
            expected = Reference(models["qwen3"]).logits([*prompt, *tokens])[-1].log_softmax(-1)
            (logprobs,) = output.logprobs
            assert logprobs.logprob == pytest.approx(float(expected.max()), abs=1e-4)
            top = expected.topk(3)
            assert list(logprobs.top_ids) == top.indices.tolist()
            assert list(logprobs.top_logprobs) == pytest.approx(top.values.tolist(), abs=1e-4)
            tokens += output.token_ids


def test_a_draw_is_a_function_of_seed_and_output_position(models: dict[str, Path]) -> None:
    prompt = random_prompt(20, seed=8)
    request = make_request("a", prompt, temperature=1.3, seed=99)
    tokens = run(make_engine(models["llama-mha"]), request)["a"]
    logits = Reference(models["llama-mha"]).logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    rows = [SamplingRow(request.sampling, position, frozenset()) for position in range(16)]
    assert tokens == [row.token_id for row in sample(logits, rows)]
    assert tokens != logits.argmax(-1).tolist()


def test_bf16_runs_and_stays_close(tmp_path: Path) -> None:
    path = write_model(tmp_path / "bf16", FAMILIES["llama-gqa"], dtype=torch.bfloat16)
    engine = make_engine(path, dtype="bf16")
    assert engine.spec.dtype == engine.layout.dtype == "bf16"
    prompt = random_prompt(30, seed=3)
    tokens = run(engine, make_request("a", prompt))["a"]
    logits = Reference(path).logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


@pytest.mark.skipif(not TINY_CHAT.is_dir(), reason="models/tiny-chat is not here")
def test_the_bundled_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_CHAT))
    engine = make_engine(TINY_CHAT, block_size=64, max_num_batched_tokens=32)
    reference = Reference(TINY_CHAT)
    requests = [
        make_request(text, tokenizer(text)["input_ids"], max_tokens=48, ignore_eos=False)
        for text in ("Hello, who are you?", "Once upon a time", "What is the capital of France?")
    ]
    tokens = run(engine, *requests)
    for request in requests:
        reference.assert_same(
            request.prompt_token_ids, tokens[request.request_id], ignore_eos=False
        )


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["opt"])
    BartConfig().save_pretrained(path)
    with pytest.raises(UnsupportedModel, match="bart is an encoder-decoder"):
        make_engine(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        make_engine(tmp_path / "nothing")
    FAMILIES["opt"].save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"no \*\.safetensors"):
        make_engine(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(UnsupportedModel):
        make_engine(tmp_path)


def test_the_context_of_a_scaled_rope_ends_where_its_frequencies_change(tmp_path: Path) -> None:
    shape = FAMILIES["llama-gqa"].to_dict() | {"max_position_embeddings": 512}
    factors = [1.0] * 6
    shape["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 128,
        "short_factor": factors,
        "long_factor": [4.0] * 6,
        "factor": 4.0,
    }
    path = write_model(tmp_path / "model", LlamaConfig.from_dict(shape))
    engine = make_engine(path)
    assert engine.max_model_len == 128
    prompt = random_prompt(100, seed=1)
    Reference(path).assert_same(prompt, run(engine, make_request("a", prompt))["a"])


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    config = FAMILIES["llama-gqa"]
    paths = [
        write_model(tmp_path / "one", config),
        write_model(tmp_path / "two", config),
        write_model(tmp_path / "other", config, seed=1),
    ]
    one, two, other = (load_model(path, dtype="fp32").spec.fingerprint for path in paths)
    assert one == two
    assert len({one, other, load_model(paths[0], dtype="bf16").spec.fingerprint}) == 3


def test_a_pool_that_cannot_fit_is_refused_with_the_numbers(models: dict[str, Path]) -> None:
    with pytest.raises(OutOfMemory, match="1000000000000 KV blocks of 4608 bytes"):
        make_engine(models["llama-gqa"], num_blocks=10**12)
    with pytest.raises(OutOfMemory, match="kv_cache_bytes 100"):
        make_engine(models["llama-gqa"], num_blocks=None, kv_cache_bytes=100)
    engine = make_engine(models["llama-gqa"], num_blocks=None, kv_cache_bytes=100_000)
    assert engine.num_blocks == 21
    assert engine.max_model_len == 21 * 8


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"dtype": "fp8"}, "dtype='fp8'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"memory_fraction": 1.5}, "memory_fraction=1.5"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"max_num_seqs": 100, "max_num_batched_tokens": 50}, "max_num_batched_tokens=50"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        EngineConfig(model_path="x", **settings)  # type: ignore[arg-type]
    assert issubclass(ConfigError, BanyanError)
