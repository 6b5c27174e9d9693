"""Whether the engine computes what transformers computes in fp32, before anything is timed.

Random prompts of many lengths are continued greedily, with log probabilities, by the engine; then
transformers says in fp32 what each position's logits are, given the same tokens before it. Every
token of the engine must be as likely as the likeliest one but for rounding, and its log
probability right but for rounding. In a 16-bit type rounding is what transformers itself loses in
that type on the same tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from bench.random_model import RandomModel
from shared.core.request import Request, SamplingParams
from shared.engine.engine import Engine

PROMPT_LENS = (1, 33, 64, 100, 300, 700)
"""Again and again, for as many requests as there are."""
MIN_BLOCKS = 128
"""In a smaller pool nothing is tuned: other kernels could run than those that are timed."""
BUDGET = 512
"""Tokens of an iteration: the longest prompt is cut into chunks, the one before it is not."""
BLOCK_SIZE = 64
FP32_LIMIT = 1e-3
"""Of differences between log probabilities, in fp32."""
HALF_RATIO = 2.0
"""How much larger than transformers' own error in the same type ours may be."""


@dataclass(frozen=True, slots=True)
class Continued:
    """A prompt, what the engine made of it, and the log probabilities it gave."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def check(model: RandomModel, *, num_requests: int, num_tokens: int, seed: int) -> dict[str, Any]:
    """Hold both ways of stepping against the reference, in fp32 and in the model's type.

    ``is_right`` says whether all is well.
    """
    rng = random.Random(f"{seed} check")
    ids = range(3, model.geometry.vocab_size)
    lengths = list(islice(cycle(PROMPT_LENS), num_requests))
    prompts = [tuple(rng.choices(ids, k=length)) for length in lengths]
    report: dict[str, Any] = {
        "layers": model.geometry.num_layers,
        "prompt_lens": sorted(set(lengths)),
        "num_requests": num_requests,
        "num_tokens": num_tokens,
    }
    is_right = True
    for dtype in dict.fromkeys((torch.float32, model.dtype)):
        ways = {}
        for way, is_pipelined in (("plain", False), ("pipelined", True)):
            engine = _engine(replace(model, dtype=dtype), lengths, num_tokens, is_pipelined)
            ways[way] = continue_prompts(engine, prompts, num_tokens)
            del engine
        entry = _compare(replace(model, dtype=dtype), ways)
        report[str(dtype).removeprefix("torch.")] = entry
        is_right = is_right and entry["is_right"]
    report["is_right"] = is_right
    return report


def continue_prompts(
    engine: Engine, prompts: Sequence[tuple[int, ...]], num_tokens: int
) -> list[Continued]:
    """Greedily, with log probabilities; half of the prompts arrive while others run."""
    requests = [
        Request(
            request_id=str(index),
            attempt=0,
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=0
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    logprobs: dict[str, list[float]] = {request.request_id: [] for request in requests}
    coming = list(requests)
    for request in coming[::2]:
        engine.add(request)
    late = coming[1::2]
    while (step := engine.step()) is not None or late:
        if late:
            engine.add(late.pop())
        for output in step.outputs if step is not None else ():
            if output.error is not None:
                raise SystemExit(f"{output.key} failed: {output.error}")
            tokens[output.key.request_id] += output.token_ids
            logprobs[output.key.request_id] += [one.logprob for one in output.logprobs]
    return [
        Continued(r.prompt_token_ids, tuple(tokens[r.request_id]), tuple(logprobs[r.request_id]))
        for r in requests
    ]


def _engine(
    model: RandomModel, lengths: Sequence[int], num_tokens: int, is_pipelined: bool
) -> Engine:
    blocks = sum(-(-(length + num_tokens) // BLOCK_SIZE) for length in lengths)
    config = model.engine_config(
        block_size=BLOCK_SIZE,
        num_blocks=max(MIN_BLOCKS, blocks + 8),
        max_num_seqs=len(lengths),
        max_num_batched_tokens=max(BUDGET, len(lengths)),
    )
    return model.engine(config, is_pipelined=is_pipelined)


def _compare(model: RandomModel, ways: dict[str, list[Continued]]) -> dict[str, Any]:
    is_exact = model.dtype is torch.float32
    reference = model.load().float()
    wanted = {way: [_logprobs(reference, one) for one in all_] for way, all_ in ways.items()}
    del reference
    plain, pipelined = (torch.tensor([one.tokens for one in all_]) for all_ in ways.values())
    entry: dict[str, Any] = {"equal_tokens": float((plain == pipelined).double().mean())}
    theirs = None if is_exact else model.load()
    for way, continued in ways.items():
        ours = torch.cat([torch.tensor(one.logprobs, dtype=torch.float64) for one in continued])
        rows = torch.cat(wanted[way])
        tokens = torch.cat([torch.tensor(one.tokens) for one in continued])[:, None]
        chosen = rows.gather(1, tokens)[:, 0]
        best = rows.max(dim=-1).values
        error = _rms(ours - chosen)
        figures = {
            "logprob_error": error,
            "largest_logprob_error": float((ours - chosen).abs().max()),
            "largest_regret": float((best - chosen).max()),
            "greedy_agreement": float((best == chosen).double().mean()),
        }
        if theirs is None:
            worst = max(figures["largest_regret"], figures["largest_logprob_error"])
            figures["is_right"] = worst <= FP32_LIMIT
        else:
            peer = torch.cat([_logprobs(theirs, one) for one in continued])
            own = _rms(peer.gather(1, tokens)[:, 0] - chosen)
            likeliest = peer.argmax(dim=-1, keepdim=True)
            regret = float((best - rows.gather(1, likeliest)[:, 0]).max())
            agreement = (likeliest[:, 0] == rows.argmax(dim=-1)).double().mean()
            figures |= {
                "transformers_logprob_error": own,
                "transformers_largest_regret": regret,
                "transformers_greedy_agreement": float(agreement),
                # A regret is a difference of two errors; most positions have none at all.
                "is_right": error <= HALF_RATIO * own
                and figures["largest_regret"] <= HALF_RATIO * max(regret, 4.0 * own),
            }
        entry[way] = figures
    entry["is_right"] = all(entry[way]["is_right"] for way in ways)
    return entry


@torch.inference_mode()
def _logprobs(model: Any, continued: Continued) -> Tensor:
    """fp64 log probabilities ``[num_tokens, vocab_size]`` where the tokens were chosen."""
    ids = torch.tensor([[*continued.prompt, *continued.tokens]], device=model.device)
    logits: Tensor = model(ids[:, :-1], use_cache=False).logits[0, len(continued.prompt) - 1 :]
    return logits.double().log_softmax(dim=-1).cpu()


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
