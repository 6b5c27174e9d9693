"""Following a machine that becomes slower, faster, or is not known at all."""

from dataclasses import replace
from random import Random

import pytest

from shared.core.latency_model import LatencyConstants, LatencyModel, StepTerms, rough_constants
from shared.core.latency_online import OnlineFit
from shared.core.step_work import StepWork
from tests.unit.test_latency_model import CONSTANTS, FACTS, MODEL

ALIKE = StepTerms(2.0, 2.0, 2.0, 2.0, 2.0)


def steps(count: int, seed: int = 0) -> list[StepWork]:
    """What an instance with both roles sees."""
    random = Random(seed)
    works = []
    for _ in range(count):
        batch = random.randrange(1, 40)
        work = StepWork.decode(batch, batch * random.randrange(50, 2000))
        if random.random() < 0.3:
            start = random.choice((0, 0, 700))
            work += StepWork.prefill(start, start + random.randrange(10, 1500))
        works.append(work)
    return works


def follow(fit: OnlineFit, machine: LatencyModel, works: list[StepWork], seed: int = 0) -> None:
    random = Random(seed)
    for work in works:
        fit.observe(work, machine.step_s(work) * random.uniform(0.95, 1.05))


def test_without_steps_it_is_the_base() -> None:
    fit = OnlineFit(MODEL)
    assert fit.model() == MODEL
    assert fit.error is None


def test_a_machine_as_profiled_stays_as_it_is() -> None:
    fit = OnlineFit(MODEL)
    follow(fit, MODEL, steps(500))
    assert fit.model().decode_step_s(8, 4000) == pytest.approx(
        MODEL.decode_step_s(8, 4000), rel=0.02
    )
    assert fit.error is not None and fit.error < 0.05
    assert fit.num_steps == 500


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_a_change_of_speed_is_followed(factor: float) -> None:
    slower = MODEL.with_constants(CONSTANTS.scaled(StepTerms(*[factor] * 5)))
    fit = OnlineFit(MODEL)
    follow(fit, MODEL, steps(1000))
    follow(fit, slower, steps(1500, seed=1))
    for batch, context in ((1, 100), (16, 20_000)):
        assert fit.model().decode_step_s(batch, context) == pytest.approx(
            slower.decode_step_s(batch, context), rel=0.05
        )
    assert fit.model().prefill_s(1000) == pytest.approx(slower.prefill_s(1000), rel=0.05)


def test_what_has_changed_is_told_apart() -> None:
    # Somebody takes memory bandwidth: decode attention and the base suffer, arithmetic does not.
    changed = MODEL.with_constants(CONSTANTS.scaled(StepTerms(1.5, 1.0, 1.0, 1.0, 3.0)))
    fit = OnlineFit(MODEL)
    follow(fit, changed, steps(2000))
    assert fit.model().decode_step_s(1, 4000) == pytest.approx(
        changed.decode_step_s(1, 4000), rel=0.1
    )
    assert fit.model().prefill_s(1500) == pytest.approx(changed.prefill_s(1500), rel=0.1)


def test_steps_that_look_alike_scale_everything_alike() -> None:
    slower = MODEL.with_constants(CONSTANTS.scaled(ALIKE))
    fit = OnlineFit(MODEL)
    follow(fit, slower, [StepWork.decode(8, 4000)] * 800)
    assert fit.model().prefill_s(1000) == pytest.approx(slower.prefill_s(1000), rel=0.1)


def test_a_guess_becomes_a_model() -> None:
    fit = OnlineFit(MODEL.with_constants(rough_constants(FACTS, "cpu")))
    follow(fit, MODEL, steps(2000))
    errors = [
        abs(fit.model().step_s(work) / MODEL.step_s(work) - 1.0) for work in steps(200, seed=9)
    ]
    assert sum(errors) / len(errors) < 0.15


def test_a_few_steps_that_hung_change_little() -> None:
    fit = OnlineFit(MODEL)
    for index, work in enumerate(steps(1000)):
        fit.observe(work, MODEL.step_s(work) * (30.0 if index % 50 == 7 else 1.0))
    assert fit.model().decode_step_s(8, 4000) == pytest.approx(
        MODEL.decode_step_s(8, 4000), rel=0.03
    )


@pytest.mark.parametrize("step_s", [0.0, -1.0, float("nan"), float("inf")])
def test_what_cannot_be_a_time_is_passed_over(step_s: float) -> None:
    fit = OnlineFit(MODEL)
    fit.observe(StepWork.decode(1, 10), step_s)
    fit.observe(StepWork(), 0.1)
    assert fit.num_steps == 0
    assert fit.model() == MODEL


def test_a_base_with_free_terms_stays_finite() -> None:
    free = LatencyConstants(
        base_s=0.01,
        rows=((1, 0.0),),
        chunk_s=0.0,
        decode_request_s=0.0,
        causal_s_per_flop=0.0,
        prefix_s_per_flop=0.0,
        prefix_kv_s_per_byte=0.0,
        decode_kv_s_per_byte=0.0,
    )
    fit = OnlineFit(replace(MODEL, constants=free))
    follow(fit, MODEL, steps(300))
    assert 0.0 < fit.model().decode_step_s(4, 1000) < 1.0
