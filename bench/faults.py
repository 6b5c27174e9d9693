"""The fault drills: 800 requests from 8 clients while something dies; every token is checked.

    python -m bench.faults [--requests 800] [--drill NAME …] [--data alpaca_data.jsonl.gz]

fp32 and greedy, so that each stream can be held against what transformers answers. Prints a table:
failed requests, verdicts, the worst pause inside a stream, attempts begun anew, stale messages.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from bench.clients import Answer, CheckedClients
from bench.equality import BUNDLED, expected_answers
from bench.postgres import Postgres, running_postgres
from bench.reference import Expected
from bench.suite import Suite, running_suite

ENDED = "banyan_gateway_ended_requests_total"
LOG_WRITTEN = "banyan_gateway_log_written_requests_total"
LOG_LOST = "banyan_gateway_log_lost_requests_total"
LOG_PENDING = "banyan_gateway_log_pending_requests"

FROZEN_S = 10.0
DATABASE_DOWN_S = 20.0


async def nothing(suite: Suite) -> None:
    """No fault: the yardstick."""


async def kill_decode(suite: Suite) -> None:
    """SIGKILL one decode worker."""
    suite.kill(suite.processes("decode")[0])


async def kill_prefill(suite: Suite) -> None:
    """SIGKILL one prefill worker."""
    suite.kill(suite.processes("prefill")[0])


async def kill_leader(suite: Suite) -> None:
    """SIGKILL the scheduler that leads."""
    leader = await asyncio.to_thread(lambda: suite.status()["leader"])
    suite.kill(next(p for p in suite.processes("scheduler") if p.instance == leader))


async def kill_nats(suite: Suite) -> None:
    """SIGKILL the nats-server, which its supervisor starts again."""
    suite.kill_pid(suite.nats_pid())


async def freeze_decode(suite: Suite) -> None:
    """SIGSTOP one decode worker for ten seconds."""
    frozen = suite.processes("decode")[0]
    suite.kill(frozen, signal.SIGSTOP)
    try:
        await asyncio.sleep(FROZEN_S)
    finally:
        suite.kill(frozen, signal.SIGCONT)


async def stop_database(suite: Suite) -> None:
    """End PostgreSQL at once and start it again twenty seconds later."""
    assert isinstance(suite.database, Postgres), "the drill needs a server that can be stopped"
    await asyncio.to_thread(suite.database.stop)
    try:
        await asyncio.sleep(DATABASE_DOWN_S)
    finally:
        await asyncio.to_thread(suite.database.start)


@dataclass(frozen=True, kw_only=True)
class Drill:
    """A suite and what happens to it."""

    arguments: tuple[str, ...]
    action: Callable[[Suite], Awaitable[None]]
    needs_postgres: bool = False


DRILLS = {
    "no fault, 1P+1D": Drill(arguments=(), action=nothing),
    "decode killed, 1P+2D": Drill(arguments=("--decode", "2"), action=kill_decode),
    "only decode killed, 2P+1D": Drill(arguments=("--prefill", "2"), action=kill_decode),
    "prefill killed, 2P+1D": Drill(arguments=("--prefill", "2"), action=kill_prefill),
    "scheduler killed, standby": Drill(arguments=("--scheduler", "2"), action=kill_leader),
    "nats restarted": Drill(arguments=(), action=kill_nats),
    "decode frozen 10 s, 1P+2D": Drill(arguments=("--decode", "2"), action=freeze_decode),
    "database down 20 s": Drill(arguments=(), action=stop_database, needs_postgres=True),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a drill showed."""

    drill: str
    num_requests: int
    num_failed: int
    verdicts: dict[str, int]
    worst_pause_s: float
    num_lost_attempts: int
    num_stale: int
    num_refetched_tokens: int
    num_logged: int
    num_log_lost: int
    wall_s: float
    errors: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Nobody failed, nobody got a wrong token, and every request is accounted for."""
        is_log_complete = self.num_logged + self.num_log_lost == self.num_requests
        return is_log_complete and not self.num_failed and not self.verdicts.get("different")

    def row(self) -> str:
        """A row of the table."""
        v = self.verdicts
        return (
            f"| {self.drill} | {self.num_requests} | {self.num_failed} | {v.get('equal', 0)} / "
            f"{v.get('tie', 0)} / {v.get('different', 0)} | {self.worst_pause_s:.2f} | "
            f"{self.num_lost_attempts} | {self.num_stale} | {self.num_refetched_tokens} | "
            f"{self.num_logged} / {self.num_log_lost} | {self.wall_s:.0f} |"
        )


HEADER = (
    "| drill | requests | failed | equal / tie / different | worst pause s | attempts begun anew "
    "| stale dropped | tokens refetched | log rows / lost | wall s |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def run_drill(
    name: str, expected: list[Expected], *, num_requests: int, max_tokens: int, model_dir: Path
) -> Outcome:
    """Start the drill's own suite and run the drill on it."""
    arguments = ("--dtype", "fp32", "--model", str(model_dir), *DRILLS[name].arguments)
    with contextlib.ExitStack() as stack:
        postgres = None
        if DRILLS[name].needs_postgres:
            postgres = stack.enter_context(running_postgres())
        suite = stack.enter_context(running_suite(*arguments, postgres=postgres))
        return drill_on(
            suite,
            name,
            expected,
            num_requests=num_requests,
            max_tokens=max_tokens,
            model_dir=model_dir,
        )


