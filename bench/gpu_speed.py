"""How long decodes and prefills of an engine take, and transformers beside it."""

import gc
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.engine import BanyanServing
from bench.random_model import RandomModel
from bench.roofline import Cost, ModelSize, iteration_cost
from bench.serving import Serving, serve
from bench.workload import Workload
from shared.core.request import Request, SamplingParams
from shared.engine.engine import Engine

WARM_UP_STEPS = 8
"""Before anything is timed: kernels are compiled and chosen, graphs are captured."""
BLOCK_SIZE = 64


def decode_engine(
    model: RandomModel, batches: Sequence[int], context: int, steps: int, prompt: int
) -> Engine:
    """An engine for ``measure_decode`` and ``measure_prefill``."""
    blocks = -(-(context + WARM_UP_STEPS + steps + 2) // BLOCK_SIZE) + 1
    config = model.engine_config(
        block_size=BLOCK_SIZE,
        num_blocks=max(max(batches) * blocks, prompt // BLOCK_SIZE + 2) + 8,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(prompt, *batches),
    )
    return model.engine(config)


def measure_decode(
    engine: Engine, batch: int, context: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Seconds of a decode of ``batch`` requests with ``context`` tokens each on average.

    Wall time over ``steps`` iterations, everything in it. The requests start with random keys and
    values, as if they had been prefilled elsewhere; all of them run from the first step to the
    last. Figures of all repeats, and their median.
    """
    first = _first_context(context, steps)
    times_s = []
    for repeat in range(repeats):
        keys = []
        for index in range(batch):
            request = _resumed(f"{batch}-{repeat}-{index}", first - WARM_UP_STEPS, steps)
            engine.reserve(request.key, request.num_tokens)
            engine.start_reserved(request, num_computed_tokens=request.num_tokens - 1)
            keys.append(request.key)
        if repeat == 0:
            for layer in engine.pool.layers:
                layer.tensor.normal_()
        for _ in range(WARM_UP_STEPS):
            _step(engine, batch)
        started_s = time.perf_counter()
        for _ in range(steps):
            _step(engine, batch)
        times_s.append((time.perf_counter() - started_s) / steps)
        for key in keys:
            engine.release(key)
        while engine.step() is not None:
            pass
    step_s = statistics.median(times_s)
    return {
        "batch": batch,
        "context": context,
        "step_s": step_s,
        "step_s_by_run": times_s,
        "output_tokens_per_s": batch / step_s,
    }


def decode_costs(size: ModelSize, batch: int, context: int, steps: int, itemsize: int) -> Cost:
    """What a step of ``measure_decode`` reads and computes on average."""
    first = _first_context(context, steps)
    costs = [iteration_cost(size, [(1, first + i)] * batch, itemsize) for i in range(steps)]
    return Cost(
        read_bytes=statistics.mean(cost.read_bytes for cost in costs),
        flops=statistics.mean(cost.flops for cost in costs),
    )


def measure_prefill(engine: Engine, num_tokens: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds from the arrival of one prompt of random tokens to its first token."""
    rng = random.Random(f"{seed} prefill")
    times_s = []
    for repeat in range(repeats + 1):  # the first one warms up
        request = Request(
            request_id=f"prefill-{repeat}",
            attempt=0,
            prompt_token_ids=tuple(rng.choices(range(3, engine.spec.vocab_size), k=num_tokens)),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        started_s = time.perf_counter()
        engine.add(request)
        _step(engine, 1)
        times_s.append(time.perf_counter() - started_s)
    return {
        "num_tokens": num_tokens,
        "prefill_s": statistics.median(times_s[1:]),
        "prefill_s_by_run": times_s[1:],
    }


def compare_with_transformers(
    model: RandomModel, workload: Workload, rounds: int, seed: int
) -> dict[str, Any]:
    """Both serve the same requests by turns, transformers by its continuous batching.

    Both models and caches are on the device together. Figures of each round, their medians, and
    the median of the rounds' ratios.
    """
    # Only here: with it come parts of transformers that nothing else needs.
    from bench.peers.transformers_continuous import start_serving

    batch, longest = len(workload.shapes), workload.max_model_len
    config = model.engine_config(
        block_size=BLOCK_SIZE,
        num_blocks=batch * (-(-longest // BLOCK_SIZE) + 1) + 8,
        max_num_seqs=batch,
        max_num_batched_tokens=max(2048, batch),
    )
    engine = model.engine(config)
    ours = BanyanServing(engine)
    _rate(ours, workload, model, f"{seed} warm-up")  # before transformers takes what memory is left
    theirs = start_serving(model.load(), max_model_len=longest, max_batch=batch, is_streaming=False)
    rates: dict[str, list[float]] = {"banyan": [], "transformers": []}
    try:
        _rate(theirs, workload, model, f"{seed} warm-up")
        for number in range(rounds):
            rates["banyan"].append(_rate(ours, workload, model, f"{seed} {number}"))
            rates["transformers"].append(_rate(theirs, workload, model, f"{seed} {number}"))
    finally:
        theirs.stop()
    ratios = [a / b for a, b in zip(rates["banyan"], rates["transformers"], strict=True)]
    return {
        "workload": workload.name,
        "output_tokens_per_s": {name: statistics.median(all_) for name, all_ in rates.items()},
        "output_tokens_per_s_by_round": rates,
        "spread": {name: max(all_) / min(all_) - 1.0 for name, all_ in rates.items()},
        "ratio": statistics.median(ratios),
        "ratio_by_round": ratios,
    }


def _rate(serving: Serving, workload: Workload, model: RandomModel, seed: str) -> float:
    rng = random.Random(seed)
    run = serve(serving, workload.requests(rng, model.geometry.vocab_size))
    if run.num_output_tokens != sum(shape.output_len for shape in workload.shapes):
        raise SystemExit(f"{run.num_output_tokens} tokens came out")
    return run.output_tokens_per_s


def _first_context(context: int, steps: int) -> int:
    """Tokens before the new one in the first timed step, for a mean of ``context`` with it."""
    return max(WARM_UP_STEPS + 1, context - (steps + 1) // 2)


def _resumed(name: str, num_computed_tokens: int, steps: int) -> Request:
    """A request whose first output token is known: the next step decodes."""
    return Request(
        request_id=name,
        attempt=0,
        prompt_token_ids=(3,) * num_computed_tokens,
        output_token_ids=(4,),
        sampling=SamplingParams(
            max_tokens=WARM_UP_STEPS + steps + 8, temperature=0.0, ignore_eos=True
        ),
    )


def _step(engine: Engine, num_expected: int) -> None:
    """One iteration that gives ``num_expected`` requests a token."""
    step = engine.step()
    outputs = () if step is None else step.outputs
    errors = [output.error for output in outputs if output.error is not None]
    if errors or len(outputs) != num_expected:
        raise SystemExit(f"{len(outputs)} of {num_expected} requests got a token; {errors}")


def free_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
