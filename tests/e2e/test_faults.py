"""Something dies while requests run: nobody fails, nobody gets a wrong token, nothing is leaked.

The same drills as ``bench/faults.py``, with fewer requests and two of them in each suite.
"""

from pathlib import Path

import pytest

from bench.faults import DRILLS, drill_on, run_drill
from bench.postgres import PostgresMissing
from bench.reference import Expected
from bench.suite import running_suite
from tests.e2e.conftest import MAX_TOKENS

pytestmark = pytest.mark.timeout(240)

NUM_REQUESTS = 40
DATABASE_DRILL = "database down 20 s"
SUITES: dict[tuple[str, ...], tuple[str, str]] = {
    ("--decode", "2"): ("decode killed, 1P+2D", "decode frozen 10 s, 1P+2D"),
    ("--prefill", "2"): ("only decode killed, 2P+1D", "prefill killed, 2P+1D"),
    ("--scheduler", "2"): ("scheduler killed, standby", "nats restarted"),
}


@pytest.mark.parametrize("arguments", SUITES, ids=lambda words: "".join(words))
def test_a_fault_costs_a_pause_and_nothing_else(
    arguments: tuple[str, ...], expected: list[Expected], model_dir: Path
) -> None:
    with running_suite("--dtype", "fp32", *arguments) as suite:
        num_processes = len(suite.processes())
        for drill in SUITES[arguments]:
            outcome = drill_on(
                suite,
                drill,
                expected,
                num_requests=NUM_REQUESTS,
                max_tokens=MAX_TOKENS,
                model_dir=model_dir,
            )
            assert outcome.errors == ()
            assert outcome.num_failed == 0
            assert outcome.verdicts.get("different", 0) == 0, outcome
            assert outcome.is_good, outcome
            suite.wait_until(
                lambda: len(suite.processes()) == len(suite.status()["instances"]) == num_processes,
                "the return of what was killed",
                60,
            )


@pytest.mark.slow
def test_no_request_notices_that_the_database_is_gone(
    expected: list[Expected], model_dir: Path
) -> None:
    try:
        outcome = run_drill(
            DATABASE_DRILL,
            expected,
            num_requests=NUM_REQUESTS,
            max_tokens=MAX_TOKENS,
            model_dir=model_dir,
        )
    except PostgresMissing as error:
        pytest.skip(str(error))
    assert outcome.errors == ()
    assert (outcome.num_logged, outcome.num_log_lost) == (NUM_REQUESTS, 0)
    assert outcome.is_good, outcome


def test_every_drill_is_run() -> None:
    run = {name for names in SUITES.values() for name in names} | {DATABASE_DRILL}
    assert run == {name for name in DRILLS if not name.startswith("no fault")}
