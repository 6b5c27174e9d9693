"""Predictors of output length. Pure: what they know comes in with the question."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Protocol

from services.predictor.distribution import BUCKET_EDGES_TOKENS, LengthDistribution


@dataclass(frozen=True, slots=True)
class LengthQuestion:
    """One request whose output length is asked for."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int


class LengthPredictor(Protocol):
    """Says how long outputs would get if ``max_tokens`` did not cut them off.

    ``predict`` gives one distribution a question, in order. It may take its time (it is called
    off the event loop, one batch at a time) and may raise: then nothing is predicted.
    """

    @property
    def name(self) -> str:
        """What answers are signed with: the kind, and the version of what was learnt."""
        ...

    def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
        """One distribution for each question, in order."""
        ...


class ConstantPredictor:
    """Takes every output to be as long as it may be: what a system without a predictor does."""

    name = "constant"

    def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
        """The same answer for everything: it ends at ``max_tokens``."""
        return [LengthDistribution.endless() for _ in questions]


@dataclass(frozen=True, slots=True)
class InputLengthModel:
    """``ln(output_len) = intercept + slope · ln(input_len) + residual``.

    Both lengths in tokens, at least 1; an input length outside ``[min_input_len, max_input_len]``
    counts as the nearer end, because the line says nothing out there. ``residual_quantiles`` are
    the residual's at 0, 1/n, …, 1: kept as they are because lengths have more than one mode (a
    word, or a paragraph), which a normal spread would smear into the middle. ``fitted_on`` says
    what data the numbers come from.
    """

    intercept: float
    slope: float
    min_input_len: int
    max_input_len: int
    residual_quantiles: tuple[float, ...]
    fitted_on: str

    def __post_init__(self) -> None:
        """Refuse ranges and quantiles that are none."""
        if not 1 <= self.min_input_len <= self.max_input_len:
            raise ValueError(f"input lengths [{self.min_input_len}, {self.max_input_len}]")
        values = self.residual_quantiles
        if len(values) < 2 or any(low > high for low, high in pairwise(values)):
            raise ValueError("residual_quantiles must be at least two numbers that do not fall")

    def mean_log_output(self, input_len: int) -> float:
        """Where the regression puts the logarithm of the output length."""
        nearest = min(max(input_len, self.min_input_len), self.max_input_len)
        return self.intercept + self.slope * log(nearest)

    def residual_cdf(self, residual: float) -> float:
        """The share of residuals up to ``residual``, straight between two quantiles."""
        values = self.residual_quantiles
        above = bisect_right(values, residual)
        if above == 0:
            return 0.0
        if above == len(values):
            return 1.0
        low, high = values[above - 1], values[above]
        return (above - 1 + (residual - low) / (high - low)) / (len(values) - 1)


class InputLengthPredictor:
    """A regression on the input length, with the spread around it that the data had."""

    def __init__(self, model: InputLengthModel) -> None:
        self._model = model

    @property
    def name(self) -> str:
        """The kind and the data it was fitted on."""
        return f"input_length/{self._model.fitted_on}"

    def predict(self, questions: Sequence[LengthQuestion]) -> list[LengthDistribution]:
        """Only the number of prompt tokens matters."""
        return [self.distribution(len(question.prompt_token_ids)) for question in questions]

    def distribution(self, input_len: int) -> LengthDistribution:
        """The output length behind ``input_len`` prompt tokens.

        A length is a whole number: it is at most ``edge`` where the regression's is below
        ``edge + 1/2``.
        """
        mean = self._model.mean_log_output(input_len)
        return LengthDistribution.from_cdf(
            [self._model.residual_cdf(log(edge + 0.5) - mean) for edge in BUCKET_EDGES_TOKENS]
        )
