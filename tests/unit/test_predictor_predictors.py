import json
from math import exp, log
from pathlib import Path

import pytest

from services.predictor.config import PredictorSettings
from services.predictor.fit_input_length import Lengths, evaluate, fit, main
from services.predictor.loading import load_predictor
from services.predictor.predictors import (
    ConstantPredictor,
    InputLengthModel,
    InputLengthPredictor,
    LengthQuestion,
)
from shared.errors import ConfigError


def question(input_len: int, max_tokens: int = 100) -> LengthQuestion:
    return LengthQuestion(tuple(range(input_len)), max_tokens)


def doubling(**changes: object) -> InputLengthModel:
    """Output twice as long as the input, spread evenly (in the logarithm) by a factor of 2."""
    values: dict[str, object] = {
        "intercept": log(2),
        "slope": 1.0,
        "min_input_len": 4,
        "max_input_len": 512,
        "residual_quantiles": (-log(2), 0.0, log(2)),
        "fitted_on": "hand",
    }
    return InputLengthModel(**(values | changes))  # type: ignore[arg-type]


def test_the_constant_is_max_tokens() -> None:
    predictor = ConstantPredictor()
    first, second = predictor.predict([question(3), question(5)])
    assert first.quantile_tokens(0.5, 100) == first.quantile_tokens(0.9, 100) == 100
    assert first == second


def test_input_length_follows_the_line_and_its_spread() -> None:
    found = InputLengthPredictor(doubling()).predict([question(32)])[0]
    # Output around 64 within [32, 128]: half of it in (32, 64], half in (64, 128].
    assert found.probabilities == pytest.approx((0, 0, 0.01, 0.5, 0.49, 0, 0, 0, 0, 0), abs=0.02)
    assert found.quantile_tokens(0.5, 4096) == pytest.approx(64, abs=2)
    assert found.quantile_tokens(0.9, 4096) == pytest.approx(64 * 2**0.8, abs=3)


def test_longer_prompts_of_a_rising_line_have_longer_outputs() -> None:
    predictor = InputLengthPredictor(doubling())
    found = predictor.predict([question(n) for n in (8, 32, 128)])
    medians = [one.quantile_tokens(0.5, 4096) for one in found]
    assert medians == sorted(set(medians))


@pytest.mark.parametrize(("outside", "nearest"), [(0, 4), (3, 4), (513, 512), (8000, 512)])
def test_outside_of_what_was_fitted_the_line_is_not_followed(outside: int, nearest: int) -> None:
    predictor = InputLengthPredictor(doubling())
    assert predictor.distribution(outside) == predictor.distribution(nearest)


def test_the_spread_is_straight_between_quantiles() -> None:
    model = doubling(residual_quantiles=(-2.0, 0.0, 0.0, 1.0))
    found = [model.residual_cdf(x) for x in (-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 9.0)]
    assert found == pytest.approx([0.0, 0.0, 1 / 6, 2 / 3, 5 / 6, 1.0, 1.0])


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_quantiles": (1.0,)},
        {"residual_quantiles": (1.0, 0.0)},
        {"min_input_len": 0},
        {"min_input_len": 600},
    ],
)
def test_a_model_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"quantiles|lengths"):
        doubling(**changes)


def test_the_shipped_coefficients_load_and_predict() -> None:
    predictor = load_predictor(PredictorSettings.load())
    assert predictor.name.startswith("input_length/")
    for found in predictor.predict([question(n) for n in (1, 30, 5000)]):
        p50, p90 = found.quantile_tokens(0.5, 4096), found.quantile_tokens(0.9, 4096)
        assert 1 < p50 < p90 < 4096


def test_the_kind_is_a_setting() -> None:
    assert load_predictor(PredictorSettings.load(kind="constant")).name == "constant"
    with pytest.raises(ConfigError, match="kind='oracle'"):
        PredictorSettings.load(kind="oracle")


@pytest.mark.parametrize("content", [None, "nonsense", '{"intercept": 1}', '{"slope": "x"}'])
def test_coefficients_that_cannot_be_read_are_a_wrong_setting(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "coefficients.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"BANYAN_PREDICTOR_INPUT_LENGTH_FILE=.*coefficients"):
        load_predictor(PredictorSettings.load(input_length_file=path))


def test_a_fit_finds_the_line_behind_its_data() -> None:
    factors = [0.5, 0.8, 1.0, 1.25, 2.0]
    rows = [
        Lengths(n, round(exp(1 + 0.5 * log(n)) * 50 * f)) for n in range(10, 110) for f in factors
    ]
    model = fit(rows, "made up")
    assert model.slope == pytest.approx(0.5, abs=0.02)
    assert model.intercept == pytest.approx(1 + log(50), abs=0.1)
    assert model.residual_quantiles[0] == pytest.approx(log(0.5), abs=0.02)
    assert model.residual_quantiles[-1] == pytest.approx(log(2.0), abs=0.02)
    assert (model.min_input_len, model.max_input_len) == (11, 108)
    report = evaluate(model, rows, commonest_bucket=0)
    assert report["bucket_accuracy"] > report["commonest_bucket_accuracy"] == 0.0
    assert report["within_one_bucket"] >= report["bucket_accuracy"]


def test_the_script_writes_what_the_service_reads(tmp_path: Path) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "fitted.json"
    rows = [
        {"instruction": "Say it " * n, "input": "", "output": "It is said. " * (n % 7 + 1)}
        for n in range(1, 60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(data), "--output", str(output)]) == 0
    predictor = load_predictor(PredictorSettings.load(input_length_file=output))
    assert predictor.name == "input_length/pairs-tiny-chat"
    assert json.loads(output.read_text())["num_held_out"] == 6
