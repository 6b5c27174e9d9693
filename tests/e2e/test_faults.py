"""Something dies while requests run: nobody fails, nobody gets a wrong token, nothing is leaked.

The same drills as ``bench/faults.py``, with fewer requests.
"""

from pathlib import Path

import pytest

from bench.faults import DRILLS, run_drill
from bench.reference import Expected
from tests.e2e.conftest import MAX_TOKENS

pytestmark = pytest.mark.timeout(240)

NUM_REQUESTS = 40


@pytest.mark.parametrize("drill", [name for name in DRILLS if not name.startswith("no fault")])
def test_a_fault_costs_a_pause_and_nothing_else(
    drill: str, expected: list[Expected], model_dir: Path
) -> None:
    outcome = run_drill(
        drill,
        expected,
        num_requests=NUM_REQUESTS,
        max_tokens=MAX_TOKENS,
        model_dir=model_dir,
    )
    assert outcome.errors == ()
    assert outcome.num_failed == 0
    assert outcome.verdicts.get("different", 0) == 0, outcome
