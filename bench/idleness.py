"""Whether a benchmark had the machine for itself.

Standard library only: it also runs in the peers' environments.
"""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


class Idleness:
    """Looks at the CPU time of the whole machine and of this process, from when it is made on."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._busy_s = _busy_s()
        self._own_s = _own_s()

    def cores_busy_elsewhere(self) -> float | None:
        """Cores that others kept busy on average, this process's children included.

        What a hypervisor took away counts. ``None`` where the kernel does not tell.
        """
        now_busy_s, elapsed_s = _busy_s(), time.perf_counter() - self._started_s
        if self._busy_s is None or now_busy_s is None or elapsed_s <= 0.0:
            return None
        others_s = now_busy_s - self._busy_s - (_own_s() - self._own_s)
        return max(0.0, others_s / elapsed_s)


def _busy_s() -> float | None:
    """CPU seconds of all cores that were not idle, since the machine started."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system
