"""When a crashed process is started again, when it is given up, and who is stopped first."""

import pytest

from cli.advice import LoggedError
from cli.supervision import (
    GiveUp,
    Leave,
    Phase,
    Restart,
    RestartPolicy,
    Slot,
    Supervision,
)

DECODE = Slot("decode", 0)
GATEWAY = Slot("gateway", 0)


def pause_after_crash(supervision: Supervision, slot: Slot, now_s: float) -> float:
    supervision.started(slot, f"{slot}-at-{now_s}")
    decision = supervision.exited(slot, -9, now_s)
    assert isinstance(decision, Restart)
    return decision.after_s


def ready(supervision: Supervision, slot: Slot, now_s: float) -> None:
    supervision.started(slot, f"{slot}-at-{now_s}")
    assert supervision.became_ready(f"{slot}-at-{now_s}", now_s) == slot


def test_a_process_is_starting_until_it_says_that_it_is_ready() -> None:
    supervision = Supervision([DECODE, GATEWAY])
    assert supervision.phase(DECODE) is Phase.WAITING
    ready(supervision, GATEWAY, 0.0)
    supervision.started(DECODE, "decode-0-a")
    assert supervision.phase(DECODE) is Phase.STARTING
    assert not supervision.is_ready
    assert supervision.became_ready("decode-0-a", 1.0) == DECODE
    assert supervision.is_ready
    assert supervision.became_ready("decode-0-a", 2.0) is None


def test_a_former_process_cannot_speak_for_its_successor() -> None:
    supervision = Supervision([DECODE])
    supervision.started(DECODE, "decode-0-a")
    supervision.exited(DECODE, 1, 0.0)
    supervision.started(DECODE, "decode-0-b")
    assert supervision.became_ready("decode-0-a", 1.0) is None
    assert supervision.phase(DECODE) is Phase.STARTING


def test_the_pause_doubles_with_every_crash_in_a_row_up_to_its_limit() -> None:
    supervision = Supervision([DECODE])
    ready(supervision, DECODE, 0.0)
    supervision.exited(DECODE, -9, 1.0)
    pauses = [pause_after_crash(supervision, DECODE, 2.0 + n) for n in range(8)]
    assert pauses == [0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_a_process_that_ran_well_ends_the_row_of_crashes() -> None:
    supervision = Supervision([DECODE])
    ready(supervision, DECODE, 0.0)
    assert supervision.exited(DECODE, 1, 5.0) == Restart(after_s=0.2, reason="exit code 1")
    ready(supervision, DECODE, 6.0)
    assert supervision.exited(DECODE, 1, 15.9) == Restart(after_s=0.4, reason="exit code 1")
    ready(supervision, DECODE, 20.0)
    assert supervision.exited(DECODE, 1, 30.0) == Restart(after_s=0.2, reason="exit code 1")


def test_what_never_became_ready_is_given_up_after_five_crashes() -> None:
    supervision = Supervision([DECODE])
    pauses = [pause_after_crash(supervision, DECODE, 10.0 * n) for n in range(4)]
    assert pauses == [0.2, 0.4, 0.8, 1.6]
    supervision.started(DECODE, "decode-0-e")
    decision = supervision.exited(DECODE, -9, 50.0)
    assert isinstance(decision, GiveUp)
    assert "5 times" in decision.reason and "signal 9" in decision.reason
    assert supervision.phase(DECODE) is Phase.FAILED


def test_what_was_ready_once_is_never_given_up() -> None:
    supervision = Supervision([DECODE], RestartPolicy(max_crashes=2))
    ready(supervision, DECODE, 0.0)
    supervision.exited(DECODE, 1, 0.0)
    for number in range(20):
        pause_after_crash(supervision, DECODE, 1.0 + number)


def test_wrong_settings_are_not_tried_twice() -> None:
    supervision = Supervision([DECODE])
    supervision.started(DECODE, "decode-0-a")
    assert supervision.exited(DECODE, 2, 0.0) == GiveUp(reason="wrong settings")


def test_a_model_that_is_not_served_is_not_tried_twice() -> None:
    supervision = Supervision([DECODE])
    supervision.started(DECODE, "decode-0-a")
    error = LoggedError(kind="UnsupportedModel", text="an encoder")
    assert supervision.exited(DECODE, 1, 0.0, error) == GiveUp(reason="an encoder")


def test_too_little_memory_may_be_enough_the_next_time() -> None:
    supervision = Supervision([DECODE])
    supervision.started(DECODE, "decode-0-a")
    error = LoggedError(kind="OutOfMemory", text="9 bytes are needed, 8 are there")
    decision = supervision.exited(DECODE, 1, 0.0, error)
    assert decision == Restart(after_s=0.2, reason=f"exit code 1: {error}")


def test_what_was_ready_once_is_restarted_whatever_it_says() -> None:
    supervision = Supervision([DECODE])
    ready(supervision, DECODE, 0.0)
    error = LoggedError(kind="ConfigError", text="no GPU any more")
    assert isinstance(supervision.exited(DECODE, 1, 1.0, error), Restart)


def test_a_process_that_was_drained_during_the_start_is_not_waited_for() -> None:
    supervision = Supervision([DECODE, GATEWAY])
    ready(supervision, DECODE, 0.0)
    supervision.exited(DECODE, 0, 1.0)
    assert not supervision.is_ready
    ready(supervision, GATEWAY, 2.0)
    assert supervision.is_ready


def test_what_was_drained_stays_away() -> None:
    supervision = Supervision([DECODE])
    ready(supervision, DECODE, 0.0)
    assert isinstance(supervision.exited(DECODE, 0, 1.0), Leave)
    assert supervision.phase(DECODE) is Phase.ENDED


def test_an_end_before_ready_is_a_crash_whatever_the_exit_code() -> None:
    supervision = Supervision([DECODE])
    supervision.started(DECODE, "decode-0-a")
    assert isinstance(supervision.exited(DECODE, 0, 1.0), Restart)


@pytest.mark.parametrize("exit_code", [0, 1, -9])
def test_nothing_is_restarted_once_the_suite_stops(exit_code: int) -> None:
    supervision = Supervision([DECODE])
    ready(supervision, DECODE, 0.0)
    supervision.stop()
    assert isinstance(supervision.exited(DECODE, exit_code, 1.0), Leave)


def test_the_suite_stops_from_the_edge_to_the_bus() -> None:
    roles = ["nats", "kvstore", "decode", "prefill", "scheduler", "placer", "gateway", "predictor"]
    slots = [Slot(role, index) for role in roles for index in range(2)]
    waves = [sorted({slot.role for slot in wave}) for wave in Supervision(slots).stop()]
    assert waves == [
        ["gateway"],
        ["scheduler"],
        ["decode", "prefill"],
        ["kvstore", "placer", "predictor"],
        ["nats"],
    ]


def test_a_role_that_is_not_there_is_no_wave() -> None:
    assert Supervision([DECODE, GATEWAY]).stop() == ((GATEWAY,), (DECODE,))
