"""``banyan profile`` on the bundled model: few steps, the whole way to the file."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.errors import CommandFailed
from cli.main import app
from shared.config import BUNDLED_MODEL
from shared.core.latency_model import LatencyModel
from shared.engine.config import EngineConfig
from shared.engine.facts import facts_of
from shared.engine.profile import ProfileOptions, run_profile
from shared.engine.thread import EngineInfo
from shared.errors import ConfigError, EngineError
from shared.worker.config import WorkerSettings
from shared.worker.latency import first_model, read_profile
from tests.engines import make_engine
from tests.models import FAMILIES, write_model


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_a_profile_is_measured_fitted_written_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    result = run("--budget-s", "2", "--num-threads", "1", "--out", str(path), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    assert json.loads(result.stdout) == data
    model = read_profile(path)
    assert model == LatencyModel.from_dict(data["latency_model"])
    assert (model.device, model.num_threads) == ("cpu", 1)
    assert model.hardware and model.fingerprint
    assert model.prefill_s(512) > 0.0 and model.decode_step_s(4, 1000) > 0.0
    kinds = {errors["kind"]: errors for errors in data["errors"]}
    for kind in ("prefill", "decode"):
        points = [point for point in data["points"] if point["kind"] == kind]
        held_out = [point for point in points if point["is_held_out"]]
        assert kinds[kind]["num_held_out"] == len(held_out) > 0
        assert kinds[kind]["num_fitted"] == len(points) - len(held_out) > 0
        errors = [abs(point["fitted_s"] / point["step_s"] - 1.0) for point in held_out]
        assert kinds[kind]["held_out"] == pytest.approx(sum(errors) / len(errors))


def test_people_get_a_table(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", FAMILIES["mistral-window"])
    path = tmp_path / "latency.json"
    result = run("--model", str(model), "--budget-s", "2", "--out", str(path))
    assert result.exit_code == 0, result.output
    for expected in (
        "measured",
        "fitted",
        "spread",
        "held",
        "mean error of",
        "decode 1 ×",
        str(path),
    ):
        assert expected in result.stdout
    assert read_profile(path).facts.windows[0].num_tokens == 12


def test_the_same_seed_measures_and_holds_out_the_same_steps(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    config = EngineConfig(
        model_path=str(path), device="cpu", num_blocks=32, max_num_seqs=4, num_threads=1,
        max_num_batched_tokens=64,
    )  # fmt: skip
    seen: list[float] = []
    options = ProfileOptions(budget_s=60.0, max_passes=1, seed=3)
    first = run_profile(config, options, on_progress=lambda _, share: seen.append(share))
    second = run_profile(config, options)
    assert first.num_skipped == second.num_skipped == 0
    held_out = [
        {point.work for point in profile.points if point.is_held_out} for profile in (first, second)
    ]
    assert held_out[0] == held_out[1] != set()
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert {point.work.num_decode for point in first.points} == {0, 1, 2, 3, 4}
    assert max(point.work.num_batched_tokens for point in first.points) <= 64


def test_without_any_time_the_quickest_steps_are_measured_once(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    config = EngineConfig(model_path=str(path), device="cpu", num_blocks=32)
    profile = run_profile(config, ProfileOptions(budget_s=1e-9))
    assert profile.num_skipped > 0
    assert {point.num_samples for point in profile.points} <= {1, 3}
    assert [(e.num_fitted, e.num_held_out) for e in profile.errors()][:2] == [(6, 2), (6, 2)]


def test_an_engine_too_small_for_anything_says_so(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    config = EngineConfig(model_path=str(path), device="cpu", num_blocks=1, block_size=8)
    with pytest.raises(EngineError, match=r"num_blocks=1\b.* too small"):
        run_profile(config, ProfileOptions(budget_s=1.0))


def loaded(path: Path, **settings: Any) -> EngineInfo:
    """What a worker's thread says about its engine."""
    engine = make_engine(path, **settings)
    return EngineInfo(
        spec=engine.spec,
        layout=engine.layout,
        num_blocks=engine.num_blocks,
        max_model_len=engine.max_model_len,
        device=str(engine.device),
    )


