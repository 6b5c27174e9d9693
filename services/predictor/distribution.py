"""A distribution over output lengths, in the buckets of UELLM's resource profiler.

Buckets are half-open below: bucket *i* holds the lengths ``(edges[i-1], edges[i]]`` in tokens.

======  ======  =======  =======  =====  ============  ============
bucket  0       1        2        …      8             9
length  [1, 8]  (8, 16]  (16, 32]  …     (1024, 2048]  (2048, ∞)
======  ======  =======  =======  =====  ============  ============
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, exp, isfinite, log

BUCKET_EDGES_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
NUM_BUCKETS = len(BUCKET_EDGES_TOKENS) + 1

_SHORTEST = 0.5
"""Where the first bucket begins on the logarithmic scale: lengths up to here would round to 0."""
_TOLERANCE = 1e-6


def bucket_of(length_tokens: int) -> int:
    """The bucket that an output of ``length_tokens`` (at least 1) falls into."""
    return bisect_left(BUCKET_EDGES_TOKENS, length_tokens)


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """How long an output would get if nothing cut it off: a probability for each bucket.

    Raises ``ValueError`` unless there is one for each bucket, none negative, with sum 1.
    """

    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        values = self.probabilities
        if len(values) != NUM_BUCKETS:
            raise ValueError(f"{len(values)} probabilities for {NUM_BUCKETS} buckets")
        if not all(isfinite(p) and p >= 0 for p in values) or abs(sum(values) - 1) > _TOLERANCE:
            raise ValueError(f"no distribution: {values}")

    @classmethod
    def from_cdf(cls, below_edges: Sequence[float]) -> "LengthDistribution":
        """From the probabilities of an output no longer than each edge, rising, in ``[0, 1]``."""
        steps = (0.0, *below_edges, 1.0)
        return cls(tuple(steps[i + 1] - steps[i] for i in range(len(steps) - 1)))

    @classmethod
    def endless(cls) -> "LengthDistribution":
        """All of it in the open bucket: nothing but ``max_tokens`` ends such an output."""
        return cls((0.0,) * (NUM_BUCKETS - 1) + (1.0,))

    def quantile_tokens(self, q: float, max_tokens: int) -> int:
        """The length that a share ``q`` (0 < q ≤ 1) of outputs cut at ``max_tokens`` stays within.

        Lengths are taken to be spread evenly in their logarithm inside a bucket; in the open
        bucket nothing is known, so it counts as ``max_tokens``. In ``[1, max_tokens]``.
        """
        totals = tuple(accumulate(self.probabilities))
        bucket = next((i for i, total in enumerate(totals) if total >= q - _TOLERANCE), None)
        if bucket is None or bucket == NUM_BUCKETS - 1:
            return max_tokens
        low = BUCKET_EDGES_TOKENS[bucket - 1] if bucket else _SHORTEST
        high = BUCKET_EDGES_TOKENS[bucket]
        inside = self.probabilities[bucket]
        share = (q - (totals[bucket] - inside)) / inside if inside > 0 else 1.0
        length = low * exp(min(1.0, max(0.0, share)) * log(high / low))
        return min(max_tokens, max(1, ceil(length - _TOLERANCE)))

    def truncated(self, max_tokens: int) -> tuple[float, ...]:
        """The probabilities of the buckets for outputs that are cut at ``max_tokens``."""
        last = bucket_of(max_tokens)
        kept = self.probabilities[:last]
        beyond = (0.0,) * (NUM_BUCKETS - 1 - last)
        return (*kept, sum(self.probabilities[last:]), *beyond)
