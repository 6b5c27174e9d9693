"""Where a benchmark ran: goes into every result."""

import os
import platform
import subprocess
from importlib import metadata

from bench.suite import ROOT

PACKAGES = ("torch", "transformers", "nats-py", "msgspec", "fastapi")


def environment() -> dict[str, object]:
    """Git revision, machine and versions."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "git": revision,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_cpu_name()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
