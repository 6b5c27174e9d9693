"""An engine on a GPU beside what the GPU allows, and beside transformers' continuous batching.

    python -m bench.gpu [--only check,decode,prefill,transformers] [--json FILE]

By default a Llama-2-13B of random weights in bf16, made on the GPU. Correctness is checked first,
and nothing is timed if something is wrong. What is counted is in ``docs/benchmarks.md``. Without
a GPU, or with the flags for a smaller shape, the same runs on a CPU.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.geometry import DTYPES, GEOMETRIES, Geometry
from bench.gpu_check import PROMPT_LENS, check
from bench.gpu_speed import (
    compare_with_transformers,
    decode_costs,
    decode_engine,
    free_memory,
    measure_decode,
    measure_prefill,
)
from bench.machine import Measured, linear_shapes, measure_machine
from bench.offline import workload_argument
from bench.random_model import RandomModel
from bench.roofline import MachineRates, iteration_cost, model_size

PARTS = ("check", "decode", "prefill", "transformers")
GOALS = {"decode": {1: 0.80, 64: 0.65}, "prefill": 0.65, "transformers": 3.0}
"""Of the byte roofline by batch, of the measured matrix rate, and of transformers' tokens/s."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=_parts, default=PARTS, help="comma between two of the parts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    shape = GEOMETRIES["llama-13b"]
    parser.add_argument("--layers", type=int, default=shape.num_layers)
    parser.add_argument("--hidden", type=int, default=shape.hidden_size)
    parser.add_argument("--intermediate", type=int, default=shape.intermediate_size)
    parser.add_argument("--heads", type=int, default=shape.num_heads)
    parser.add_argument("--kv-heads", type=int, default=shape.num_kv_heads)
    parser.add_argument("--vocab", type=int, default=shape.vocab_size)
    parser.add_argument("--check-layers", type=int, default=4, help="layers of the checked model")
    parser.add_argument("--check-requests", type=int, default=64)
    parser.add_argument("--check-tokens", type=int, default=24, help="to generate of each prompt")
    parser.add_argument("--batches", type=_numbers, default=(1, 64), help="of the decodes")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each in a decode")
    parser.add_argument("--steps", type=int, default=64, help="of a decode, timed together")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prefill")
    parser.add_argument("--repeats", type=int, default=5, help="of each; the median counts")
    parser.add_argument("--workload", type=workload_argument, default="64x256x128")
    parser.add_argument("--rounds", type=int, default=5, help="of Banyan and transformers by turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - is standard output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; exit code 1 if the check fails."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        report = run(args, Path(directory))
    text = json.dumps(report, indent=2)
    if args.json == "-":
        print(text)
    else:
        print(summary(report))
        if args.json is not None:
            Path(args.json).write_text(text + "\n")
    return 0 if report.get("check", {}).get("is_right", True) else 1


def run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All figures; the parts behind ``check`` are left out if that fails."""
    model = _model(args, directory / "model")
    model.write_config()
    is_cuda = model.device.type == "cuda"
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "dtype": args.dtype,
        "model": {key: getattr(args, key) for key in ("layers", "hidden", "heads", "vocab")},
        "seed": args.seed,
        "environment": environment(),
    }
    if "check" in args.only:
        _say("check")
        checked = replace(
            model,
            geometry=replace(model.geometry, num_layers=min(args.layers, args.check_layers)),
            path=directory / "checked",
        )
        checked.write_config()
        report["check"] = check(
            checked,
            num_requests=args.check_requests,
            num_tokens=args.check_tokens,
            seed=args.seed,
        )
        free_memory(model.device)
        if not report["check"]["is_right"]:
            return report
    if {"decode", "prefill"} & set(args.only):
        report |= _time_engine(model, args)
        free_memory(model.device)
    if "transformers" in args.only:
        _say("transformers")
        report["transformers"] = {
            **compare_with_transformers(model, args.workload, args.rounds, args.seed),
            "goal": GOALS["transformers"],
        }
    if is_cuda:
        report["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return report


def summary(report: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"{report['device']}, {report['dtype']}"]
    for dtype, entry in report.get("check", {}).items():
        if isinstance(entry, dict):
            verdict = "right" if entry["is_right"] else "WRONG"
            error = entry["pipelined"]["logprob_error"]
            peer = entry["pipelined"].get("transformers_logprob_error")
            than = "" if peer is None else f", transformers' {peer:.1e}"
            lines.append(
                f"check in {dtype}: {verdict}; error of log probabilities {error:.1e}{than}"
            )
    for entry in report.get("decode", ()):
        lines.append(
            f"decode, batch {entry['batch']}, context {entry['context']}: "
            f"{entry['step_s'] * 1000:.2f} ms a step, {entry['share_of_bytes']:.0%} of the byte "
            f"roofline" + _goal(entry)
        )
    if "prefill" in report:
        entry = report["prefill"]
        lines.append(
            f"prefill of {entry['num_tokens']}: {entry['prefill_s'] * 1000:.1f} ms, "
            f"{entry['share_of_flops']:.0%} of the matrix rate" + _goal(entry)
        )
    if "transformers" in report:
        entry = report["transformers"]
        rates, spread = entry["output_tokens_per_s"], entry["spread"]
        lines.append(
            f"{entry['workload']}: {rates['banyan']:,.0f} output tok/s (±{spread['banyan']:.0%}), "
            f"transformers {rates['transformers']:,.0f} (±{spread['transformers']:.0%}): "
            f"{entry['ratio']:.2f} ×" + _goal(entry, "{:g} ×")
        )
    return "\n".join(lines)


def _time_engine(model: RandomModel, args: argparse.Namespace) -> dict[str, Any]:
    """Decodes and prefill, and the machine's rates before and after them."""
    size = model_size(str(model.path))
    _say("machine")
    rates = [_measure_machine(model)]
    engine = decode_engine(model, args.batches, args.context, args.steps, args.prompt)
    report: dict[str, Any] = {}
    if "decode" in args.only:
        report["decode"] = []
        for batch in args.batches:
            _say(f"decode, batch {batch}")
            report["decode"].append(
                measure_decode(engine, batch, args.context, args.steps, args.repeats)
            )
    if "prefill" in args.only:
        _say("prefill")
        report["prefill"] = measure_prefill(engine, args.prompt, args.repeats, args.seed)
    del engine
    free_memory(model.device)
    rates.append(_measure_machine(model))
    best = MachineRates(
        max(one.rates.read_bytes_per_s for one in rates),
        max(one.rates.flops_per_s for one in rates),
    )
    itemsize = model.dtype.itemsize
    for entry in report.get("decode", ()):
        cost = decode_costs(size, entry["batch"], args.context, args.steps, itemsize)
        floor_s = cost.read_bytes / best.read_bytes_per_s
        entry |= {
            "read_bytes": cost.read_bytes,
            "floor_step_s": floor_s,
            "share_of_bytes": floor_s / entry["step_s"],
            "goal": GOALS["decode"].get(entry["batch"]),  # type: ignore[attr-defined]
        }
    if "prefill" in report:
        entry = report["prefill"]
        cost = iteration_cost(size, [(args.prompt, 0)], itemsize)
        rate = cost.flops / entry["prefill_s"]
        entry |= {
            "flops": cost.flops,
            "flops_per_s": rate,
            "share_of_flops": rate / best.flops_per_s,
            "goal": GOALS["prefill"],
        }
    report["machine"] = {
        "read_bytes_per_s": best.read_bytes_per_s,
        "flops_per_s": best.flops_per_s,
        "before": rates[0].report(),
        "after": rates[1].report(),
    }
    return report


def _measure_machine(model: RandomModel) -> Measured:
    measured = measure_machine(model.device, model.dtype, linear_shapes(str(model.path)))
    free_memory(model.device)
    return measured


def _model(args: argparse.Namespace, path: Path) -> RandomModel:
    """The model that the flags describe, with room for the longest request of any part."""
    longest = max(
        args.prompt + 1, args.workload.max_model_len, max(PROMPT_LENS) + args.check_tokens
    )
    longest = max(longest, args.context + args.steps)
    geometry = Geometry(
        num_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_positions=max(4096, longest + 64),
    )
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return RandomModel(geometry, path, torch.device(name), DTYPES[args.dtype], args.seed)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if not parts or not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text!r}: some of {', '.join(PARTS)}")
    return parts


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _goal(entry: dict[str, Any], form: str = "{:.0%}") -> str:
    goal = entry.get("goal")
    return "" if goal is None else f" (goal {form.format(goal)})"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
