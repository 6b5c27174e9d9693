"""Arguments, measuring and figures that every contender of the offline benchmark shares.

Standard library only: it also runs in the peers' environments.
"""

import argparse
import json
import random
import resource
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.idleness import Idleness
from bench.serving import Run, Serving, serve
from bench.workload import Workload, parse_workload, uniform


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to serve, how often, and where the figures go."""
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--batch", type=int, default=16, help="requests, all there at the start")
    parser.add_argument("--input", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens to generate of each")
    parser.add_argument(
        "--workload",
        action="append",
        type=workload_argument,
        metavar="NAME",
        help="BATCHxINPUTxOUTPUT or mixed[:REQUESTS[:PER_SECOND]] instead of the three; may be "
        "given several times",
    )
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="the figures are their medians")
    parser.add_argument(
        "--warm-up-output", type=int, metavar="N", help="end the warm-up after N tokens a request"
    )
    parser.add_argument("--num-threads", type=int, help="default: what the engine takes by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - is standard output")


def workload_argument(text: str) -> Workload:
    """``parse_workload`` with the error that argparse shows."""
    try:
        return parse_workload(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """The workloads asked for; exits with a message if the numbers make none."""
    try:
        return args.workload or [uniform(args.batch, args.input, args.output)]
    except ValueError as error:
        raise SystemExit(str(error)) from error


def measure(
    serving: Serving, workload: Workload, args: argparse.Namespace, vocab_size: int
) -> dict[str, Any]:
    """One warm-up, then ``args.repeats`` runs: the figures, as they go into the JSON.

    ``prefill_tokens_per_s`` is from runs of their own that ask for one token a request: prompt
    tokens over wall time. It is ``None`` where requests do not arrive together.
    """
    rng = random.Random(f"{args.seed} {workload.name}")

    def run(max_output: int | None = None) -> Run:
        return serve(serving, workload.requests(rng, vocab_size, max_output=max_output))

    run(args.warm_up_output)
    idleness = Idleness()
    runs = [run() for _ in range(args.repeats)]
    prefills_s = [run(1).wall_s for _ in range(args.repeats)] if workload.is_uniform else []
    shape = workload.shapes[0]
    lengths = {"batch": len(workload.shapes), "input": shape.input_len, "output": shape.output_len}
    rates = [result.output_tokens_per_s for result in runs]
    return {
        "workload": workload.name,
        **(lengths if workload.is_uniform else {}),
        "output_tokens_per_s": statistics.median(rates),
        "prefill_tokens_per_s": _median(workload.num_input_tokens / s for s in prefills_s),
        "decode_step_s": _median(s for result in runs for s in result.decode_steps_s),
        "ttft_s": _median(s for result in runs for s in result.ttfts_s),
        "output_tokens_per_s_by_run": rates,
        "cores_busy_elsewhere": idleness.cores_busy_elsewhere(),
    }


def peak_memory_bytes() -> int:
    """The most memory this process has had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's figure it does not count what the parent had before it became us.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def vocab_size_of(model: str) -> int:
    """``vocab_size`` of a model's directory."""
    size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    assert isinstance(size, int)
    return size


def flattened(facts: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The report: one workload's figures beside ``facts``, or a list where there are several."""
    return {**results[0], **facts} if len(results) == 1 else {**facts, "workloads": results}


def write_report(report: dict[str, Any], args: argparse.Namespace) -> None:
    """As JSON to ``args.json``; if it is not given, as a table for people."""
    if args.json is None:
        print(table(report))
    elif args.json == "-":
        print(json.dumps(report, indent=2))
    else:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def table(report: dict[str, Any]) -> str:
    """The figures of each workload, with their share of the floor if there is one."""
    lines = [f"{'workload':<16}{'output tok/s':>22}{'prefill tok/s':>22}{'decode step ms':>22}"]
    for result in report.get("workloads", [report]):
        shares = result.get("share_of_floor") or {}
        cells = [
            _cell(result["output_tokens_per_s"], 1, shares.get("output")),
            _cell(result["prefill_tokens_per_s"], 1, shares.get("prefill")),
            _cell(result["decode_step_s"], 1000, shares.get("decode")),
        ]
        lines.append(f"{result['workload']:<16}" + "".join(f"{cell:>22}" for cell in cells))
    facts = [key for key in ("dtype", "device", "num_threads") if key in report]
    lines.append(", ".join(f"{key} {report[key]}" for key in facts))
    return "\n".join(lines)


def _cell(value: float | None, factor: float, share: float | None) -> str:
    if value is None:
        return "-"
    number = f"{value * factor:,.1f}"
    return number if share is None else f"{number} ({share:.0%} of floor)"


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
