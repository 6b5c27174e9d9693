"""Where a benchmark ran: goes into every result."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"torch": "torch", "triton": "triton", "transformers": "transformers"} | {
    "nats-py": "nats",
    "msgspec": "msgspec",
    "fastapi": "fastapi",
}
"""Distributions and what is imported of them; those that are not installed are left out."""


def environment() -> dict[str, object]:
    """Git revision (empty outside of a repository), machine and versions."""
    return {
        "git": _revision(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_cpu_name()}",
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name, of in PACKAGES.items() if find_spec(of)
        },
    }


def _revision() -> str:
    if shutil.which("git") is None:
        return ""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
