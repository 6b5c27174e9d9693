"""Offline throughput of one engine, beside what the machine would allow.

    python -m bench.engine --model DIR [--batch 16] [--input 256] [--output 128] [--json -]

Drives ``Engine.step``, the loop of the prefill and decode workers, without the bus. What is
counted is in ``docs/benchmarks.md``.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import offline
from bench.environment import environment
from bench.machine import Measured, linear_shapes, measure_machine
from bench.roofline import ModelSize, model_size, uniform_floor
from bench.serving import Emit
from bench.workload import OfflineRequest, Workload
from shared.core.request import Request, SamplingParams
from shared.engine.build import build_engine
from shared.engine.config import DEVICES, EngineConfig
from shared.engine.engine import Engine

ENGINE_FLAGS = (
    "dtype",
    "device",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_blocks",
)
"""Arguments that go into ``EngineConfig`` where they are given."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class BanyanServing:
    """Our engine under the benchmark's loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._attempt = 0

    def add(self, index: int, request: OfflineRequest) -> None:
        """Queue it, greedy."""
        self._attempt += 1
        sampling = SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True)
        self._engine.add(
            Request(
                request_id=str(index),
                attempt=self._attempt,
                prompt_token_ids=request.prompt_token_ids,
                sampling=sampling,
            )
        )

    def step(self, emit: Emit) -> None:
        """One iteration."""
        step = self._engine.step()
        if step is None:
            raise SystemExit("the engine stopped before all tokens were out")
        for output in step.outputs:
            if output.error is not None:
                raise SystemExit(f"{output.key} failed: {output.error}")
        emit((int(o.key.request_id), len(o.token_ids)) for o in step.outputs if o.token_ids)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__.split("\n")[0])
    offline.add_arguments(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    for name in ("--max-num-seqs", "--max-num-batched-tokens", "--block-size"):
        parser.add_argument(name, type=int, help="default: the engine's own")
    parser.add_argument("--num-blocks", type=int, help="default: for twice the largest workload")
    parser.add_argument("--no-floor", action="store_true", help="do not measure the machine")
    return parser.parse_args(argv)


def num_blocks_for(workloads: Sequence[Workload], block_size: int) -> int:
    """Blocks for twice the requests of the largest workload, so that old ones are evicted."""
    return 2 * max(
        sum(-(-(shape.input_len + shape.output_len) // block_size) + 1 for shape in w.shapes)
        for w in workloads
    )


def run_engine(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Load the model and serve the workloads: facts about the engine, and figures of each.

    The engine is gone when this returns.
    """
    workloads = offline.workloads_of(args)
    settings = {key: getattr(args, key) for key in ENGINE_FLAGS}
    given = {key: value for key, value in settings.items() if value is not None}
    config = EngineConfig(model_path=args.model, **given)
    if config.num_blocks is None:
        config = replace(config, num_blocks=num_blocks_for(workloads, config.block_size))
    engine = build_engine(config)
    engine.pool.touch()  # a service has used all of its pool after a while
    serving = BanyanServing(engine)
    results = [offline.measure(serving, w, args, engine.spec.vocab_size) for w in workloads]
    is_cuda = engine.device.type == "cuda"
    facts = {
        "engine": "banyan",
        "architecture": engine.spec.architecture,
        "dtype": engine.spec.dtype,
        "device": str(engine.device),
        "num_threads": torch.get_num_threads(),
        "peak_memory_bytes": (
            torch.cuda.max_memory_allocated(engine.device)
            if is_cuda
            else offline.peak_memory_bytes()
        ),
    }
    return facts, results


def add_floor(result: dict[str, Any], size: ModelSize, measured: Measured, itemsize: int) -> None:
    """Put the floor of a uniform workload, and what share of it was reached, into ``result``."""
    result["floor_decode_step_s"] = None
    if "batch" not in result:
        return
    batch, input_len, output_len = result["batch"], result["input"], result["output"]
    floor = uniform_floor(
        size,
        measured.rates,
        batch=batch,
        input_len=input_len,
        output_len=output_len,
        itemsize=itemsize,
    )
    best = {
        "output": batch * output_len / floor.total_s,
        "prefill": batch * input_len / floor.prefill_s,
    }
    result["floor_decode_step_s"] = floor.decode_step_s or None
    result["floor_output_tokens_per_s"] = best["output"]
    result["floor_prefill_tokens_per_s"] = best["prefill"]
    step_s = result["decode_step_s"]
    result["share_of_floor"] = {
        "output": result["output_tokens_per_s"] / best["output"],
        "prefill": result["prefill_tokens_per_s"] / best["prefill"],
        "decode": floor.decode_step_s / step_s if step_s else None,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and report."""
    args = parse_args(argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    facts, results = run_engine(args)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not args.no_floor:
        dtype = DTYPES[facts["dtype"]]
        device = torch.device(facts["device"])
        measured = measure_machine(device, dtype, linear_shapes(args.model))
        size = model_size(args.model)
        for result in results:
            add_floor(result, size, measured, dtype.itemsize)
        facts["machine"] = measured.report()
    facts["environment"] = environment()
    offline.write_report(offline.flattened(facts, results), args)


if __name__ == "__main__":
    main()
