"""Banyan's engine beside its peers, in interleaved rounds of whole processes.

    python -m bench.compare --model DIR [--peers openvino,vllm,transformers] [--rounds 5] [--json -]

A contender is a name with settings behind it, each after a colon: ``vllm:dtype=float32`` and
``openvino:kv=f16:precision=f32`` run beside ``vllm`` and ``openvino``. What is compared, and how
to install the peers, is in ``docs/benchmarks.md``.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.offline import workload_argument
from bench.suite import ROOT
from bench.workload import Workload, uniform

INSTALLED = ("openvino", "vllm")
"""Peers with an environment of their own under ``--peers-dir``."""
OWN = {"transformers": "transformers", "transformers-continuous": "transformers_continuous"}
"""Peers that run in this environment, and their modules."""
WORKLOADS = ("16x256x128", "1x256x128", "32x256x128", "16x960x128", "mixed")
BANYAN = "banyan"
FIGURES = ("output_tokens_per_s", "prefill_tokens_per_s")
MEDIANS = (
    "decode_step_s",
    "ttft_s",
    "peak_memory_bytes",
    "floor_decode_step_s",
    "cores_busy_elsewhere",
)
MAX_BUSY_ELSEWHERE = 0.1
RUN_TIMEOUT_S = 3600.0

Results = dict[str, dict[str, Any]]
"""What one process reported, by workload."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A program that is measured."""

    label: str
    command: tuple[str, ...]


def parse_contender(text: str, peers_dir: Path) -> Contender:
    """``NAME[:KEY=VALUE…]``; raises ``ValueError`` for one that is unknown or not installed."""
    name, *options = text.split(":")
    if name == BANYAN:
        flags = [f"--{key}" for key in options]
        return Contender(text, (sys.executable, "-m", "bench.engine", *flags))
    if name in OWN:
        python, module = Path(sys.executable), OWN[name]
    elif name in INSTALLED:
        python, module = peers_dir.absolute() / name / "bin" / "python", name
    else:
        raise ValueError(f"peer {name!r} is none of {', '.join((*OWN, *INSTALLED))}")
    if not python.exists():
        raise ValueError(
            f"{python} is not there: bench/peers/setup.sh --dir {peers_dir} {name} makes it"
        )
    command = [str(python), "-m", f"bench.peers.{module}"]
    command += ["--cache-dir", str(peers_dir.absolute() / "models")]
    for option in options:
        command += ["--set", option]
    return Contender(text, tuple(command))


def run_contender(contender: Contender, args: argparse.Namespace) -> Results:
    """Run one process over all workloads; exits with its last words if it fails."""
    command = [*contender.command, "--model", args.model, "--num-threads", str(args.num_threads)]
    command += ["--repeats", str(args.repeats), "--seed", str(args.seed), "--dtype", args.dtype]
    for workload in args.workload:
        command += ["--workload", workload.name]
    if args.warm_up_output is not None:
        command += ["--warm-up-output", str(args.warm_up_output)]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(args.num_threads),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        done = subprocess.run(
            [*command, "--json", file.name],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise SystemExit(
                f"{contender.label} ended with {done.returncode}:\n{done.stdout[-4000:]}"
            )
        report = json.loads(Path(file.name).read_text())
    shared = {key: value for key, value in report.items() if key != "workloads"}
    return {
        result["workload"]: {**shared, **result} for result in report.get("workloads", [report])
    }


def spread(values: Sequence[float]) -> float | None:
    """How far two runs of the same program in a row differ, at most: 0.03 is 3 %."""
    pairs = itertools.pairwise(values)
    return max((max(a, b) / min(a, b) - 1.0 for a, b in pairs), default=None)


def compare(rounds: Sequence[dict[str, Results]], workload: str) -> dict[str, dict[str, Any]]:
    """The figures of one workload by contender; ``ratio`` is Banyan's over the contender's.

    A ratio is the median of those taken within a round, where both saw the same machine.
    """
    labels = list(rounds[0])
    compared: dict[str, dict[str, Any]] = {}
    for label in labels:
        runs = [round_[label][workload] for round_ in rounds]
        own = [round_[BANYAN][workload] for round_ in rounds]
        entry: dict[str, Any] = {"dtype": runs[0]["dtype"], "ratio": {}, "spread": {}}
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            if None in values:
                continue
            entry[figure] = statistics.median(values)
            entry[f"{figure}_by_round"] = values
            entry["ratio"][figure] = statistics.median(
                mine[figure] / value for mine, value in zip(own, values, strict=True)
            )
            entry["spread"][figure] = spread(values)
        for figure in MEDIANS:
            known = [run[figure] for run in runs if run.get(figure) is not None]
            entry[figure] = statistics.median(known) if known else None
        shares = [run["share_of_floor"] for run in runs if run.get("share_of_floor")]
        entry["share_of_floor"] = {
            key: statistics.median(share[key] for share in shares)
            for key in (shares[0] if shares else {})
            if all(share[key] is not None for share in shares)
        }
        compared[label] = entry
    return compared


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=_absolute)
    parser.add_argument("--peers", help="comma between two; default: all that are installed")
    parser.add_argument("--peers-dir", type=Path, default=Path(".peers"))
    parser.add_argument("--batch", type=int, help="with --input and --output: one workload only")
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument(
        "--workload", action="append", type=workload_argument, help="as bench.engine has it"
    )
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="runs within a process")
    parser.add_argument("--warm-up-output", type=int)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - is standard output")
    args = parser.parse_args(argv)
    if args.workload is None:
        default = [workload_argument(name) for name in WORKLOADS]
        one = args.batch and [uniform(args.batch, args.input, args.output)]
        args.workload = one or default
    return args


