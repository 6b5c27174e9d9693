"""What ``banyan up`` shows."""

import io

import pytest
from rich.console import Console

from cli.advice import Progress
from cli.supervision import Phase, Slot
from cli.supervisor import Change, Failure
from cli.view import UpView

DECODE = Slot("decode", 0)


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


def change(phase: Phase, detail: str = "") -> Change:
    return Change(slot=DECODE, phase=phase, instance="decode-0-ab", detail=detail)


def test_a_terminal_shows_how_far_loading_is(output: io.StringIO) -> None:
    console = Console(file=output, force_terminal=True, width=200)
    with UpView(console) as view:
        view.changed(change(Phase.STARTING))
        view.progressed({DECODE: Progress(what="loading [weights]", fraction=0.05)})
        view.progressed({DECODE: Progress(what="loading [weights]", fraction=0.4)})
    assert "decode-0 loading [weights] 40%" in output.getvalue()


def test_what_is_ready_has_nothing_left_to_load(output: io.StringIO) -> None:
    with UpView(Console(file=output, force_terminal=True, width=200)) as view:
        view.changed(change(Phase.STARTING))
        view.progressed({DECODE: Progress(what="ready", fraction=1.0)})
        view.changed(change(Phase.READY))
    assert "decode-0✓" in output.getvalue()


def test_elsewhere_there_is_a_line_for_each_change_and_none_for_progress(
    output: io.StringIO,
) -> None:
    with UpView(Console(file=output)) as view:
        view.changed(change(Phase.STARTING))
        view.progressed({DECODE: Progress(what="loading weights", fraction=0.05)})
        view.changed(change(Phase.RESTARTING, "exit code 1: too little memory"))
        view.changed(change(Phase.READY))
    assert output.getvalue().splitlines() == [
        "decode-0 starting",
        "decode-0 restarting: exit code 1: too little memory",
        "decode-0 ready",
    ]


@pytest.mark.parametrize(
    ("failure", "lines"),
    [
        (
            Failure(slot=DECODE, reason="wrong settings", log_tail="X='y': no"),
            ["decode-0 does not start: wrong settings", "X='y': no"],
        ),
        (
            Failure(slot=DECODE, reason="too [much]", log_tail="", advice="take less"),
            ["decode-0 does not start: too [much]", "take less"],
        ),
    ],
)
def test_a_failure_says_why_what_to_do_and_where_to_look(
    output: io.StringIO, failure: Failure, lines: list[str]
) -> None:
    with UpView(Console(file=output), is_quiet=True) as view:
        view.failed(failure, "/the/logs")
    assert output.getvalue().splitlines() == [*lines, "the logs are in /the/logs"]
