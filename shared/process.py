"""What ``shared.runtime`` needs of the operating system."""

import contextlib
import ctypes
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(parent_pid: int, signum: int) -> bool:
    """Have the kernel send ``signum`` to this process when its parent ends, however it ends.

    Returns whether ``parent_pid`` is (still) the parent; if not, the signal will never come and the
    caller should exit. The kernel watches the parent's thread that started this process, so a
    supervisor starts its children from a thread that lives as long as itself. Linux only: elsewhere
    nothing is watched. Raises ``OSError`` if the kernel refuses.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    return os.getppid() == parent_pid


class ExitTimer:
    """Ends the process from a thread of its own when a shutdown is stuck.

    It works while the event loop is blocked, and while the interpreter waits for threads that do
    not return. It prints every thread's stack first.
    """

    def __init__(self) -> None:
        # A pipe and not a lock or an event: a signal handler may interrupt ``arm`` anywhere and
        # call it again, which would wait for ever for what it has interrupted.
        self._wake_up, self._armed = os.pipe()
        self._deadline_s: float | None = None
        self._exit_code = 1
        threading.Thread(target=self._watch, name="exit timer", daemon=True).start()

    def arm(self, after_s: float, exit_code: int) -> None:
        """End the process with ``exit_code`` after ``after_s``; replaces what was armed before."""
        self._exit_code = exit_code
        self._deadline_s = time.monotonic() + after_s
        os.write(self._armed, b".")

    def _watch(self) -> None:
        while True:
            deadline_s = self._deadline_s
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._expire(self._exit_code)
            if select.select([self._wake_up], [], [], left_s)[0]:
                os.read(self._wake_up, 64)

    @staticmethod
    def _expire(exit_code: int) -> None:
        _log.critical("still running, ending the process")
        faulthandler.dump_traceback(all_threads=True)
        os._exit(exit_code)


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees all of ``text`` or the file that was there before."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise


def signal_name(signum: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(signum).name
