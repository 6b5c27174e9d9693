"""What the text half of the gateway costs: encoding, detokenising, stop strings, chunks.

    python -m bench.micro.tokenizer [--model DIR] [--repeats N] [--out FILE]

Prints JSON: for each step the median and the 10th and 90th percentile over the repeats, in
microseconds a unit (token, character, call), and next to detokenising the two alternatives measured
in the same run: decoding all tokens again with each new one, and the library's ``DecodeStream``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from services.gateway.choice import Choice
from services.gateway.generation import TokenEvent
from services.gateway.response_format import ChatFormat, Envelope
from services.gateway.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "The quick brown fox isn't naïve: it costs 12.50 €, said 日本語の先生 😀.\n"
NUM_TOKENS = 512


def measure(work: Callable[[], object], units: int, repeats: int) -> dict[str, float]:
    """Microseconds a unit of ``work``, which does ``units`` of them."""
    work()
    samples = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        samples.append((time.perf_counter() - start_s) / units * 1e6)
    deciles = statistics.quantiles(samples, n=10)
    return {
        "median_us": round(statistics.median(samples), 3),
        "p10_us": round(deciles[0], 3),
        "p90_us": round(deciles[-1], 3),
    }


def run(model_dir: Path, repeats: int) -> dict[str, Any]:
    """All measurements over the model in ``model_dir``."""
    tokenizer = Tokenizer.from_model_dir(model_dir)
    backend = Backend.from_file(str(model_dir / "tokenizer.json"))
    text = SENTENCE * 100
    token_ids = tokenizer.encode_now(text, add_special_tokens=False)[:NUM_TOKENS]
    output_format = ChatFormat(
        Envelope(completion_id="chatcmpl-0", created=0, model="m", system_fingerprint=None),
        tokenizer,
        has_logprobs=False,
    )

    def detokenize() -> None:
        detokenizer = tokenizer.detokenizer()
        for token_id in token_ids:
            detokenizer.feed(token_id)
        detokenizer.flush()

    def decode_all_again() -> None:
        for end in range(1, len(token_ids) + 1):
            tokenizer.decode(token_ids[:end])

    def decode_stream() -> None:
        stream = DecodeStream(skip_special_tokens=True)
        for token_id in token_ids:
            stream.step(backend, token_id)

    def choice(stop_strings: tuple[str, ...]) -> Callable[[], None]:
        def work() -> None:
            one = Choice(index=0, detokenizer=tokenizer.detokenizer(), stop_strings=stop_strings)
            for token_id in token_ids:
                delta = one.feed(TokenEvent(token_ids=(token_id,)))
                msgspec.json.encode(output_format.piece(delta, UNSET))

        return work

    per_token = len(token_ids)
    return {
        "encode_per_character": measure(
            lambda: tokenizer.encode_now(text, add_special_tokens=False), len(text), repeats
        ),
        "encode_short_prompt_per_call": measure(
            lambda: tokenizer.encode_now(SENTENCE, add_special_tokens=False), 1, repeats
        ),
        "detokenize_per_token": measure(detokenize, per_token, repeats),
        "detokenize_all_again_per_token": measure(decode_all_again, per_token, repeats),
        "detokenize_decode_stream_per_token": measure(decode_stream, per_token, repeats),
        "event_to_chunk_per_token": measure(choice(()), per_token, repeats),
        "event_to_chunk_with_4_stops_per_token": measure(
            choice(("\n\n\n", "END", "<stop>", "Human:")), per_token, repeats
        ),
    }


def main() -> None:
    """Measure and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-chat")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sha = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = {
        "benchmark": "micro/tokenizer",
        "git_sha": sha.stdout.strip() or None,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("tokenizers", "msgspec")},
        },
        "workload": {
            "model": arguments.model.name,
            "text": SENTENCE,
            "tokens": NUM_TOKENS,
            "repeats": arguments.repeats,
            "seed": None,
        },
        "results": run(arguments.model, arguments.repeats),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
