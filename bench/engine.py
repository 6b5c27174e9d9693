"""Offline throughput of one engine: ``python -m bench.engine --model DIR``; prints JSON.

All requests are there at the start, of equal length, greedy, without ends of sequence, without
shared prefixes. ``output_tokens_per_s`` is all output over the whole run, prefill included;
``prefill_tokens_per_s`` and ``decode_step_s`` are medians over the steps that only prefill or only
decode. The first, shorter round is a warm-up and not counted.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
import transformers

from shared.core.request import Request, SamplingParams
from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine


@dataclass(slots=True)
class Round:
    """What one run over all requests took."""

    wall_s: float = 0.0
    num_output_tokens: int = 0
    prefill_rates: list[float] = field(default_factory=list)
    decode_steps_s: list[float] = field(default_factory=list)


def run_round(engine: Engine, requests: list[Request]) -> Round:
    """Serve ``requests``, all queued at once, to their ends."""
    result = Round()
    started_s = time.perf_counter()
    for request in requests:
        engine.add(request)
    before = engine.stats()
    while (step := engine.step()) is not None:
        stats = step.stats
        num_prefill = stats.total_prefill_tokens - before.total_prefill_tokens
        num_decode = stats.total_decode_tokens - before.total_decode_tokens
        if num_decode == 0:
            result.prefill_rates.append(num_prefill / stats.step_s)
        elif num_prefill == 0:
            result.decode_steps_s.append(stats.step_s)
        before = stats
        for output in step.outputs:
            if output.error is not None:
                raise SystemExit(f"{output.key} failed: {output.error}")
            result.num_output_tokens += len(output.token_ids)
    result.wall_s = time.perf_counter() - started_s
    return result


def make_requests(args: argparse.Namespace, vocab_size: int, round_: int) -> list[Request]:
    """``args.num_requests`` requests of random tokens, different in every round."""
    rng = random.Random(args.seed * 1000 + round_)
    return [
        Request(
            request_id=f"{round_}-{index}",
            attempt=0,
            prompt_token_ids=tuple(rng.randrange(vocab_size) for _ in range(args.input_len)),
            sampling=SamplingParams(max_tokens=args.output_len, temperature=0.0, ignore_eos=True),
        )
        for index in range(args.num_requests)
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its result as one JSON object."""
    args = parse_args(argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    engine = build_engine(
        EngineConfig(
            model_path=args.model,
            dtype=args.dtype,
            device=args.device,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
    )
    warm_up = make_requests(args, engine.spec.vocab_size, round_=0)
    run_round(engine, warm_up[: max(1, len(warm_up) // 4)])
    rounds = [
        run_round(engine, make_requests(args, engine.spec.vocab_size, round_=index + 1))
        for index in range(args.repeats)
    ]
    rates = [round_.num_output_tokens / round_.wall_s for round_ in rounds]
    prefill_rates = [rate for round_ in rounds for rate in round_.prefill_rates]
    decode_steps_s = [step_s for round_ in rounds for step_s in round_.decode_steps_s]
    result = {
        "output_tokens_per_s": statistics.median(rates),
        "prefill_tokens_per_s": statistics.median(prefill_rates) if prefill_rates else None,
        "decode_step_s": statistics.median(decode_steps_s) if decode_steps_s else None,
        "output_tokens_per_s_by_round": rates,
        "architecture": engine.spec.architecture,
        "param_bytes": engine.spec.param_bytes,
        "dtype": engine.spec.dtype,
        "device": str(engine.device),
        "num_threads": torch.get_num_threads(),
        "workload": {
            key: getattr(args, key)
            for key in ("num_requests", "input_len", "output_len", "seed", "repeats")
        },
        "hardware": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "git_sha": git_sha(),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def git_sha() -> str | None:
    """The commit this runs from, ``None`` outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    main()
