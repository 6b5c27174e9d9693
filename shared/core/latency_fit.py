"""Fitting a latency model to measured steps.

The model is a sum of known quantities times constants that are not negative: non-negative least
squares, solved by the active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974,
chapter 23) on the normal equations. Errors are relative to the measured times, and reweighted a few
times so that their absolute values are minimised rather than their squares (iteratively reweighted
least squares): what is minimised is close to the MAPE that is reported, and a disturbed
measurement moves little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from statistics import median

from shared.core.latency_model import LatencyConstants, LatencyModel, ModelFacts, StepFeatures
from shared.core.step_work import StepWork

NUM_ROUNDS = 15
LEAST_RESIDUAL = 0.005
"""Residuals are weighted as if at least this large, or perfect points would outweigh all others."""
POINTS_PER_KNOT = 4
RIDGE = 1e-9
"""Against terms that the points cannot tell apart: they share what they explain together."""

Matrix = list[list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyPoint:
    """A measured step: what it computed and how long it took."""

    work: StepWork
    step_s: float


def fit(
    points: Sequence[LatencyPoint],
    facts: ModelFacts,
    *,
    max_num_batched_tokens: int,
    hardware: str = "",
    device: str = "",
    num_threads: int = 0,
    dtype: str = "",
    fingerprint: str = "",
) -> LatencyModel:
    """The model with the smallest mean relative error on ``points``; the rest describes it.

    Deterministic. Raises ``ValueError`` without points, or if one's time is not above 0.
    """
    return LatencyModel(
        facts=facts,
        constants=fit_constants(points, facts),
        max_num_batched_tokens=max_num_batched_tokens,
        hardware=hardware,
        device=device,
        num_threads=num_threads,
        dtype=dtype,
        fingerprint=fingerprint,
    )


def fit_constants(points: Sequence[LatencyPoint], facts: ModelFacts) -> LatencyConstants:
    """The constants of ``fit``."""
    if not points:
        raise ValueError("no points to fit")
    for point in points:
        if not (math.isfinite(point.step_s) and point.step_s > 0.0):
            raise ValueError(f"a step of {point.step_s} s cannot be fitted")
    features = [facts.features(point.work) for point in points]
    knots = _knots(features)
    # Each row is what the point would have taken per unit of each constant, over what it took.
    shares = [
        [value / point.step_s for value in _quantities(each, knots)]
        for each, point in zip(features, points, strict=True)
    ]
    # Columns of equal length: quantities differ by twenty orders of magnitude.
    lengths = [math.hypot(*column) or 1.0 for column in zip(*shares, strict=True)]
    shares = [[x / length for x, length in zip(row, lengths, strict=True)] for row in shares]
    solution = [0.0] * len(lengths)
    weights = [1.0] * len(shares)
    for _ in range(NUM_ROUNDS):
        solution = _non_negative_least_squares(shares, weights)
        residuals = [
            abs(sum(x * s for x, s in zip(row, solution, strict=True)) - 1.0) for row in shares
        ]
        least = max(LEAST_RESIDUAL, 0.5 * median(residuals))
        weights = [1.0 / max(least, residual) for residual in residuals]
    return _constants([s / length for s, length in zip(solution, lengths, strict=True)], knots)


def mape(model: LatencyModel, points: Sequence[LatencyPoint]) -> float:
    """Mean absolute relative error of the predictions for ``points`` (0.05 is 5 %).

    Raises ``ValueError`` without points.
    """
    if not points:
        raise ValueError("no points to compare with")
    errors = [abs(model.step_s(point.work) / point.step_s - 1.0) for point in points]
    return sum(errors) / len(errors)


def _knots(features: Sequence[StepFeatures]) -> list[int]:
    """1, and those powers of two that have enough points below them, up to the largest step."""
    counts = sorted(each.num_rows for each in features)
    knots = [1]
    candidate = 2
    while candidate < counts[-1]:
        if sum(knots[-1] < count <= candidate for count in counts) >= POINTS_PER_KNOT:
            knots.append(candidate)
        candidate *= 2
    # The last stretch goes on beyond the largest step: it must not rest on a point or two.
    if len(knots) > 1 and sum(count > knots[-1] for count in counts) < POINTS_PER_KNOT:
        knots.pop()
    if counts[-1] > 1:
        knots.append(counts[-1])
    return knots


def _quantities(features: StepFeatures, knots: Sequence[int]) -> list[float]:
    """What the constants are multiplied by, in the order of ``_constants``."""
    share = features.head_share
    layers, head = _ramps(features.num_rows, knots), _ramps(features.num_sampled, knots)
    return [
        1.0,
        float(features.num_chunks),
        float(features.num_decode),
        features.causal_flops,
        features.prefix_flops,
        features.prefix_kv_bytes,
        features.decode_kv_bytes,
        *((1.0 - share) * a + share * b for a, b in zip(layers, head, strict=True)),
    ]


def _constants(solution: Sequence[float], knots: Sequence[int]) -> LatencyConstants:
    base_s, chunk_s, request_s, causal, prefix, prefix_kv, decode_kv, *increments = solution
    rows = [(1, 0.0)]
    for knot, increment_s in zip(knots[1:], increments, strict=True):
        rows.append((knot, rows[-1][1] + increment_s))
    return LatencyConstants(
        base_s=base_s,
        rows=tuple(rows),
        chunk_s=chunk_s,
        decode_request_s=request_s,
        causal_s_per_flop=causal,
        prefix_s_per_flop=prefix,
        prefix_kv_s_per_byte=prefix_kv,
        decode_kv_s_per_byte=decode_kv,
    )


def _ramps(num_rows: int, knots: Sequence[int]) -> list[float]:
    """How much of each stretch between two knots lies below ``num_rows``, 0 … 1 (the last: on)."""
    ramps = [min(1.0, max(0.0, (num_rows - low) / (high - low))) for low, high in pairwise(knots)]
    if ramps and num_rows > knots[-1]:
        ramps[-1] = (num_rows - knots[-2]) / (knots[-1] - knots[-2])
    return ramps


def _non_negative_least_squares(
    rows: Sequence[Sequence[float]], weights: Sequence[float]
) -> list[float]:
    """The ``x`` ≥ 0 with the least weighted sum of squares of ``rows · x - 1``."""
    size = len(rows[0])
    weighted = [[w * x for x in row] for row, w in zip(rows, weights, strict=True)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    weighted_columns = [list(column) for column in zip(*weighted, strict=True)]
    total = sum(weights)
    gram = [
        [sum(map(mul, a, b)) + (RIDGE * total if i == j else 0.0) for j, b in enumerate(columns)]
        for i, a in enumerate(weighted_columns)
    ]
    target = [sum(column) for column in weighted_columns]
    enough = 1e-10 * max(abs(value) for value in target)
    solution = [0.0] * size
    free: list[int] = []
    for _ in range(10 * size):
        slopes = {
            i: target[i] - sum(gram[i][j] * solution[j] for j in free)
            for i in range(size)
            if i not in free
        }
        steepest = max(slopes, key=slopes.__getitem__, default=None)
        if steepest is None or slopes[steepest] <= enough:
            break
        free.append(steepest)
        solution, free = _descend(gram, target, solution, free)
    return solution


def _descend(
    gram: Matrix, target: Sequence[float], solution: list[float], free: list[int]
) -> tuple[list[float], list[int]]:
    """Solve for the ``free`` constants; those that would become negative end at 0."""
    while free:
        values = solve_linear([[gram[i][j] for j in free] for i in free], [target[i] for i in free])
        negative = [(i, v) for i, v in zip(free, values, strict=True) if v <= 0.0]
        if not negative:
            solution = [0.0] * len(solution)
            for i, value in zip(free, values, strict=True):
                solution[i] = value
            return solution, free
        # As far towards the new values as all of them allow; whoever stops it is no longer free.
        fraction = min(solution[i] / (solution[i] - value) for i, value in negative)
        moved = {
            i: solution[i] + fraction * (value - solution[i])
            for i, value in zip(free, values, strict=True)
        }
        blocked = {i for i, _ in negative if moved[i] <= 1e-12}
        free = [i for i in free if i not in blocked]
        solution = [moved[i] if i in free else 0.0 for i in range(len(solution))]
    return solution, free


def solve_linear(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """``x`` of ``matrix · x = vector`` for a symmetric positive definite matrix (by Cholesky).

    Raises ``ValueError`` if it is none.
    """
    size = len(vector)
    lower: Matrix = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            if i > j:
                lower[i][j] = rest / lower[j][j]
            elif rest > 0.0:
                lower[i][i] = math.sqrt(rest)
            else:
                raise ValueError("the matrix is not positive definite")
    forward: list[float] = []
    for i in range(size):
        rest = vector[i] - sum(lower[i][k] * forward[k] for k in range(i))
        forward.append(rest / lower[i][i])
    solution = [0.0] * size
    for i in reversed(range(size)):
        rest = forward[i] - sum(lower[k][i] * solution[k] for k in range(i + 1, size))
        solution[i] = rest / lower[i][i]
    return solution
