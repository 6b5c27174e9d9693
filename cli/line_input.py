"""Lines from the user: edited and remembered where there is a terminal and ``readline``."""

import contextlib
import os
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

MAX_REMEMBERED = 1000


class LineInput:
    """Reads line after line; what is typed at a terminal is kept in ``history`` for the next time.

    Only the user can read that file. Where it cannot be written nothing is remembered.
    """

    def __init__(self, history: Path, *, is_terminal: bool) -> None:
        self._history = history
        self._readline = _readline() if is_terminal else None

    def __enter__(self) -> Self:
        """Bring back what was typed in former conversations."""
        if self._readline is not None:
            self._readline.clear_history()
            with contextlib.suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self._history, os.O_RDONLY | os.O_CREAT, 0o600))
                self._readline.read_history_file(self._history)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Keep the latest of it."""
        if self._readline is not None:
            self._readline.set_history_length(MAX_REMEMBERED)
            with contextlib.suppress(OSError):
                self._readline.write_history_file(self._history)

    def read(self, prompt: str) -> str:
        """The next line. Raises ``EOFError`` at the end of input, ``KeyboardInterrupt``."""
        return input(prompt)


def _readline() -> ModuleType | None:
    """The module that gives ``input`` its line editing, where Python was built with it."""
    try:
        import readline
    except ImportError:
        return None
    return readline
