"""What the suite adds to the first token of a short prompt on an idle system.

    python -m bench.ttft [--rounds 5] [--requests 40]

The same prompt is given to an engine in this process and to a running suite (gateway, bus,
scheduler, prefill and decode apart), round after round; medians of each round, the difference, and
the spread of repeating either. fp32, one torch thread an engine. Prints JSON.
"""

import argparse
import json
import queue
import statistics
import sys
import time
from pathlib import Path

import httpx

from bench.environment import environment
from bench.equality import BUNDLED
from bench.suite import Suite, running_suite
from services.gateway.served_model import ServedModel
from shared.core.request import Request, SamplingParams
from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.outputs import StepOutput
from shared.engine.thread import EngineThread

PROMPT = "Once upon a time there was a small"
"""Short, and its first new token has a text: one without would show only with the second."""
PAUSE_S = 0.02


class LocalEngine:
    """An engine in this process, asked as directly as possible."""

    def __init__(self, model_dir: Path) -> None:
        self._outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        config = EngineConfig(model_path=str(model_dir), dtype="fp32", num_blocks=256)
        self._engine = EngineThread(
            lambda progress: build_engine(config, on_progress=progress),
            on_output=self._outputs.put,
            on_fatal=lambda error: print(error, file=sys.stderr),
            num_threads=1,
        )
        self._engine.start().result(120)

    def ttft_s(self, name: str, prompt: tuple[int, ...]) -> float:
        """From handing the request over until its first token is out."""
        request = Request(
            request_id=name,
            attempt=0,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        began_s = time.perf_counter()
        self._engine.call(lambda e: e.add(request))
        self._outputs.get(timeout=10)
        return time.perf_counter() - began_s

    def stop(self) -> None:
        """End the engine's thread."""
        self._engine.stop(10)


def suite_ttft_s(http: httpx.Client, prompt: tuple[int, ...]) -> float:
    """From sending the request until its first chunk with a token is here."""
    body = {
        "model": "tiny-chat",
        "prompt": list(prompt),
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began_s = time.perf_counter()
    ttft_s = 0.0
    with http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and not ttft_s:
                ttft_s = time.perf_counter() - began_s
                assert json.loads(line[6:])["choices"][0]["text"]
    return ttft_s


def measure(suite: Suite, local: LocalEngine, rounds: int, requests: int) -> dict[str, object]:
    """Interleaved rounds of both."""
    model = ServedModel.from_model_dir(BUNDLED, name="tiny-chat")
    prompt = tuple(model.tokenizer.encode_now(PROMPT, add_special_tokens=True))
    local_s: list[float] = []
    suite_s: list[float] = []
    with httpx.Client(base_url=suite.url, timeout=30) as http:
        for number in range(rounds + 1):
            ours, theirs = [], []
            for index in range(requests):
                ours.append(local.ttft_s(f"r{number}-{index}", prompt))
                time.sleep(PAUSE_S)
            for _ in range(requests):
                theirs.append(suite_ttft_s(http, prompt))
                time.sleep(PAUSE_S)
            if number:  # the first round warms up
                local_s.append(statistics.median(ours))
                suite_s.append(statistics.median(theirs))
    added = [b - a for a, b in zip(local_s, suite_s, strict=True)]
    return {
        "prompt_tokens": len(prompt),
        "engine_ttft_ms": [round(1e3 * s, 2) for s in local_s],
        "suite_ttft_ms": [round(1e3 * s, 2) for s in suite_s],
        "added_ms": round(1e3 * statistics.median(added), 2),
        "added_spread_ms": [round(1e3 * min(added), 2), round(1e3 * max(added), 2)],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--transport", default="auto")
    args = parser.parse_args()
    local = LocalEngine(BUNDLED)
    with running_suite("--dtype", "fp32", "--transport", args.transport) as suite:
        result = measure(suite, local, args.rounds, args.requests)
        result["transport"] = suite.workers()[0]["transport"]
    local.stop()
    print(json.dumps({**result, **environment()}, indent=1))


if __name__ == "__main__":
    main()
