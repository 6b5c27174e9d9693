"""What ``banyan up`` shows while the suite starts, runs and stops."""

import signal
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from cli.advice import Progress
from cli.supervision import Phase, Slot, describe_exit
from cli.supervisor import Change, Failure

_COLOURS = {
    Phase.WAITING: "dim",
    Phase.STARTING: "yellow",
    Phase.READY: "green",
    Phase.RESTARTING: "red",
    Phase.ENDED: "dim",
    Phase.FAILED: "bold red",
}
_ORDERLY_ENDS = (describe_exit(0), describe_exit(-signal.SIGTERM))
"""A process that is still importing has no handler for the signal yet."""


class UpView:
    """Tells on ``console``: one live line on a terminal, a line for each change elsewhere."""

    def __init__(self, console: Console, *, is_quiet: bool = False) -> None:
        self._console = console
        self._is_quiet = is_quiet
        self._status: Status | None = None
        self._phases: dict[Slot, Phase] = {}
        self._progress: Mapping[Slot, Progress] = {}
        self._title = "starting"
        self._is_running = False
        self._is_stopping = False
        self._began_s = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._console.is_terminal and not self._is_quiet:
            self._status = self._console.status(self._line())
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self.settle()

    @property
    def elapsed_s(self) -> float:
        """How long the suite has been starting."""
        return time.monotonic() - self._began_s

    def settle(self) -> None:
        """The live line has nothing more to say."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def changed(self, change: Change) -> None:
        """Show that a process started, got ready or ended."""
        self._phases[change.slot] = change.phase
        is_news = change.phase not in (Phase.STARTING, Phase.READY)
        if self._is_stopping and change.detail in _ORDERLY_ENDS:
            pass  # the live line shows it
        elif is_news and change.detail:
            colour = _COLOURS[change.phase]
            self.say(f"[{colour}]{change.slot}[/] {change.phase}: {escape(change.detail)}")
        elif self._is_running and change.phase is Phase.READY:
            self.say(f"[{_COLOURS[change.phase]}]{change.slot}[/] ready again")
        elif self._status is None and not self._is_running:
            self.say(f"{change.slot} {change.phase}")
        self._refresh()

    def progressed(self, progress: Mapping[Slot, Progress]) -> None:
        """Show how far those are that load something."""
        if progress != self._progress:
            self._progress = progress
            self._refresh()

    def stopping(self) -> None:
        """Show that the suite drains."""
        self._title = "stopping, Ctrl-C again kills"
        self._is_running, self._is_stopping = False, True
        if self._console.is_terminal and not self._is_quiet and self._status is None:
            self._status = self._console.status(self._line())
            self._status.start()
        self._refresh()

    def running(self) -> None:
        """Everything is up; from here on only what goes wrong is shown."""
        self.settle()
        self._is_running = True

    def failed(self, failure: Failure, log_dir: str) -> None:
        """Show why the suite cannot work."""
        self.settle()
        reason = escape(failure.reason)
        self._print(f"[bold red]{failure.slot} does not start:[/] {reason}")
        if failure.log_tail:
            self._print(f"[dim]{escape(failure.log_tail)}[/]")
        if failure.advice:
            self._print(escape(failure.advice))
        self._print(f"the logs are in {escape(log_dir)}")

    def say(self, text: str) -> None:
        """One line, unless nothing is to be said."""
        if not self._is_quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._status is not None:
            self._status.update(self._line())

    def _line(self) -> str:
        return f"{self._title} {_summary(self._phases, self._progress)}".rstrip()


def _summary(phases: Mapping[Slot, Phase], progress: Mapping[Slot, Progress]) -> str:
    parts = []
    for slot, phase in sorted(phases.items()):
        word = phase.value
        if phase is Phase.STARTING and slot in progress:
            word = f"{escape(progress[slot].what)} {progress[slot].fraction:.0%}"
        mark = "✓" if phase is Phase.READY else f" {word}"
        parts.append(f"[{_COLOURS[phase]}]{slot}{mark}[/]")
    return "  ".join(parts)
