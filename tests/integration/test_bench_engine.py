"""The offline benchmark on the bundled model, and the models that it can make itself."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import engine
from bench.geometry import GEOMETRIES, Geometry, write_model
from bench.peers import runner, transformers
from bench.roofline import model_size

ROOT = Path(__file__).resolve().parents[2]
TINY = Geometry(
    num_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=300,
    max_positions=128,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(TINY, path)
    return path


def test_a_geometry_becomes_a_model_that_transformers_loads(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype == torch.bfloat16
    weights = dict(model.named_parameters())
    assert weights["lm_head.weight"].shape == (300, 32)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert 0.01 < weights["model.layers.0.mlp.up_proj.weight"].float().std() < 0.03
    assert torch.equal(weights["model.norm.weight"], torch.ones(32, dtype=torch.bfloat16))
    assert len(AutoTokenizer.from_pretrained(tiny)) == 300


def test_the_same_seed_writes_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    file = "model-00001-of-00001.safetensors"
    for seed, is_same in ((0, True), (1, False)):
        write_model(TINY, tmp_path / str(seed), seed=seed)
        assert ((tmp_path / str(seed) / file).read_bytes() == (tiny / file).read_bytes()) == is_same
    with pytest.raises(FileExistsError):
        write_model(TINY, tiny)


def test_weights_are_counted_from_the_configuration(tmp_path: Path) -> None:
    GEOMETRIES["llama-160m"].config().save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    # Per layer four square matrices, three of the MLP and two norms; one norm at the end.
    per_layer = 4 * 768 * 768 + 3 * 768 * 3072 + 2 * 768
    assert size.num_dense_params == 12 * per_layer + 768
    assert size.num_head_params == 32000 * 768
    assert len(size.layers) == 12
    assert size.layers[0].kv_values == 2 * 768
    assert size.layers[0].flops == 4 * 768


def test_a_tied_head_is_read_although_the_embedding_is_not(tiny: Path) -> None:
    tied = model_size(str(ROOT / "models" / "tiny-chat"))
    assert tied.num_head_params == 8192 * 384
    assert model_size(str(tiny)).num_head_params == 300 * 32


def test_the_engine_reports_its_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--batch 2 --input 8 --output 4 --repeats 1 --dtype bf16 --num-threads 1 --json -"
    num_threads = torch.get_num_threads()
    try:
        engine.main(["--model", str(ROOT / "models" / "tiny-chat"), *arguments.split()])
    finally:
        torch.set_num_threads(num_threads)
    report = json.loads(capsys.readouterr().out)
    for key in (
        "output_tokens_per_s",
        "prefill_tokens_per_s",
        "decode_step_s",
        "floor_decode_step_s",
        "peak_memory_bytes",
    ):
        assert report[key] > 0, key
    assert (report["batch"], report["input"], report["output"]) == (2, 8, 4)
    assert report["dtype"] == "bf16"
    assert 0 < report["share_of_floor"]["output"] < 1
    assert report["machine"]["read_bytes_per_s"] > 0
    assert report["cores_busy_elsewhere"] is None or report["cores_busy_elsewhere"] >= 0


def test_a_mixed_workload_has_no_floor(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = ["--workload", "mixed:3:1000", "--repeats", "1", "--num-threads", "1"]
    model = tmp_path / "model"
    write_model(Geometry(**{**_fields(TINY), "max_positions": 2048}), model)
    engine.main(["--model", str(model), *arguments, "--no-floor", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["prefill_tokens_per_s"] is None
    assert report["output_tokens_per_s"] > 0
    assert report["ttft_s"] > 0


def test_the_transformers_peer_reports_the_same_figures(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--batch 3 --input 8 --output 4 --repeats 1 --num-threads 1 --json -"
    runner.run("transformers", transformers.make, ["--model", str(tiny), *arguments.split()])
    report = json.loads(capsys.readouterr().out)
    assert report["engine"] == "transformers"
    assert report["dtype"] == ("bfloat16" if runner.computes_bf16() else "float32")
    for key in ("output_tokens_per_s", "prefill_tokens_per_s", "decode_step_s"):
        assert report[key] > 0, key


def _fields(geometry: Geometry) -> dict[str, int]:
    return {name: getattr(geometry, name) for name in Geometry.__slots__}
