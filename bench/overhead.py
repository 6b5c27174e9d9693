"""Where the time of a decode step goes: the model's own kernels, and the host around them.

    python -m bench.overhead --model DIR [--batch 16] [--num-threads N] [--json FILE]

Steady decode steps of ``Engine.step`` on the CPU, where a kernel is done when its call returns:
everybody decodes, nobody comes or goes. Of each step every part is timed; what no part accounts
for is ``rest``, so that the parts of a step add up to it. The figures are medians over the steps.

====================== ==========================================================
``plan``               choosing the batch
``prepare``            its tokens, positions, slots and block tables as arrays
``embed layers head``  the model's own kernels, and the calls of them
``sample``             from logits to tokens: kernels too, but the sampler's
``land``               tokens brought to the host
``commit``             tokens and blocks booked
``rest``               everything else: outputs, statistics, and the measuring
====================== ==========================================================
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench import offline
from bench.environment import environment
from bench.workload import FIRST_TOKEN_ID
from shared.core.request import Request, SamplingParams
from shared.engine import runner
from shared.engine.build import build_engine
from shared.engine.config import DTYPES, EngineConfig
from shared.engine.engine import Engine
from shared.engine.flight import Flight

PARTS = ("plan", "prepare", "embed", "layers", "head", "sample", "land", "commit", "rest")
KERNELS = ("embed", "layers", "head", "sample")
"""Parts that are no overhead."""
BLOCK_SIZE = 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--batch", type=int, default=16, help="requests that decode")
    parser.add_argument("--input", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--steps", type=int, default=200, help="the figures are their medians")
    parser.add_argument("--warm-up", type=int, default=50, help="steps before these")
    parser.add_argument("--num-threads", type=int, help="default: what the engine takes by itself")
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - is standard output")
    return parser.parse_args(argv)


def make_engine(args: argparse.Namespace) -> Engine:
    """An engine with its requests added, and room for all of them to decode long enough."""
    # One iteration for each prompt at most, or as many as the token budget makes of them.
    max_tokens = 2 * args.batch + args.input + args.warm_up + args.steps
    max_model_len = args.input + max_tokens
    config = EngineConfig(
        model_path=args.model,
        dtype=args.dtype,
        device="cpu",
        block_size=BLOCK_SIZE,
        max_num_seqs=args.batch,
        max_num_batched_tokens=max(2048, args.batch),
        num_blocks=(args.batch + 1) * -(-max_model_len // BLOCK_SIZE),
    )
    engine = build_engine(config)
    rng = random.Random(0)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    for index in range(args.batch):
        prompt = [rng.randrange(FIRST_TOKEN_ID, engine.spec.vocab_size) for _ in range(args.input)]
        engine.add(
            Request(
                request_id=str(index),
                attempt=0,
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
            )
        )
    return engine


def measure(engine: Engine, batch: int, num_warm_up: int, num_steps: int) -> list[dict[str, float]]:
    """Seconds of each part of ``num_steps`` steps in which ``batch`` requests decode."""
    while _num_decodes(engine) < batch:
        pass
    for _ in range(num_warm_up):
        _num_decodes(engine)
    steps = []
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with _timed(engine) as spent_s:
            for _ in range(num_steps):
                spent_s.update(dict.fromkeys(PARTS, 0.0))
                started_s = time.perf_counter()
                num_decodes = _num_decodes(engine)
                step_s = time.perf_counter() - started_s
                if num_decodes < batch:
                    raise SystemExit("the model's context is too short for so many steps")
                steps.append({**spent_s, "rest": step_s - sum(spent_s.values())})
    finally:
        gc.enable()
        gc.unfreeze()
    return steps


def _num_decodes(engine: Engine) -> int:
    """Run a step: how many requests decoded in it."""
    step = engine.step()
    if step is None:
        raise SystemExit("the model's context is too short for so many steps")
    return step.stats.work.num_decode


@contextmanager
def _timed(engine: Engine) -> Iterator[dict[str, float]]:
    """Seconds spent in each part so far, to be reset by the caller; only while this is open."""
    model_runner, scheduler = engine._runner, engine._scheduler
    places: dict[str, tuple[Any, str]] = {
        "plan": (scheduler, "plan"),
        "prepare": (model_runner, "_prepare"),
        "embed": (model_runner._chain, "embed"),
        "layers": (model_runner, "_run_layers"),
        "head": (model_runner._chain, "head"),
        "sample": (runner, "sample_on_device"),
        "land": (Flight, "land"),
        "commit": (scheduler, "commit"),
    }
    spent_s = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            result = function(*args, **kwargs)
            spent_s[part] += time.perf_counter() - started_s
            return result

        return run

    with ExitStack() as stack:
        for part, (owner, name) in places.items():
            function, is_own = getattr(owner, name), name in vars(owner)
            setattr(owner, name, timed(part, function))
            if is_own:
                stack.callback(setattr, owner, name, function)
            else:
                stack.callback(delattr, owner, name)
        yield spent_s


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over ``steps`` in seconds; ``host_s`` is a step without ``KERNELS``."""
    return {
        "step_s": statistics.median(sum(step.values()) for step in steps),
        "host_s": statistics.median(
            sum(spent_s for part, spent_s in step.items() if part not in KERNELS) for step in steps
        ),
        "parts_s": {part: statistics.median(step[part] for step in steps) for part in PARTS},
    }


def table(report: dict[str, Any]) -> str:
    """The figures for people, in microseconds."""
    parts = {**report["parts_s"], "step": report["step_s"], "host": report["host_s"]}
    return "\n".join(f"{part:<8}{seconds * 1e6:>10.0f} us" for part, seconds in parts.items())


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and report."""
    args = parse_args(argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    engine = make_engine(args)
    steps = measure(engine, args.batch, args.warm_up, args.steps)
    report = summarise(steps) | {
        "batch": args.batch,
        "input": args.input,
        "steps": args.steps,
        "architecture": engine.spec.architecture,
        "dtype": engine.spec.dtype,
        "num_threads": torch.get_num_threads(),
        "environment": environment(),
    }
    if args.json is None:
        print(table(report))
    else:
        offline.write_report(report, args)


if __name__ == "__main__":
    main()
