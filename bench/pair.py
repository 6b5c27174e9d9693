"""Two engine processes side by side against one with all the threads.

    python -m bench.pair --model DIR [--batch 16] [--input 256] [--output 128] [--rounds 5]

By turns: one process with ``--num-threads`` threads, then two at once with half of them each, each
with the whole batch. ``ratio`` is the two processes' output tokens a second together over the
one's: what a host loses by giving prefill and decode a process each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.environment import environment
from bench.suite import ROOT

PASSED_ON = ("model", "batch", "input", "output", "dtype", "repeats")


def output_rates(args: argparse.Namespace, num_processes: int, num_threads: int) -> list[float]:
    """Output tokens a second of each of ``num_processes`` that run at the same time."""
    command = [sys.executable, "-m", "bench.engine", "--no-floor"]
    command += ["--num-threads", str(num_threads)]
    for name in PASSED_ON:
        command += [f"--{name}", str(getattr(args, name))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(num_threads)}
    with tempfile.TemporaryDirectory(prefix="banyan-pair-") as scratch:
        files = [Path(scratch) / f"{number}.json" for number in range(num_processes)]
        running = [
            subprocess.Popen([*command, "--json", str(file)], cwd=ROOT, env=env) for file in files
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"bench.engine ended with {codes}")
        return [json.loads(file.read_text())["output_tokens_per_s"] for file in files]


def main(argv: list[str] | None = None) -> None:
    """Run the rounds and print JSON."""
    parser = argparse.ArgumentParser(prog="bench.pair", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=lambda text: str(Path(text).absolute()))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--repeats", type=int, default=2, help="runs within a process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    if args.num_threads < 2:
        raise SystemExit("two processes need two threads")
    one, two = [], []
    for number in range(1, args.rounds + 1):
        print(f"round {number}/{args.rounds}", file=sys.stderr)
        one += output_rates(args, 1, args.num_threads)
        two.append(sum(output_rates(args, 2, args.num_threads // 2)))
    report = {
        "one_process_tokens_per_s": one,
        "two_processes_tokens_per_s": two,
        "ratio": statistics.median(b / a for a, b in zip(one, two, strict=True)),
        "num_threads": args.num_threads,
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
