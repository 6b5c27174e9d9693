"""What the runners of the peers share: arguments and the report.

Standard library only: it runs in the peers' environments.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import offline
from bench.serving import Serving
from bench.workload import Workload

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Names that the kernel has for bf16 arithmetic, on x86 and ARM."""


class PeerSettings:
    """What a runner was asked for; remembers which options were looked at.

    ``dtype`` is ``fp32`` instead of ``bf16`` or ``auto`` where bf16 would only be emulated.
    """

    def __init__(self, args: argparse.Namespace, workloads: Sequence[Workload]) -> None:
        self.model: str = args.model
        self.dtype: str = args.dtype if computes_bf16() else "fp32"
        self.num_threads: int | None = args.num_threads
        self.cache_dir: str = args.cache_dir
        self.max_model_len = max(workload.max_model_len for workload in workloads)
        self.max_batch = max(len(workload.shapes) for workload in workloads)
        self._options = dict(args.set or ())
        self._known: set[str] = set()

    def option(self, name: str, default: str) -> str:
        """The value of ``--set name=…``."""
        self._known.add(name)
        value: str = self._options.get(name, default)
        return value

    def check_options(self) -> None:
        """Exit with a message if an option was given that nobody looked at."""
        if unknown := self._options.keys() - self._known:
            raise SystemExit(f"--set {', '.join(sorted(unknown))}: known are {sorted(self._known)}")


def computes_bf16(
    cpuinfo: Path = Path("/proc/cpuinfo"), driver: Path = Path("/proc/driver/nvidia/version")
) -> bool:
    """Whether this machine has a GPU, or a CPU that multiplies bf16; ``True`` if in doubt."""
    if driver.exists() or not cpuinfo.exists():
        return True
    lines = cpuinfo.read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    return flags is None or bool(BF16_FLAGS & set(flags.split()))


Make = Callable[[PeerSettings], tuple[Serving, dict[str, Any]]]
"""Loads the model: the engine, and facts for the report (``dtype`` is what really computes)."""


def run(name: str, make: Make, argv: list[str] | None = None) -> None:
    """A runner's main program."""
    parser = argparse.ArgumentParser(prog=f"bench.peers.{name}")
    offline.add_arguments(parser)
    parser.add_argument("--cache-dir", default=".peers/models", help="for converted models")
    parser.add_argument(
        "--set",
        action="append",
        type=_key_and_value,
        metavar="KEY=VALUE",
        help="a setting of this peer; may be given several times",
    )
    args = parser.parse_args(argv)
    workloads = offline.workloads_of(args)
    settings = PeerSettings(args, workloads)
    started_s = time.perf_counter()
    serving, facts = make(settings)
    settings.check_options()
    load_s = time.perf_counter() - started_s
    vocab_size = offline.vocab_size_of(args.model)
    results = [offline.measure(serving, workload, args, vocab_size) for workload in workloads]
    facts = {"engine": name, "load_s": load_s, **facts}
    facts.setdefault("peak_memory_bytes", offline.peak_memory_bytes())
    offline.write_report(offline.flattened(facts, results), args)


def _key_and_value(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value
