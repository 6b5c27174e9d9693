"""What weights and KV of fewer bits do to a model's answers.

    python -m bench.quality [--model DIR] [--variant int8 --variant kv-fp8 …] [--json FILE]

Each variant is held against fp32 on ``bench/data/quality.jsonl``, fifty questions and answers of
our own. The answers are fed to the model token by token, all conversations in one batch, so that
what is read is the cache. Then the engine answers the questions itself, greedily, 64 tokens each.

* ``perplexity``: exp of the mean negative log-likelihood of the answers' tokens;
* ``top1_agreement``: share of those positions at which the most likely token is fp32's;
* ``greedy_agreement``: share of the tokens generated that are fp32's at that place;
* ``mean_common_prefix_tokens``: tokens generated before the first that differs.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.environment import environment
from bench.suite import ROOT
from shared.core.request import Request, SamplingParams
from shared.engine.attention import AttentionBatch
from shared.engine.build import build_engine
from shared.engine.chain import ModelChain
from shared.engine.config import EngineConfig
from shared.engine.model import load_model
from shared.kvcache.pool import KVPool

BUNDLED = ROOT / "models" / "tiny-chat"
TEXT = ROOT / "bench" / "data" / "quality.jsonl"
BLOCK_SIZE = 64

VARIANTS: dict[str, dict[str, str]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "bf16", "quantization": "int8"},
    "int8-fp32": {"dtype": "fp32", "quantization": "int8"},
    "int4": {"dtype": "bf16", "quantization": "int4"},
    "kv-int8": {"dtype": "fp32", "kv_cache_dtype": "int8"},
    "kv-fp8": {"dtype": "fp32", "kv_cache_dtype": "fp8"},
    "int8+kv-int8": {"dtype": "bf16", "quantization": "int8", "kv_cache_dtype": "int8"},
    "int4+kv-fp8": {"dtype": "bf16", "quantization": "int4", "kv_cache_dtype": "fp8"},
}
REFERENCE = "fp32"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of a question, in the model's chat template, and of an answer with its end."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What one variant did.

    ``logprobs`` and ``best`` have one entry a token of the answers, ``generated`` one list a
    question.
    """

    logprobs: Tensor
    best: Tensor
    generated: tuple[tuple[int, ...], ...]
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """One row of the table; what its columns mean is said at the top of this module."""

    variant: str
    perplexity: float
    perplexity_change: float
    top1_agreement: float
    greedy_agreement: float
    mean_common_prefix_tokens: float
    weight_bytes: int
    kv_bytes_per_token: int


