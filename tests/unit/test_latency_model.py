"""The latency model and its fit, on machines whose constants are known."""

import json
from dataclasses import asdict, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core.latency_fit import LatencyPoint, fit, fit_constants, mape
from shared.core.latency_model import (
    AttentionWindow,
    LatencyConstants,
    LatencyModel,
    ModelFacts,
    rough_constants,
    windows_of,
)
from shared.core.step_work import StepWork

FACTS = ModelFacts(
    num_layers=12,
    layer_param_bytes=226_000_000,
    head_param_bytes=49_000_000,
    layer_flops_per_token=226e6,
    head_flops_per_token=49e6,
    attention_flops_per_pair=4 * 768 * 12,
    kv_bytes_per_token=36_864,
)
CONSTANTS = LatencyConstants(
    base_s=0.012,
    rows=((1, 0.0), (4, 0.002), (16, 0.003), (64, 0.012), (256, 0.06), (2048, 0.5)),
    chunk_s=3e-4,
    decode_request_s=1e-4,
    causal_s_per_flop=4e-12,
    prefix_s_per_flop=2e-12,
    prefix_kv_s_per_byte=2e-10,
    decode_kv_s_per_byte=5e-11,
)
MODEL = LatencyModel(facts=FACTS, constants=CONSTANTS, max_num_batched_tokens=2048)
CONSTANTS_DATA = asdict(CONSTANTS)

lengths = st.integers(1, 4096)
batches = st.integers(1, 128)


