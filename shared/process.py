"""What ``shared.runtime`` needs of the operating system."""

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
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
        self._timer: threading.Timer | None = None

    def arm(self, after_s: float, exit_code: int) -> None:
        """End the process with ``exit_code`` after ``after_s``; replaces what was armed before.

        No lock, because a signal handler may come in between: at worst two timers run.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(after_s, self._expire, (after_s, exit_code))
        self._timer.daemon = True
        self._timer.start()

    @staticmethod
    def _expire(after_s: float, exit_code: int) -> None:
        _log.critical("still running, ending the process", extra={"after_s": after_s})
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
