"""What the benchmark of the host's share of a decode step reports."""

import json
from pathlib import Path

import pytest
import torch

from bench import overhead
from bench.geometry import Geometry, write_model
from shared.engine.flight import Flight

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


def test_the_parts_of_a_step_are_all_there_and_add_up(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_threads = torch.get_num_threads()
    arguments = "--batch 3 --input 8 --steps 40 --warm-up 4 --num-threads 1"
    try:
        overhead.main(["--model", str(tiny), *arguments.split(), "--json", "-"])
    finally:
        torch.set_num_threads(num_threads)
    report = json.loads(capsys.readouterr().out)
    parts_s = report["parts_s"]
    assert tuple(parts_s) == overhead.PARTS
    assert all(spent_s > 0 for spent_s in parts_s.values()), parts_s
    assert 0 < report["host_s"] < report["step_s"]
    assert (report["batch"], report["steps"], report["num_threads"]) == (3, 40, 1)


def test_every_step_is_a_decode_of_all_and_is_measured_whole(tiny: Path) -> None:
    args = overhead.parse_args(["--model", str(tiny), "--batch", "2", "--input", "8"])
    args.steps = args.warm_up = 5
    engine = overhead.make_engine(args)
    land = Flight.land
    steps = overhead.measure(engine, args.batch, args.warm_up, args.steps)
    assert Flight.land is land
    assert len(steps) == 5
    assert engine.stats().total_decode_tokens == 2 * (1 + 5 + 5)
    for step in steps:
        assert set(step) == set(overhead.PARTS)
        assert min(step.values()) > 0
        kernels_s = sum(step[part] for part in overhead.KERNELS)
        summary = overhead.summarise([step])
        assert summary["step_s"] == pytest.approx(sum(summary["parts_s"].values()))
        assert summary["host_s"] == pytest.approx(summary["step_s"] - kernels_s)


def test_a_context_that_is_too_short_is_said(tiny: Path) -> None:
    with pytest.raises(SystemExit, match="too short"):
        overhead.main(["--model", str(tiny), "--batch", "1", "--input", "8", "--steps", "200"])