def contenders_of(args: argparse.Namespace) -> list[Contender]:
    """Banyan first, then the peers asked for; exits with a message if one is not there."""
    if args.peers is None:
        installed = [name for name in INSTALLED if (args.peers_dir / name).is_dir()]
        names = [*installed, "transformers"]
    else:
        names = [name for name in args.peers.split(",") if name]
    try:
        return [parse_contender(name, args.peers_dir) for name in (BANYAN, *names)]
    except ValueError as error:
        raise SystemExit(str(error)) from error


def main(argv: list[str] | None = None) -> None:
    """Run the rounds and print the table."""
    args = parse_args(argv)
    contenders = contenders_of(args)
    rounds: list[dict[str, Results]] = []
    for number in range(1, args.rounds + 1):
        results = {}
        for contender in contenders:
            print(f"round {number}/{args.rounds}: {contender.label}", file=sys.stderr)
            results[contender.label] = run_contender(contender, args)
        rounds.append(results)
    report = {
        "workloads": {w.name: compare(rounds, w.name) for w in args.workload},
        "num_threads": args.num_threads,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "seed": args.seed,
        "model": args.model,
        "environment": environment(),
        "runs": rounds,
    }
    if args.json == "-":
        print(json.dumps(report, indent=2))
        return
    if args.json is not None:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["workloads"], args.workload))


def table(compared: dict[str, dict[str, dict[str, Any]]], workloads: Sequence[Workload]) -> str:
    """One line a workload and contender; ``×`` is Banyan's figure over the contender's."""
    head = f"{'workload':<14}{'contender':<30}{'dtype':<9}{'output tok/s':>14}{'×':>7}{'±':>6}"
    lines = [
        head + f"{'prefill tok/s':>15}{'×':>7}{'±':>6}{'decode ms':>11}{'TTFT s':>8}{'floor':>7}"
    ]
    for workload in workloads:
        for label, entry in compared[workload.name].items():
            cells = [f"{workload.name:<14}{label:<30}{entry['dtype']:<9}"]
            for figure, width in zip(FIGURES, (14, 15), strict=True):
                cells.append(_number(entry.get(figure), width, ",.1f"))
                cells.append(_number(entry["ratio"].get(figure), 7, ".2f"))
                cells.append(_number(entry["spread"].get(figure), 6, ".0%"))
            step_s = entry["decode_step_s"]
            cells.append(_number(None if step_s is None else step_s * 1000, 11, ".1f"))
            cells.append(_number(entry["ttft_s"], 8, ".2f"))
            cells.append(_number(entry["share_of_floor"].get("output"), 7, ".0%"))
            lines.append("".join(cells))
    busy = [e["cores_busy_elsewhere"] or 0.0 for by in compared.values() for e in by.values()]
    if max(busy) > MAX_BUSY_ELSEWHERE:
        lines.append(f"Not idle: others kept up to {max(busy):.1f} cores busy.")
    return "\n".join(lines)


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _absolute(text: str) -> str:
    return str(Path(text).absolute())


if __name__ == "__main__":
    main()
