"""Are the answers those of ``transformers``, token for token? fp32, greedy.

    python -m bench.equality [--data alpaca_data.jsonl.gz] [--num-prompts 100] [--decode 2] …

Without ``--data`` our own twenty prompts are asked. Prints one JSON line a configuration.
"""

import argparse
import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

from bench.clients import CheckedClients
from bench.reference import OWN_PROMPTS, Expected, Reference, alpaca_prompts
from bench.suite import ROOT, running_suite

BUNDLED = ROOT / "models" / "tiny-chat"


def expected_answers(
    model_dir: Path, data: Path | None, num_prompts: int, max_tokens: int
) -> list[Expected]:
    """What transformers answers to the prompts."""
    texts = list(OWN_PROMPTS) if data is None else alpaca_prompts(data, num_prompts)
    reference = Reference(model_dir)
    prompts = [reference.chat_prompt(text) for text in texts[:num_prompts]]
    return [reference.generate(prompt, max_tokens) for prompt in prompts]


def main() -> int:
    """Run the comparison; exit code 1 if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--transport", nargs="+", default=["ucx", "tcp"])
    args = parser.parse_args()
    expected = expected_answers(args.model, args.data, args.num_prompts, args.max_tokens)
    is_equal = True
    for transport in args.transport:
        for num_decode in args.decode:
            with running_suite(
                *("--dtype", "fp32", "--model", str(args.model)),
                *("--decode", str(num_decode), "--transport", transport),
            ) as suite:
                clients = CheckedClients(suite.url, args.model, expected)
                answers = asyncio.run(
                    clients.run(
                        num_requests=len(expected), concurrency=8, max_tokens=args.max_tokens
                    )
                )
                used = sorted({worker["transport"] for worker in suite.workers()})
            verdicts = Counter(answer.verdict for answer in answers)
            is_equal &= not verdicts["different"] and not verdicts["failed"]
            print(
                json.dumps(
                    {"transport": used, "num_decode": num_decode, "verdicts": dict(verdicts)}
                ),
                flush=True,
            )
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
