"""The GPU benchmark, whose every part also runs on a CPU on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_check, machine

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--device", "cpu", "--layers", "2", "--hidden", "64", "--intermediate", "128"),
    *("--heads", "4", "--kv-heads", "2", "--vocab", "300", "--context", "40", "--steps", "4"),
    *(
        "--batches",
        "1,3",
        "--prompt",
        "96",
        "--repeats",
        "2",
        "--check-tokens",
        "6",
        "--check-requests",
        "5",
    ),
    *("--workload", "3x16x6", "--rounds", "2"),
)
NOT_ON_A_BARE_GPU_BOX = ("msgspec", "nats", "pydantic", "fastapi", "sqlalchemy", "uvloop", "typer")


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_S", 0.0)
    monkeypatch.setattr(machine, "BUFFER_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr(machine, "SQUARES", {"cpu": (128,)})
    monkeypatch.setattr(gpu_check, "PROMPT_LENS", (1, 33, 80, 280))


def test_every_part_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert gpu.main([*TINY, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    for dtype in ("float32", "bfloat16"):
        for way in ("plain", "pipelined"):
            assert report["check"][dtype][way]["is_right"]
    assert report["check"]["float32"]["plain"]["greedy_agreement"] == 1.0
    assert [entry["batch"] for entry in report["decode"]] == [1, 3]
    for entry in report["decode"]:
        assert entry["floor_step_s"] > 0.0
        assert entry["share_of_bytes"] == pytest.approx(entry["floor_step_s"] / entry["step_s"])
    first, second = (entry["read_bytes"] for entry in report["decode"])
    # Two more contexts: keys and values of two heads of 16 numbers, two layers, two bytes each.
    assert second - first == pytest.approx(2 * 40 * 2 * 2 * 16 * 2 * 2, rel=0.05)
    # A prompt's products with each weight of the layers, and attention to half of its square.
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    pairs = 96 * 97 / 2 * 2 * 4 * 64
    assert report["prefill"]["flops"] == pytest.approx(2 * 96 * weights + pairs, rel=0.02)
    assert report["prefill"]["share_of_flops"] > 0.0
    compared = report["transformers"]
    assert compared["ratio"] > 0.0
    assert [len(rates) for rates in compared["output_tokens_per_s_by_round"].values()] == [2, 2]
    printed = capsys.readouterr().out
    for line in ("check in bfloat16: right", "decode, batch 3", "prefill of 96", "transformers"):
        assert line in printed


def test_nothing_is_timed_if_something_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "HALF_RATIO", 0.0)
    assert gpu.main([*TINY, "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["check"]["float32"]["is_right"]
    assert not report["check"]["bfloat16"]["is_right"]
    assert "decode" not in report and "transformers" not in report


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse_args(["--only", "check,magic"])
    assert "check, decode, prefill, transformers" in capsys.readouterr().err


def test_it_needs_no_package_of_the_services() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({NOT_ON_A_BARE_GPU_BOX})); "
    code += "import bench.gpu, bench.peers.transformers_continuous; bench.gpu.environment()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