def drill_on(
    suite: Suite,
    name: str,
    expected: list[Expected],
    *,
    num_requests: int,
    max_tokens: int,
    model_dir: Path,
) -> Outcome:
    """Ask, break the suite after a quarter of the answers, and see that all was freed."""
    clients = CheckedClients(suite.url, model_dir, expected)
    ended_before = suite.metric(ENDED)
    logged_before, lost_before = suite.metric(LOG_WRITTEN), suite.metric(LOG_LOST)
    began_s = time.monotonic()
    answers = asyncio.run(
        clients.run(
            num_requests=num_requests,
            concurrency=8,
            max_tokens=max_tokens,
            at=num_requests // 4,
            action=lambda: DRILLS[name].action(suite),
        )
    )
    wall_s = time.monotonic() - began_s
    suite.wait_until_blocks_are_free()
    suite.wait_until(
        lambda: (
            suite.metric(ENDED) - ended_before >= num_requests and not suite.metric(LOG_PENDING)
        ),
        "the writing of the request log",
    )
    stale = sum(worker["num_stale_dropped"] for worker in suite.workers())
    return Outcome(
        drill=name,
        num_requests=num_requests,
        num_failed=sum(answer.verdict == "failed" for answer in answers),
        verdicts=dict(Counter(answer.verdict for answer in answers)),
        worst_pause_s=worst_pause_s(answers),
        num_lost_attempts=int(suite.metric("banyan_gateway_lost_attempts_events_total")),
        num_stale=stale + int(suite.metric("banyan_gateway_stale_messages_total")),
        num_refetched_tokens=int(suite.metric("banyan_gateway_refetched_tokens_total")),
        num_logged=suite.num_logged() - int(logged_before),
        num_log_lost=int(suite.metric(LOG_LOST) - lost_before),
        wall_s=wall_s,
        errors=tuple(sorted({a.error[:200] for a in answers if a.error}))[:5],
    )


def worst_pause_s(answers: list[Answer]) -> float:
    """The longest that a client waited for its next chunk, the first included."""
    return max(max([answer.ttft_s, *answer.pauses_s]) for answer in answers)


def main() -> int:
    """Run the drills; exit code 1 if one of them failed a request or gave a wrong token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--drill", nargs="+", choices=list(DRILLS), default=list(DRILLS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    expected = expected_answers(args.model, args.data, args.num_prompts, args.max_tokens)
    print(HEADER, flush=True)
    outcomes = []
    for name in args.drill:
        outcome = run_drill(
            name,
            expected,
            num_requests=args.requests,
            max_tokens=args.max_tokens,
            model_dir=args.model,
        )
        outcomes.append(outcome)
        print(outcome.row(), *outcome.errors, sep="\n  ", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
