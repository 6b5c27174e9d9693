"""Engines that store keys and values in eight bits."""

from pathlib import Path
from typing import Any

import pytest

from shared.engine.config import EngineConfig
from shared.engine.outputs import KVExport
from shared.errors import ConfigError
from tests.engines import Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model

EIGHT_BITS = ("int8", "fp8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("llama-gqa", "mistral-window", "opt")
    return {name: write_model(folder / name, FAMILIES[name]) for name in names}


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama-gqa", "int8"), ("mistral-window", "fp8"), ("opt", "int8")]
)
def test_the_answer_does_not_depend_on_chunks_or_company(
    models: dict[str, Path], family: str, dtype: str
) -> None:
    prompts = [random_prompt(length, length) for length in (40, 7, 23)]
    requests = [make_request(str(i), prompt) for i, prompt in enumerate(prompts)]
    together = run(make_engine(models[family], kv_cache_dtype=dtype), *requests)
    engine = make_engine(models[family], kv_cache_dtype=dtype, max_num_batched_tokens=64)
    for i, prompt in enumerate(prompts):
        alone = run(engine, make_request(str(i), prompt))[str(i)]
        assert alone == together[str(i)]
        # The same again, its first part out of the prefix cache.
        assert run(engine, make_request(f"{i} again", prompt))[f"{i} again"] == alone


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_resumed_request_goes_on_as_it_would_have(models: dict[str, Path], dtype: str) -> None:
    prompt = random_prompt(21, 1)
    first, second = (make_engine(models["llama-gqa"], kv_cache_dtype=dtype) for _ in range(2))
    whole = run(first, make_request("a", prompt))["a"]
    rest = run(second, make_request("a", prompt, output=whole[:7], attempt=1))["a"]
    assert whole[:7] + rest == whole


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_logits_are_close_to_those_of_the_whole_cache(models: dict[str, Path], dtype: str) -> None:
    prompt = random_prompt(30, 2)
    request = make_request("a", prompt, max_tokens=1, logprobs=5)
    engine = make_engine(models["llama-gqa"], kv_cache_dtype=dtype)
    engine.add(request)
    while (step := engine.step()) is not None:
        for output in step.outputs:
            best = output.logprobs[0]
    expected = Reference(models["llama-gqa"]).logits(prompt)[-1].log_softmax(-1)
    tolerance = 0.05 if dtype == "int8" else 0.3
    for token, logprob in zip(best.top_ids, best.top_logprobs, strict=True):
        assert logprob == pytest.approx(float(expected[token]), abs=tolerance)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_prefill_here_and_decode_there(models: dict[str, Path], dtype: str) -> None:
    exports: list[KVExport] = []
    first = make_engine(models["llama-gqa"], kv_cache_dtype=dtype, kv_sink=exports.append)
    second = make_engine(models["llama-gqa"], kv_cache_dtype=dtype)
    assert first.layout.name == second.layout.name != make_engine(models["llama-gqa"]).layout.name
    prompt = random_prompt(35, 1)
    request = make_request("a", prompt)
    second.reserve(request.key, request.num_tokens)
    first.add(request, prefill_only=True, export=True)
    tokens: list[int] = []
    while (step := first.step()) is not None:
        tokens += [token for output in step.outputs for token in output.token_ids]
    for export in exports:
        num_heads = second.layout.layers[export.layer].num_kv_heads
        second.import_kv(
            request.key, export.layer, export.block_lo, export.block_hi, 0, num_heads, export.data
        )
    second.start_reserved(make_request("a", prompt, output=tokens), num_computed_tokens=len(prompt))
    while (step := second.step()) is not None:
        tokens += [token for output in step.outputs for token in output.token_ids]
    assert second.stats().total_prefill_tokens == 0
    assert tokens == run(make_engine(models["llama-gqa"], kv_cache_dtype=dtype), request)["a"]


def test_a_swapped_request_gets_its_scales_back(models: dict[str, Path]) -> None:
    # Five blocks for two requests that need three each: one has to make room.
    small = make_engine(
        models["llama-gqa"], kv_cache_dtype="int8", num_blocks=5, swap_bytes=1 << 20
    )
    requests = [make_request(str(i), random_prompt(12, i), max_tokens=12) for i in range(2)]
    tokens = run(small, *requests)
    assert small.stats().total_preemptions > 0
    roomy = make_engine(models["llama-gqa"], kv_cache_dtype="int8")
    assert tokens == run(roomy, *requests)


def test_twice_as_many_blocks_fit_into_the_same_memory(models: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"num_blocks": None, "kv_cache_bytes": 1 << 20, "dtype": "bf16"}
    plain, eight = (
        make_engine(models["llama-gqa"], kv_cache_dtype=dtype, **settings)
        for dtype in ("auto", "int8")
    )
    assert eight.num_blocks / plain.num_blocks == pytest.approx(2 * 12 / (12 + 2), rel=0.01)
    assert eight.spec.kv_bytes_per_token * 8 == eight.layout.block_bytes_all_layers
    assert eight.spec.fingerprint == plain.spec.fingerprint
    assert eight.spec.dtype == "bf16"


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype='int2'"):
        EngineConfig(model_path="x", kv_cache_dtype="int2")