def grid() -> list[StepWork]:
    random = Random(1)
    works = []
    for length in (16, 24, 32, 48, 64, 96, 128, 200, 256, 384, 512, 768, 1024, 1500, 2048):
        works += [StepWork.prefill(start, start + length) for start in (0, 500, 2000)]
        works.append(
            StepWork(chunks=tuple((0, length // 4) for _ in range(4)), num_sampled_chunks=4)
        )
    for batch in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        works += [StepWork.decode(batch, batch * random.randrange(50, 3000)) for _ in range(4)]
    works += [StepWork.decode(8, 4000) + StepWork.prefill(0, length) for length in (30, 100, 600)]
    return works


def points(model: LatencyModel, noise: float = 0.0, seed: int = 0) -> list[LatencyPoint]:
    random = Random(seed)
    return [
        LatencyPoint(work=work, step_s=model.step_s(work) * random.uniform(1 - noise, 1 + noise))
        for work in grid()
    ]


# The formula


def test_a_decode_step_by_hand() -> None:
    # 10 rows lie half between the knots 4 and 16; all of them are sampled from.
    expected = 0.012 + 0.0025 + 10 * 1e-4 + 7000 * 36_864 * 5e-11
    assert MODEL.decode_step_s(10, 7000) == pytest.approx(expected)


def test_a_prefill_by_hand() -> None:
    # 40 rows in the layers, one in the head: it adds nothing to what reading it takes.
    layers = 226 / 275
    rows_s = layers * (0.003 + 0.009 / 2)
    causal, prefix = 40 * 41 / 2, 40 * 100
    expected = 0.012 + rows_s + 3e-4
    expected += (causal * 4e-12 + prefix * 2e-12) * 4 * 768 * 12 + 100 * 36_864 * 2e-10
    assert MODEL.prefill_s(140, 100) == pytest.approx(expected)


def test_beyond_the_last_knot_the_curve_goes_on() -> None:
    slope = (0.5 - 0.06) / (2048 - 256)
    assert CONSTANTS.rows_s(4096) == pytest.approx(0.5 + 2048 * slope)


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    first = MODEL.step_s(StepWork.prefill(100, 2148, is_sampling=False))
    second = MODEL.step_s(StepWork.prefill(2148, 3000))
    assert MODEL.prefill_s(3000, 100) == pytest.approx(first + second)


def test_nothing_takes_no_time() -> None:
    assert MODEL.step_s(StepWork()) == 0.0
    assert MODEL.prefill_s(50, 50) == 0.0


@pytest.mark.parametrize("cached", [-1, 11])
def test_more_cached_than_there_is_is_refused(cached: int) -> None:
    with pytest.raises(ValueError, match="of 10 tokens"):
        MODEL.prefill_s(10, cached)


def test_a_window_limits_what_is_looked_at() -> None:
    windows = windows_of([None, 100, 100, 100])
    assert windows == (
        AttentionWindow(num_tokens=None, share=0.25),
        AttentionWindow(num_tokens=100, share=0.75),
    )
    facts = replace(FACTS, windows=windows)
    features = facts.features(StepWork.prefill(200, 300) + StepWork.decode(2, 3000))
    whole = FACTS.features(StepWork.prefill(200, 300) + StepWork.decode(2, 3000))
    # Alone the chunk fits the window; each of its tokens looks at 100, not at 201 … 300.
    assert features.causal_flops == pytest.approx(whole.causal_flops)
    seen = 0.25 * 100 * 200 + 0.75 * (100 * 100 - 100 * 101 / 2)
    assert features.prefix_flops == pytest.approx(seen * FACTS.attention_flops_per_pair)
    assert features.decode_kv_bytes == pytest.approx((0.25 * 3000 + 0.75 * 200) * 36_864)


@given(num_tokens=lengths, more=st.integers(0, 500), cached=st.integers(0, 4096))
def test_more_tokens_never_take_less_and_cached_ones_never_more(
    num_tokens: int, more: int, cached: int
) -> None:
    cached = min(cached, num_tokens)
    time_s = MODEL.prefill_s(num_tokens, cached)
    assert MODEL.prefill_s(num_tokens + more, cached) >= time_s
    assert MODEL.prefill_s(num_tokens) >= time_s
    assert MODEL.prefill_s(num_tokens, min(num_tokens, cached + more)) <= time_s + 1e-12


@given(batch=batches, more=batches, context=lengths, longer=lengths)
def test_a_larger_batch_and_longer_contexts_never_take_less(
    batch: int, more: int, context: int, longer: int
) -> None:
    step_s = MODEL.decode_step_s(batch, batch * context)
    assert MODEL.decode_step_s(batch, batch * context + longer) >= step_s
    assert MODEL.decode_step_s(batch + more, (batch + more) * context) >= step_s


@given(batch=batches, context=lengths, start=lengths, length=st.integers(1, 2048))
def test_a_mixed_step_takes_longer_than_either_part_and_less_than_both(
    batch: int, context: int, start: int, length: int
) -> None:
    decode = StepWork.decode(batch, batch * context)
    prefill = StepWork.prefill(start, start + length)
    both_s = MODEL.step_s(decode + prefill)
    apart_s = MODEL.step_s(decode), MODEL.step_s(prefill)
    assert both_s >= max(apart_s)
    # The base is paid once; a curve that bends upwards may take some of that back.
    assert both_s <= sum(apart_s) + CONSTANTS.rows_s(batch + length)


# The fit


def test_known_constants_are_recovered() -> None:
    fitted = fit_constants(points(MODEL), FACTS)
    assert mape(MODEL.with_constants(fitted), points(MODEL)) < 1e-3
    assert fitted.base_s == pytest.approx(CONSTANTS.base_s, rel=0.02)
    assert fitted.decode_kv_s_per_byte == pytest.approx(CONSTANTS.decode_kv_s_per_byte, rel=0.02)
    assert fitted.causal_s_per_flop == pytest.approx(CONSTANTS.causal_s_per_flop, rel=0.1)
    assert fitted.chunk_s == pytest.approx(CONSTANTS.chunk_s, rel=0.1)


def test_noise_is_averaged_out() -> None:
    fitted = fit(points(MODEL, noise=0.1), FACTS, max_num_batched_tokens=2048)
    assert mape(fitted, points(MODEL)) < 0.03
    assert fitted.decode_step_s(5, 2000) == pytest.approx(MODEL.decode_step_s(5, 2000), rel=0.05)
    assert fitted.prefill_s(700, 300) == pytest.approx(MODEL.prefill_s(700, 300), rel=0.05)


def test_a_few_disturbed_points_move_nothing() -> None:
    disturbed = [
        LatencyPoint(work=point.work, step_s=point.step_s * (4.0 if index % 12 == 5 else 1.0))
        for index, point in enumerate(points(MODEL))
    ]
    fitted = fit(disturbed, FACTS, max_num_batched_tokens=2048)
    assert mape(fitted, points(MODEL)) < 0.03


def test_other_sizes_than_those_measured_are_predicted() -> None:
    random = Random(7)
    fitted = fit(points(MODEL, noise=0.02), FACTS, max_num_batched_tokens=2048)
    others = [StepWork.decode(b, b * random.randrange(60, 2500)) for b in (5, 7, 11, 30, 57)]
    others += [StepWork.prefill(random.randrange(1500), 1500 + n) for n in (10, 90, 300, 500)]
    held_out = [LatencyPoint(work=work, step_s=MODEL.step_s(work)) for work in others]
    assert mape(fitted, held_out) < 0.03


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), noise=st.floats(0.0, 0.5))
def test_whatever_was_measured_more_work_never_takes_less(seed: int, noise: float) -> None:
    fitted = fit(points(MODEL, noise, seed)[:: seed % 3 + 1], FACTS, max_num_batched_tokens=512)
    steps = [fitted.decode_step_s(batch, batch * 500) for batch in range(1, 130)]
    prefills = [fitted.prefill_s(length) for length in range(1, 2500, 37)]
    assert steps == sorted(steps)
    assert prefills == sorted(prefills)


def test_one_point_is_enough_to_predict_it() -> None:
    work = StepWork.decode(4, 800)
    fitted = fit([LatencyPoint(work=work, step_s=0.02)], FACTS, max_num_batched_tokens=64)
    assert fitted.step_s(work) == pytest.approx(0.02)


def test_no_points_and_no_times_are_refused() -> None:
    with pytest.raises(ValueError, match="no points"):
        fit([], FACTS, max_num_batched_tokens=64)
    with pytest.raises(ValueError, match=r"0\.0 s"):
        fit_constants([LatencyPoint(work=StepWork.decode(1, 1), step_s=0.0)], FACTS)
    with pytest.raises(ValueError, match="no points"):
        mape(MODEL, [])


def test_rates_follow_from_the_constants() -> None:
    assert MODEL.bytes_per_s == pytest.approx(275e6 / 0.012)
    assert MODEL.flops_per_s == pytest.approx(2048 * 275e6 / 0.512)
    for device in ("cpu", "cuda:1"):
        guess = MODEL.with_constants(rough_constants(FACTS, device))
        assert guess.prefill_s(2000) > guess.prefill_s(100) > 0.0


# As JSON


def test_json_gives_the_same_model_back() -> None:
    model = replace(
        MODEL,
        facts=replace(FACTS, windows=windows_of([None, 128])),
        hardware="a machine",
        num_threads=2,
        dtype="bf16",
    )
    text = json.dumps(model.to_dict())
    assert LatencyModel.from_dict(json.loads(text)) == model
    assert LatencyModel.from_dict(json.loads(text) | {"of_tomorrow": 1}) == model


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"facts": None}, "ModelFacts"),
        ({"constants": {}}, "without base_s"),
        ({"constants": CONSTANTS_DATA | {"base_s": -1.0}}, "base_s is -1.0"),
        ({"constants": CONSTANTS_DATA | {"chunk_s": "fast"}}, "chunk_s is 'fast'"),
        ({"constants": CONSTANTS_DATA | {"rows": [[1, 0.0], [8, 0.2], [16, 0.1]]}}, "rise"),
        ({"constants": CONSTANTS_DATA | {"rows": "none"}}, "constants.rows"),
    ],
)
def test_what_is_no_model_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LatencyModel.from_dict(MODEL.to_dict() | changes)
