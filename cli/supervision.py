"""What to do when a process of the suite becomes ready or ends. Decides only: no I/O, no clock.

The suite consists of *slots* (``decode-0``), each filled by one process after another, every one of
them under an instance name of its own::

                  ┌────────── after a pause ──────────┐
                  ▼                                   │
    started ─▶ STARTING ──▶ READY ──▶ crashed ──▶ RESTARTING
                  │           └─▶ exit 0, unasked ──▶ ENDED    (somebody drained it)
                  └─▶ wrong settings, a model that is not served, or too many crashes ──▶ FAILED
    asked to stop, from any state ──▶ ENDED
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cli.advice import LoggedError

STOP_ORDER: tuple[frozenset[str], ...] = (
    frozenset({"gateway"}),
    frozenset({"scheduler"}),
    frozenset({"prefill", "decode"}),
    frozenset({"predictor", "placer", "kvstore"}),
    frozenset({"nats"}),
)
"""Roles in the order in which they drain."""

WRONG_SETTINGS_EXIT_CODE = 2


@dataclass(frozen=True, order=True)
class Slot:
    """The place of one process in the suite."""

    role: str
    index: int

    def __str__(self) -> str:
        """``decode-0``."""
        return f"{self.role}-{self.index}"


class Phase(StrEnum):
    """How the process in a slot is."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How long to wait before a crashed process is started again, and when to give it up.

    The pause doubles from ``first_pause_s`` to ``max_pause_s`` with each crash in a row; a process
    that was ready for ``steady_s`` ends the row. Only a slot that was never ready is given up,
    after ``max_crashes``: what has worked once will work again.
    """

    first_pause_s: float = 0.2
    max_pause_s: float = 10.0
    max_crashes: int = 5
    steady_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Start the slot's next process after ``after_s``."""

    after_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Leave the slot empty: its process was meant to end."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """The suite cannot work like this."""

    reason: str


Decision = Restart | Leave | GiveUp


@dataclass(kw_only=True)
class _SlotState:
    phase: Phase = Phase.WAITING
    instance: str = ""
    ready_since_s: float | None = None
    was_ever_ready: bool = False
    num_crashes_in_row: int = 0


class Supervision:
    """The state of every slot of the suite."""

    def __init__(self, slots: Sequence[Slot], policy: RestartPolicy | None = None) -> None:
        self._policy = policy or RestartPolicy()
        self._states = {slot: _SlotState() for slot in slots}
        self._is_stopping = False

    def is_starting(self, slot: Slot) -> bool:
        """Whether the process in ``slot`` is not ready yet."""
        return self._states[slot].phase is Phase.STARTING

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a process that is ready, or none because it was drained."""
        return all(state.phase in (Phase.READY, Phase.ENDED) for state in self._states.values())

    def phase(self, slot: Slot) -> Phase:
        """How the process in ``slot`` is."""
        return self._states[slot].phase

    def phases(self) -> dict[Slot, Phase]:
        """How every slot is."""
        return {slot: state.phase for slot, state in self._states.items()}

    def started(self, slot: Slot, instance: str) -> None:
        """A process called ``instance`` was started in ``slot``."""
        state = self._states[slot]
        state.phase, state.instance, state.ready_since_s = Phase.STARTING, instance, None

    def became_ready(self, instance: str, now_s: float) -> Slot | None:
        """``instance`` says that it takes work; its slot if that is news.

        What a former process of the slot still says, or one of another suite, is no news.
        """
        for slot, state in self._states.items():
            if state.instance == instance and state.phase is Phase.STARTING:
                state.phase, state.ready_since_s, state.was_ever_ready = Phase.READY, now_s, True
                return slot
        return None

    def exited(
        self, slot: Slot, exit_code: int, now_s: float, error: LoggedError | None = None
    ) -> Decision:
        """The process in ``slot`` ended with ``exit_code`` (negative: the signal that ended it).

        ``error`` is why, as far as its log says; it counts only before the slot was ever ready.
        """
        state = self._states[slot]
        decision = self._decide(state, exit_code, now_s, error)
        match decision:
            case Restart():
                state.phase = Phase.RESTARTING
            case Leave():
                state.phase = Phase.ENDED
            case GiveUp():
                state.phase = Phase.FAILED
        return decision

    def stop(self) -> tuple[tuple[Slot, ...], ...]:
        """From here on nothing is restarted. The slots in the waves in which they are to drain."""
        self._is_stopping = True
        waves = (tuple(slot for slot in self._states if slot.role in roles) for roles in STOP_ORDER)
        return tuple(wave for wave in waves if wave)

    def _decide(
        self, state: _SlotState, exit_code: int, now_s: float, error: LoggedError | None
    ) -> Decision:
        policy = self._policy
        how = describe_exit(exit_code)
        if self._is_stopping:
            return Leave(reason=how)
        if state.ready_since_s is not None:
            if exit_code == 0:
                return Leave(reason="drained")
            if now_s - state.ready_since_s >= policy.steady_s:
                state.num_crashes_in_row = 0
        state.num_crashes_in_row += 1
        if not state.was_ever_ready:
            if exit_code == WRONG_SETTINGS_EXIT_CODE:
                return GiveUp(reason="wrong settings")
            if error is not None:
                how = f"{how}: {error}"
                if error.is_hopeless:
                    return GiveUp(reason=str(error))
            if state.num_crashes_in_row >= policy.max_crashes:
                count = state.num_crashes_in_row
                return GiveUp(reason=f"ended {count} times before it was ready, at last: {how}")
        pause_s = policy.first_pause_s * 2.0 ** min(state.num_crashes_in_row - 1, 32)
        return Restart(after_s=min(pause_s, policy.max_pause_s), reason=how)


def describe_exit(exit_code: int) -> str:
    """An exit code in words."""
    return f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