def test_a_worker_starts_from_the_profile_of_its_own_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    config = EngineConfig(model_path=str(path), dtype="fp32", device="cpu", num_blocks=64)
    profiled = run_profile(config, ProfileOptions(budget_s=1.0)).model
    settings = WorkerSettings.load(model=str(path), max_num_batched_tokens=128)
    info = loaded(path)
    model, is_profiled = first_model(profiled, info, settings)
    assert is_profiled
    assert model == replace(profiled, max_num_batched_tokens=128)
    # Without one, or with that of another model, it starts from a guess about the same facts.
    other_facts = replace(profiled.facts, layer_param_bytes=7)
    for profile in (
        None,
        replace(profiled, fingerprint="another"),
        replace(profiled, facts=other_facts),
    ):
        guess, is_profiled = first_model(profile, info, settings)
        assert not is_profiled
        assert guess.facts == profiled.facts
        assert guess.prefill_s(300) > guess.prefill_s(10) > 0.0


def test_a_profile_is_for_the_kv_it_was_measured_with(tmp_path: Path) -> None:
    model, path = write_model(tmp_path / "model", FAMILIES["llama-gqa"]), tmp_path / "latency.json"
    options = ("--model", str(model), "--dtype", "fp32", "--budget-s", "1", "--out", str(path))
    result = run(*options, "--kv-cache-dtype", "int8")
    assert result.exit_code == 0, result.output
    profiled, settings = read_profile(path), WorkerSettings.load(model=str(model))
    taken = {
        kind: first_model(profiled, loaded(model, kv_cache_dtype=kind), settings)
        for kind in ("auto", "int8", "fp8")
    }
    assert [kind for kind, (_, is_profiled) in taken.items() if is_profiled] == ["int8"]
    plain, int8 = (taken[kind][0].facts.kv_bytes_per_token for kind in ("auto", "int8"))
    assert profiled.facts.kv_bytes_per_token == int8 < plain


def test_a_profile_of_quantised_weights_needs_their_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    path = tmp_path / "latency.json"
    result = run("--quantization", "int8", "--budget-s", "1", "--out", str(path))
    assert isinstance(result.exception, ConfigError)
    assert "extra 'quant'" in str(result.exception)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "gemma", "opt", "qwen3"])
def test_every_weight_is_counted_once(tmp_path: Path, family: str) -> None:
    path = write_model(tmp_path / "model", FAMILIES[family])
    info = loaded(path)
    facts = facts_of(info.spec, path)
    assert facts.head_param_bytes == 4 * 256 * info.spec.hidden_size
    config = FAMILIES[family]
    embeddings = 1 if config.tie_word_embeddings else 2
    assert facts.layer_param_bytes == info.spec.param_bytes - embeddings * facts.head_param_bytes
    num_heads, head_dim = config.num_attention_heads, info.spec.head_dim
    assert facts.attention_flops_per_pair == 4 * num_heads * head_dim * 3


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "nowhere" / "latency.json"))
    assert isinstance(result.exception, CommandFailed)
    assert "nowhere" in str(result.exception)
    result = run("--out", str(tmp_path))
    assert isinstance(result.exception, CommandFailed)
    assert "is a directory" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--dtype", "fp8"], "--dtype"),
        (["--quantization", "int3"], "--quantization"),
        (["--kv-cache-dtype", "int4"], "--kv-cache-dtype"),
        (["--budget-s", "0"], "--budget-s"),
        (["--num-threads", "0"], "--num-threads"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], culprit: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert culprit in result.stderr


def test_no_model_no_profile() -> None:
    result = run("--model", "./no-such")
    assert isinstance(result.exception, CommandFailed)
    assert BUNDLED_MODEL.is_dir()