def read_conversations(path: Path, model_dir: Path) -> list[Conversation]:
    """The questions and answers of a JSON Lines file with ``prompt`` and ``answer``."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    conversations = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        answer = tokenizer.encode(row["answer"], add_special_tokens=False)
        conversations.append(Conversation(tuple(prompt), (*answer, tokenizer.eos_token_id)))
    return conversations


@torch.inference_mode()
def teacher_forced(
    chain: ModelChain, conversations: Sequence[Conversation]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers' tokens and the most likely tokens at their places.

    Prompts are prefilled together, answers decoded one token of each at a time.
    """
    lengths = [len(c.prompt) + len(c.answer) for c in conversations]
    blocks_each = -(-max(lengths) // BLOCK_SIZE)
    tables = [range(i * blocks_each, (i + 1) * blocks_each) for i in range(len(conversations))]
    pool = KVPool(chain.spec.kv_layout(BLOCK_SIZE), blocks_each * len(conversations), chain.device)
    backend = chain.attention(pool)

    def run(seqs: Sequence[int], starts: Sequence[int], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Logits behind the last token of each chunk, ``[len(seqs), vocab_size]``."""
        cu_seqlens_q, positions, slots = [0], [], []
        for seq, start, chunk in zip(seqs, starts, chunks, strict=True):
            for position in range(start, start + len(chunk)):
                positions.append(position)
                block = tables[seq][position // BLOCK_SIZE]
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            cu_seqlens_q.append(len(positions))
        batch = AttentionBatch(
            positions=torch.tensor(positions, device=chain.device),
            slot_mapping=torch.tensor(slots, device=chain.device),
            cu_seqlens_q=cu_seqlens_q,
            context_lens=[s + len(c) for s, c in zip(starts, chunks, strict=True)],
            block_tables=[tables[seq] for seq in seqs],
            backend=backend,
        )
        token_ids = torch.tensor([token for chunk in chunks for token in chunk])
        hidden = chain.embed(token_ids.to(chain.device), batch.positions)
        hidden = chain.run_layers(0, chain.spec.num_layers, hidden, batch)
        last_rows = torch.tensor(cu_seqlens_q[1:], device=chain.device) - 1
        return chain.head(hidden[last_rows]).log_softmax(-1).cpu()

    logprobs, best = [], []
    everybody = range(len(conversations))
    logits = run(everybody, [0] * len(everybody), [c.prompt for c in conversations])
    living: Sequence[int] = everybody
    for step in range(max(len(c.answer) for c in conversations)):
        tokens = torch.tensor([conversations[i].answer[step] for i in living])
        logprobs.append(logits.gather(1, tokens[:, None])[:, 0])
        best.append(logits.argmax(-1))
        living = [i for i in living if step + 1 < len(conversations[i].answer)]
        if living:
            logits = run(
                living,
                [len(conversations[i].prompt) + step for i in living],
                [conversations[i].answer[step : step + 1] for i in living],
            )
    return torch.cat(logprobs), torch.cat(best)


def generate(
    config: EngineConfig, conversations: Sequence[Conversation], max_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """What an engine answers greedily, the end-of-sequence token ignored."""
    engine = build_engine(config)
    tokens: list[list[int]] = [[] for _ in conversations]
    for index, conversation in enumerate(conversations):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        engine.add(
            Request(
                request_id=str(index),
                attempt=0,
                prompt_token_ids=conversation.prompt,
                sampling=sampling,
            )
        )
    while (step := engine.step()) is not None:
        for output in step.outputs:
            if output.error is not None:
                raise SystemExit(f"{output.key} failed: {output.error}")
            tokens[int(output.key.request_id)] += output.token_ids
    return tuple(map(tuple, tokens))


def observe(
    model_dir: Path, settings: dict[str, str], conversations: Sequence[Conversation], tokens: int
) -> Observed:
    """Run one variant."""
    kv_cache_dtype = settings.get("kv_cache_dtype")
    chain = load_model(
        model_dir, dtype=settings["dtype"], quantization=settings.get("quantization")
    )
    if kv_cache_dtype is not None:
        chain.spec = chain.spec.with_kv_cache_dtype(kv_cache_dtype)
    logprobs, best = teacher_forced(chain, conversations)
    spec = chain.spec
    del chain
    config = EngineConfig(
        model_path=str(model_dir),
        block_size=BLOCK_SIZE,
        num_blocks=4 * len(conversations),
        **settings,  # type: ignore[arg-type]
    )
    return Observed(
        logprobs=logprobs,
        best=best,
        generated=generate(config, conversations, tokens),
        weight_bytes=spec.param_bytes,
        kv_bytes_per_token=spec.kv_bytes_per_token,
    )


def compare(variant: str, observed: Observed, reference: Observed) -> Quality:
    """One row of the table."""
    pairs = list(zip(observed.generated, reference.generated, strict=True))
    equal = [sum(a == b for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs]
    num_tokens = sum(len(theirs) for _, theirs in pairs)
    perplexity, expected = (math.exp(-x.logprobs.double().mean()) for x in (observed, reference))
    return Quality(
        variant=variant,
        perplexity=perplexity,
        perplexity_change=perplexity / expected - 1,
        top1_agreement=float((observed.best == reference.best).double().mean()),
        greedy_agreement=sum(equal) / num_tokens,
        mean_common_prefix_tokens=sum(common_prefix(a, b) for a, b in pairs) / len(pairs),
        weight_bytes=observed.weight_bytes,
        kv_bytes_per_token=observed.kv_bytes_per_token,
    )


def common_prefix(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def table(rows: Sequence[Quality]) -> str:
    """The rows as Markdown."""
    lines = [
        "| variant | weights | KV per token | perplexity | change | top-1 | greedy | prefix |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.variant} | {row.weight_bytes / 1e6:.1f} MB | {row.kv_bytes_per_token} B "
            f"| {row.perplexity:.3f} | {row.perplexity_change:+.2%} | {row.top1_agreement:.1%} "
            f"| {row.greedy_agreement:.1%} | {row.mean_common_prefix_tokens:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the variants and report."""
    parser = argparse.ArgumentParser(prog="bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, default=TEXT, help="JSON Lines: prompt and answer")
    parser.add_argument("--variant", action="append", choices=[*VARIANTS][1:], metavar="NAME")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=64, help="generated for each prompt")
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - is standard output")
    args = parser.parse_args(argv)
    conversations = read_conversations(args.text, args.model)[: args.num_prompts]
    names = args.variant or [name for name in VARIANTS if name != REFERENCE]
    reference = observe(args.model, VARIANTS[REFERENCE], conversations, args.max_tokens)
    rows = [compare(REFERENCE, reference, reference)]
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        observed = observe(args.model, VARIANTS[name], conversations, args.max_tokens)
        rows.append(compare(name, observed, reference))
    if args.json != "-":
        print(table(rows))
    if args.json is not None:
        result = {
            "environment": environment(),
            "model": str(args.model),
            "num_prompts": len(conversations),
            "num_answer_tokens": len(reference.best),
            "max_tokens": args.max_tokens,
            "variants": [asdict(row) for row in rows],
        }
        text = json.dumps(result, indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(f"{text}\n")


if __name__ == "__main__":
    main()
