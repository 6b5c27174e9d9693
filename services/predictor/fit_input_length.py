"""Fits ``input_length.json``: a regression of output length on input length, and its spread.

Usage::

    python -m services.predictor.fit_input_length alpaca_data.jsonl.gz [--model DIR] [--output FILE]

The data are lines of JSON with ``instruction``, ``input`` and ``output`` (Stanford Alpaca). A
prompt is tokenised as the gateway would, through the model's chat template; an output's length is
that of the data set's own text with its end-of-sequence token. That is a **stand-in**: the lengths
that count are those the served model itself produces, and the predictor is to be fitted on the log
of completed requests. Of the data only the coefficients and the report below are kept.

Every tenth row is held out, and the report is about those: the accuracy of the most probable
bucket, exact and within one bucket; the mean absolute error of the median; the expected
calibration error over ten bins of confidence; and, to compare with, the accuracy of always
answering the bucket that is commonest in the rows fitted on.

Needs ``tokenizers`` and ``jinja2``, which the service itself does not.
"""

import argparse
import gzip
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from services.predictor.config import INPUT_LENGTH_FILE
from services.predictor.distribution import bucket_of
from services.predictor.predictors import InputLengthModel, InputLengthPredictor
from shared.config import BUNDLED_MODEL

HOLD_OUT_EVERY = 10
_MAX_TOKENS = 1 << 30
_CALIBRATION_BINS = 10
_NUM_QUANTILES = 40
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Lengths:
    """One request: prompt tokens, and output tokens with the end-of-sequence token."""

    input_len: int
    output_len: int


def read_lengths(data: Path, model: Path) -> Iterator[Lengths]:
    """The lengths of all rows of ``data`` in the tokens of ``model``."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((model / "chat_template.jinja").read_text())
    prompts: list[str] = []
    outputs: list[str] = []
    opener = gzip.open if data.suffix == ".gz" else open
    with opener(data, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            content = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            prompts.append(
                template.render(
                    messages=[{"role": "user", "content": content}], add_generation_prompt=True
                )
            )
            outputs.append(row["output"])
    for start in range(0, len(prompts), _BATCH_ROWS):
        rows = slice(start, start + _BATCH_ROWS)
        inputs = tokenizer.encode_batch_fast(prompts[rows], add_special_tokens=False)
        answers = tokenizer.encode_batch_fast(outputs[rows], add_special_tokens=False)
        for prompt, answer in zip(inputs, answers, strict=True):
            yield Lengths(len(prompt), len(answer) + 1)


def fit(rows: Sequence[Lengths], fitted_on: str) -> InputLengthModel:
    """Least squares in the logarithms of both lengths.

    It is trusted from the 1st to the 99th percentile of the input lengths.
    """
    percentiles = statistics.quantiles((row.input_len for row in rows), n=100, method="inclusive")
    x = [log(max(1, row.input_len)) for row in rows]
    y = [log(row.output_len) for row in rows]
    line = statistics.linear_regression(x, y)
    residuals = [b - (line.intercept + line.slope * a) for a, b in zip(x, y, strict=True)]
    inner = statistics.quantiles(residuals, n=_NUM_QUANTILES, method="inclusive")
    return InputLengthModel(
        intercept=round(line.intercept, 6),
        slope=round(line.slope, 6),
        min_input_len=max(1, round(percentiles[0])),
        max_input_len=max(1, round(percentiles[-1])),
        residual_quantiles=tuple(round(r, 4) for r in (min(residuals), *inner, max(residuals))),
        fitted_on=fitted_on,
    )


def evaluate(
    model: InputLengthModel, rows: Sequence[Lengths], commonest_bucket: int
) -> dict[str, float]:
    """How well ``model`` does on ``rows`` that it has not seen."""
    predictor = InputLengthPredictor(model)
    num_right = num_near = num_commonest = 0
    errors: list[int] = []
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(_CALIBRATION_BINS)]
    for row in rows:
        found = predictor.distribution(row.input_len)
        confidence = max(found.probabilities)
        guess, truth = found.probabilities.index(confidence), bucket_of(row.output_len)
        num_right += guess == truth
        num_near += abs(guess - truth) <= 1
        num_commonest += truth == commonest_bucket
        errors.append(abs(found.quantile_tokens(0.5, _MAX_TOKENS) - row.output_len))
        place = min(_CALIBRATION_BINS - 1, int(confidence * _CALIBRATION_BINS))
        bins[place].append((confidence, guess == truth))
    gaps = [abs(sum(c for c, _ in one) - sum(right for _, right in one)) for one in bins]
    report = {
        "bucket_accuracy": num_right / len(rows),
        "within_one_bucket": num_near / len(rows),
        "mae_tokens": statistics.fmean(errors),
        "expected_calibration_error": sum(gaps) / len(rows),
        "commonest_bucket_accuracy": num_commonest / len(rows),
    }
    return {name: round(value, 4) for name, value in report.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, report and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fit the input_length predictor.")
    parser.add_argument("data", type=Path, help="alpaca_data.jsonl or .jsonl.gz")
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="whose tokens count")
    parser.add_argument("--output", type=Path, default=INPUT_LENGTH_FILE)
    options = parser.parse_args(arguments)
    rows = list(read_lengths(options.data, options.model))
    held_out = rows[::HOLD_OUT_EVERY]
    fitted = [row for index, row in enumerate(rows) if index % HOLD_OUT_EVERY]
    model = fit(fitted, f"{options.data.name.partition('.')[0]}-{options.model.name}")
    commonest = Counter(bucket_of(row.output_len) for row in fitted).most_common(1)[0][0]
    result = asdict(model) | {
        "num_rows": len(fitted),
        "num_held_out": len(held_out),
        "held_out": evaluate(model, held_out, commonest),
    }
    text = json.dumps(result, indent=1) + "\n"
    options.output.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
