"""What the offline benchmarks serve: requests of random tokens, with the time each one arrives.

Standard library only: it also runs in the peers' environments.
"""

import math
import random
from dataclasses import dataclass

FIRST_TOKEN_ID = 3
"""Ids below are usually padding, begin and end."""
MIXED_SEED = 20240607
MIXED_INPUTS = (32, 768)
MIXED_OUTPUTS = (16, 256)
MIXED_REQUESTS = 32
MIXED_PER_S = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens of one request, which arrives ``at_s`` after the start."""

    input_len: int
    output_len: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """One request to serve; its output has ``output_len`` tokens whatever they are."""

    prompt_token_ids: tuple[int, ...]
    output_len: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by their shapes, in the order of their arrival."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all requests have the same lengths and are there from the start."""
        return set(self.shapes) == {self.shapes[0]} and self.shapes[0].at_s == 0.0

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, output included."""
        return max(shape.input_len + shape.output_len for shape in self.shapes)

    @property
    def num_input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(shape.input_len for shape in self.shapes)

    def requests(
        self, rng: random.Random, vocab_size: int, *, max_output: int | None = None
    ) -> list[OfflineRequest]:
        """The requests with fresh random prompts, their outputs cut to ``max_output``.

        Prompts differ from call to call, so that no prefix cache can help.
        """
        ids = range(min(FIRST_TOKEN_ID, vocab_size - 1), vocab_size)
        return [
            OfflineRequest(
                prompt_token_ids=tuple(rng.choices(ids, k=shape.input_len)),
                output_len=min(shape.output_len, max_output or shape.output_len),
                at_s=shape.at_s,
            )
            for shape in self.shapes
        ]


def uniform(batch: int, input_len: int, output_len: int) -> Workload:
    """``batch`` equal requests, all there at the start."""
    if min(batch, input_len, output_len) < 1:
        raise ValueError(f"{batch}x{input_len}x{output_len}: every number must be at least 1")
    return Workload(f"{batch}x{input_len}x{output_len}", (Shape(input_len, output_len),) * batch)


def mixed(num_requests: int = MIXED_REQUESTS, requests_per_s: float = MIXED_PER_S) -> Workload:
    """Requests of many lengths that arrive at random, the same ones at every call.

    Lengths are log-uniform in ``MIXED_INPUTS`` and ``MIXED_OUTPUTS``, gaps exponential (a Poisson
    process), the first request arrives at once.
    """
    if num_requests < 1 or not requests_per_s > 0.0:
        raise ValueError(f"mixed: {num_requests} requests, {requests_per_s} a second")
    rng = random.Random(MIXED_SEED)
    shapes, at_s = [], 0.0
    for _ in range(num_requests):
        shapes.append(
            Shape(_log_uniform(rng, *MIXED_INPUTS), _log_uniform(rng, *MIXED_OUTPUTS), at_s)
        )
        at_s += rng.expovariate(requests_per_s)
    return Workload(f"mixed:{num_requests}:{requests_per_s:g}", tuple(shapes))


def parse_workload(text: str) -> Workload:
    """``16x256x128`` (batch, input, output) or ``mixed[:REQUESTS[:PER_SECOND]]``.

    Raises ``ValueError`` for anything else.
    """
    kind, *rest = text.split(":")
    try:
        if kind == "mixed" and len(rest) <= 2:
            return mixed(*[int(n) for n in rest[:1]], *[float(n) for n in rest[1:]])
        batch, input_len, output_len = (int(n) for n in text.split("x"))
    except ValueError as error:
        raise ValueError(f"{text!r} is neither BATCHxINPUTxOUTPUT nor mixed[:N[:RATE]]") from error
    return uniform(batch, input_len, output_len)


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
