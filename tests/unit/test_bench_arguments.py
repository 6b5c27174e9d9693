"""The command lines of the offline benchmarks, and what a comparison makes of its runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare, engine, offline
from bench.peers.runner import PeerSettings, computes_bf16
from bench.workload import uniform


def parse(flags: str) -> argparse.Namespace:
    return engine.parse_args(["--model", "m", *flags.split()])


def test_the_engine_takes_one_uniform_workload() -> None:
    args = parse("--batch 4 --input 10 --output 5 --dtype bf16 --json -")
    assert offline.workloads_of(args) == [uniform(4, 10, 5)]
    assert (args.dtype, args.json, args.repeats) == ("bf16", "-", 3)


def test_sixteen_times_256_and_128_is_the_default() -> None:
    args = parse("")
    assert offline.workloads_of(args) == [uniform(16, 256, 128)]


def test_several_workloads_go_in_one_process() -> None:
    args = parse("--workload 1x2x3 --workload mixed:4")
    assert [workload.name for workload in offline.workloads_of(args)] == ["1x2x3", "mixed:4:10"]


def test_the_pool_holds_the_largest_workload_twice() -> None:
    workloads = [uniform(4, 10, 5), uniform(1, 30, 30)]
    assert engine.num_blocks_for(workloads, block_size=16) == 2 * 4 * 2
    assert engine.num_blocks_for(workloads[1:], block_size=16) == 2 * 5


@pytest.mark.parametrize("flags", ["--batch x", "--workload 1x2", "--dtype int3"])
def test_a_bad_argument_is_named(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flags)
    assert flags.split()[0] in capsys.readouterr().err


def test_numbers_that_make_no_workload_are_refused() -> None:
    with pytest.raises(SystemExit, match="at least 1"):
        offline.workloads_of(parse("--batch 0"))


def test_one_workload_is_reported_flat_and_several_as_a_list() -> None:
    one, two = {"workload": "a"}, {"workload": "b"}
    assert offline.flattened({"engine": "e"}, [one]) == {"engine": "e", "workload": "a"}
    assert offline.flattened({"engine": "e"}, [one, two]) == {
        "engine": "e",
        "workloads": [one, two],
    }


def test_a_peer_without_an_environment_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"setup\.sh --dir .* vllm"):
        compare.parse_contender("vllm", tmp_path)
    with pytest.raises(ValueError, match="'llama' is none of"):
        compare.parse_contender("llama", tmp_path)


def test_settings_of_a_contender_reach_its_command(tmp_path: Path) -> None:
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    contender = compare.parse_contender("openvino:kv=f16:precision=f32", tmp_path)
    assert contender.command[:3] == (str(python), "-m", "bench.peers.openvino")
    assert contender.command[-4:] == ("--set", "kv=f16", "--set", "precision=f32")
    own = compare.parse_contender("banyan:max-num-batched-tokens=512", tmp_path)
    assert own.command == (
        sys.executable,
        "-m",
        "bench.engine",
        "--max-num-batched-tokens=512",
    )


def test_only_installed_peers_are_compared_unless_they_are_asked_for(tmp_path: Path) -> None:
    args = compare.parse_args(["--model", "m", "--peers-dir", str(tmp_path)])
    assert [c.label for c in compare.contenders_of(args)] == ["banyan", "transformers"]
    args = compare.parse_args(["--model", "m", "--peers-dir", str(tmp_path), "--peers", "openvino"])
    with pytest.raises(SystemExit, match=r"setup\.sh"):
        compare.contenders_of(args)


def test_a_comparison_takes_one_workload_or_the_usual_five() -> None:
    assert len(compare.parse_args(["--model", "m"]).workload) == 5
    args = compare.parse_args(["--model", "m", "--batch", "2", "--input", "3", "--output", "4"])
    assert args.workload == [uniform(2, 3, 4)]


def result(output: float, prefill: float | None) -> dict[str, Any]:
    return {
        "dtype": "bf16",
        "output_tokens_per_s": output,
        "prefill_tokens_per_s": prefill,
        "decode_step_s": 0.5,
        "ttft_s": 1.0,
        "peak_memory_bytes": 10,
        "cores_busy_elsewhere": 0.0,
    }


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was half as fast in the second round, for both.
    rounds = [
        {"banyan": {"w": result(200.0, 30.0)}, "other": {"w": result(100.0, 20.0)}},
        {"banyan": {"w": result(100.0, 15.0)}, "other": {"w": result(50.0, 10.0)}},
        {"banyan": {"w": result(110.0, 30.0)}, "other": {"w": result(50.0, 20.0)}},
    ]
    other = compare.compare(rounds, "w")["other"]
    assert other["ratio"] == {"output_tokens_per_s": 2.0, "prefill_tokens_per_s": 1.5}
    assert other["output_tokens_per_s"] == 50.0
    assert other["spread"]["output_tokens_per_s"] == pytest.approx(1.0)
    assert other["share_of_floor"] == {}
    table = compare.table({"1x2x3": compare.compare(rounds, "w")}, [uniform(1, 2, 3)])
    assert "2.00" in table.splitlines()[2]
    assert "Not idle" not in table


def test_a_busy_machine_is_reported() -> None:
    rounds = [{"banyan": {"1x2x3": {**result(20.0, 5.0), "cores_busy_elsewhere": 0.7}}}]
    table = compare.table({"1x2x3": compare.compare(rounds, "1x2x3")}, [uniform(1, 2, 3)])
    assert "others kept up to 0.7 cores busy" in table


def test_figures_that_somebody_lacks_are_left_out() -> None:
    rounds = [{"banyan": {"w": result(20.0, None)}, "other": {"w": result(10.0, None)}}]
    other = compare.compare(rounds, "w")["other"]
    assert other["ratio"] == {"output_tokens_per_s": 2.0}
    assert other["spread"]["output_tokens_per_s"] is None


@pytest.mark.parametrize(
    ("line", "is_native"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx512f amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("processor\t: 0", True),
    ],
)
def test_bf16_is_left_to_machines_that_have_it(tmp_path: Path, line: str, is_native: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor: x\n{line}\n")
    assert computes_bf16(cpuinfo, tmp_path / "driver") == is_native
    (tmp_path / "driver").touch()
    assert computes_bf16(cpuinfo, tmp_path / "driver")


def test_a_peer_refuses_settings_it_does_not_know() -> None:
    args = parse("")
    args.cache_dir, args.set = "x", [("kv", "f16"), ("colour", "red")]
    settings = PeerSettings(args, [uniform(1, 2, 3)])
    assert settings.option("kv", "u8") == "f16"
    assert settings.option("threads", "auto") == "auto"
    with pytest.raises(SystemExit, match="colour"):
        settings.check_options()
