"""Instances are drained among running requests: nobody fails, and every process ends with 0."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.clients import CheckedClients
from bench.reference import Expected
from bench.suite import ROOT, Suite, running_suite
from tests.e2e.conftest import MAX_TOKENS

pytestmark = pytest.mark.timeout(240)

NUM_REQUESTS = 40


@pytest.fixture(scope="module")
def roomy_suite() -> Iterator[Suite]:
    """1 prefill, 2 decode, and two of whatever leads or listens."""
    arguments = ("--decode", "2", "--scheduler", "2", "--gateway", "2")
    with running_suite("--dtype", "fp32", *arguments) as running:
        yield running


def banyan(*arguments: str, suite: Suite) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments, "--url", suite.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def drain(suite: Suite, instance: str) -> dict[str, Any]:
    done = banyan("drain", instance, "--wait", "--json", suite=suite)
    assert done.returncode == 0, f"{done.stderr}\n{suite.logs()}"
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def ask_while_draining(
    suite: Suite, instances: Sequence[str], expected: list[Expected], model_dir: Path
) -> None:
    """Drain one after the other while clients ask; none may notice."""
    outcomes: list[dict[str, Any]] = []

    async def drain_all() -> None:
        for instance in instances:
            outcomes.append(await asyncio.to_thread(drain, suite, instance))

    clients = CheckedClients(suite.url, model_dir, expected)
    answers = asyncio.run(
        clients.run(
            num_requests=NUM_REQUESTS,
            concurrency=8,
            max_tokens=MAX_TOKENS,
            at=NUM_REQUESTS // 4,
            action=drain_all,
        )
    )
    assert [answer.error for answer in answers if answer.error] == []
    assert [answer for answer in answers if answer.verdict == "different"] == []
    assert [outcome["exit_code"] for outcome in outcomes] == [0] * len(instances)
    suite.wait_until(
        lambda: not {o["instance"] for o in outcomes} & {p.instance for p in suite.processes()},
        "the end of the drained processes",
    )


def test_a_decode_worker_leaves_and_nobody_notices(
    roomy_suite: Suite, expected: list[Expected], model_dir: Path
) -> None:
    leaving = roomy_suite.processes("decode")[0].instance
    ask_while_draining(roomy_suite, [leaving], expected, model_dir)
    assert leaving not in {w["instance"] for w in roomy_suite.workers()}
    # It stays away: it was asked to end, it did not crash.
    assert len(roomy_suite.processes("decode")) == 1
    roomy_suite.wait_until_blocks_are_free()


def test_one_of_every_other_role_leaves_and_nobody_notices(
    roomy_suite: Suite, expected: list[Expected], model_dir: Path
) -> None:
    leader = roomy_suite.status()["leader"]
    other_gateway = roomy_suite.processes("gateway")[1].instance
    leaving = [
        leader,
        other_gateway,
        *(roomy_suite.processes(role)[0].instance for role in ("kvstore", "predictor", "placer")),
    ]
    ask_while_draining(roomy_suite, leaving, expected, model_dir)
    assert roomy_suite.status()["leader"] not in (None, leader)


def test_every_decode_worker_may_leave_but_not_the_last_worker(
    roomy_suite: Suite, expected: list[Expected], model_dir: Path
) -> None:
    leaving = [process.instance for process in roomy_suite.processes("decode")]
    ask_while_draining(roomy_suite, leaving, expected, model_dir)
    assert [w["role"] for w in roomy_suite.workers()] == ["prefill"]
    done = banyan("drain", "prefill", suite=roomy_suite)
    assert done.returncode == 1
    assert "start another one first, or say --force" in done.stderr
    assert len(roomy_suite.processes("prefill")) == 1


def test_who_is_not_there_cannot_be_drained(roomy_suite: Suite) -> None:
    done = banyan("drain", "decode-7", suite=roomy_suite)
    assert done.returncode == 1
    assert "no instance decode-7; there are: " in done.stderr
    assert "gateway-0-" in done.stderr
