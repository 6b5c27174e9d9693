"""Answers through gateway, prefill, transport and decode are transformers' own, token for token."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from bench.clients import CheckedClients
from bench.reference import Expected
from bench.suite import running_suite
from tests.e2e.conftest import MAX_TOKENS

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(("transport", "num_decode"), [("ucx", 1), ("tcp", 2)], ids=str)
def test_answers_equal_those_of_transformers(
    transport: str, num_decode: int, model_dir: Path, expected: list[Expected]
) -> None:
    with running_suite(
        "--dtype", "fp32", "--decode", str(num_decode), "--transport", transport
    ) as suite:
        clients = CheckedClients(suite.url, model_dir, expected)
        answers = asyncio.run(clients.run(num_requests=40, concurrency=8, max_tokens=MAX_TOKENS))
        reports = suite.workers()
        suite.wait_until_blocks_are_free()
    errors = [answer.error for answer in answers if answer.error]
    assert not errors
    verdicts = Counter(answer.verdict for answer in answers)
    assert verdicts["different"] == 0, verdicts
    assert verdicts["equal"] >= 38, verdicts  # ties are rare: more would hide something
    assert {report["transport"] for report in reports} == {transport}
    used = {report["instance"] for report in reports if report["role"] == "decode"}
    assert len(used) == num_decode
