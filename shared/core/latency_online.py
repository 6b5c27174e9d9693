"""Following a running engine: a latency model whose constants adapt to the steps that are seen.

A machine is not as fast as when it was profiled: others compute on it, clocks throttle, the event
loop takes its share of the interpreter. Each of the model's terms (base, rows, requests, attention
of prefill and of decode) gets a scale, and the scales are refitted by linear least
squares on relative errors, in which older steps are forgotten exponentially.
"""

import math

from shared.core.latency_fit import solve_linear
from shared.core.latency_model import LatencyModel, StepTerms
from shared.core.step_work import StepWork

HALF_LIFE_STEPS = 200
MAX_SCALE = 1000.0
COMMON_PRIOR = 1e-3
"""Pull of the common scale towards 1, in steps' worth of evidence: almost none."""
OWN_PRIOR = 1.0
"""Pull of each scale towards the common one. Steps that all look alike cannot tell the terms
apart: then all of them change together."""
NUM_TERMS = len(StepTerms._fields)


class OnlineFit:
    """Scales of ``base``'s terms, refitted as steps are observed. Not thread-safe.

    ``observe`` costs the same however many steps there were: sums of products are kept, not
    steps. What they amount to is solved when ``model`` is asked for.
    """

    def __init__(self, base: LatencyModel, *, half_life_steps: int = HALF_LIFE_STEPS) -> None:
        self._base = base
        self._keep = 0.5 ** (1.0 / half_life_steps)
        self._products = [[0.0] * NUM_TERMS for _ in range(NUM_TERMS)]
        self._sums = [0.0] * NUM_TERMS
        self._scales = [1.0] * NUM_TERMS
        self._is_stale = False
        self._error_sum = 0.0
        self._error_weight = 0.0
        self.num_steps = 0
        """Steps observed so far."""

    def observe(self, work: StepWork, step_s: float) -> None:
        """Take in a step. One without work or without a time above 0 is passed over."""
        if work.num_batched_tokens == 0 or not (math.isfinite(step_s) and step_s > 0.0):
            return
        terms = self._base.constants.terms(self._base.facts.features(work))
        # Relative to what was measured, so that a step that hung somewhere counts for little.
        shares = [term / step_s for term in terms]
        error = abs(sum(s * x for s, x in zip(self._scales, shares, strict=True)) - 1.0)
        keep = self._keep
        self._error_sum = keep * self._error_sum + error
        self._error_weight = keep * self._error_weight + 1.0
        for i, share in enumerate(shares):
            row = self._products[i]
            for j in range(i + 1):
                row[j] = keep * row[j] + share * shares[j]
            self._sums[i] = keep * self._sums[i] + share
        self.num_steps += 1
        self._is_stale = True

    @property
    def error(self) -> float | None:
        """Mean relative error of late predictions, each made before its step was taken in."""
        return self._error_sum / self._error_weight if self._error_weight > 0.0 else None

    def model(self) -> LatencyModel:
        """The base with the constants of now."""
        if self._is_stale:
            self._scales = self._solve()
            self._is_stale = False
        scales = StepTerms(*self._scales)
        return self._base.with_constants(self._base.constants.scaled(scales))

    def _solve(self) -> list[float]:
        """Ridge regression for a common scale and each term's difference from it."""
        size = NUM_TERMS + 1
        products = self._products
        full = [
            [products[max(i, j)][min(i, j)] for j in range(NUM_TERMS)] for i in range(NUM_TERMS)
        ]
        row_sums = [sum(row) for row in full]
        matrix = [
            [sum(row_sums), *row_sums],
            *([s, *row] for s, row in zip(row_sums, full, strict=True)),
        ]
        matrix[0][0] += COMMON_PRIOR
        for i in range(1, size):
            matrix[i][i] += OWN_PRIOR
        vector = [sum(self._sums) + COMMON_PRIOR, *self._sums]
        common, *differences = solve_linear(matrix, vector)
        return [
            min(MAX_SCALE, max(1.0 / MAX_SCALE, common + difference)) for difference in differences
        ]
